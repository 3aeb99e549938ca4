"""Timing by turns: every rival once a round, medians and their spread over the rounds, ratios round by round.

A machine that slows down for a while slows all rivals of that round alike, so a ratio of two rivals is taken
within each round and its median reported. Numerics come first: require_right() stops while a result is wrong.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one rival over the rounds, and its ratio to the floor's of the same round."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]


def require_right(failures: Mapping[str, list[str]]) -> None:
    """AssertionError that lists, by rival, what is wrong with its results; nothing where nothing is."""
    wrong = {name: lines for name, lines in failures.items() if lines}
    assert not wrong, f"no speed is printed while results are wrong: {wrong}"


def measure(
    rivals: Mapping[str, Callable[[], object]],
    *,
    floor: str,
    rounds: int,
    warmup: int = 2,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time every rival in turn, rounds times after untimed ones; each round starts with another rival."""
    names = list(rivals)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _synchronize(device)
            start = time.perf_counter()
            rivals[name]()
            _synchronize(device)
            if turn >= warmup:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: _timing(samples[name], samples[floor]) for name in names}


def table(title: str, timings: Mapping[str, Timing], floor: str) -> str:
    """One line a rival: median, quartiles, ratio to the floor with its quartiles."""
    lines = [f"{title}; ratios to {floor}, medians of rounds [quartiles]"]
    for name, timing in timings.items():
        low, high = timing.quartiles_ms
        ratio_low, ratio_high = timing.ratio_quartiles
        lines.append(
            f"  {name:34} {timing.median_ms:9.2f} ms [{low:9.2f} {high:9.2f}]"
            f"   {timing.ratio:6.3f} [{ratio_low:.3f} {ratio_high:.3f}]"
        )
    return "\n".join(lines)


def environment(device: str = "cpu") -> dict[str, str | int]:
    """What a figure was measured on, for pytest-benchmark's extra_info."""
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }


def _timing(samples: list[float], floor: list[float]) -> Timing:
    ratios = [own / other for own, other in zip(samples, floor, strict=True)]
    return Timing(
        statistics.median(samples), _quartiles(samples), statistics.median(ratios), _quartiles(ratios)
    )


def _quartiles(samples: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(samples, n=4)
    return low, high


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
