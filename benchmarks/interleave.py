"""Interleaved timing: every rival once per round, medians and quartiles over rounds, ratios within them.

A machine that slows down for a while slows all rivals of that round alike, so a ratio of two rivals is taken
within each round and its median reported. Results come first: require_right() raises while one is wrong. On
a GPU every turn starts with a flushed L2 cache and is timed with events.
"""

import importlib.metadata
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lorakernels import kernel_choices

# Rivals with several phases (forward, backward) are also timed as a whole, under this name.
WHOLE = "both"
ONLY = "step"
FLUSH_BYTES = 256 * 2**20
# Timed beside the rivals, but less work than theirs: limits.
LIMITS = (
    "frozen linear",
    "frozen linear, torch's",
    "its bytes, written and synced",
    "slices without boundaries",
    "square product",
    "copy",
)

Step = Callable[[], object] | Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one rival over the rounds, and its ratio to the floor's of the same round."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    ratio: float
    ratio_quartiles: tuple[float, float]


def require_right(failures: Mapping[str, list[str]]) -> None:
    """Raise an AssertionError that lists, by rival, what is wrong with its results, if anything is."""
    wrong = {name: lines for name, lines in failures.items() if lines}
    assert not wrong, f"no speed is printed while results are wrong: {wrong}"


def compare(
    benchmark,
    rivals: Mapping[str, Step],
    *,
    floor: str,
    rounds: int,
    title: str,
    warmup: int = 2,
    device: str = "cpu",
    before_turn: Callable[[], object] | None = None,
    with_host: bool = False,
    **extra: object,
) -> dict[str, dict[str, Timing]]:
    """Time every rival in turn, each round starting with another one; print, and keep in extra_info.

    A rival is a function, or its phases in order. before_turn is called, untimed, before each rival's.
    with_host also keeps, as host_ms, the median milliseconds after which each phase's call has returned: on
    a GPU, how long the host takes to launch it. pytest-benchmark's own figures are those of whole rounds.
    extra joins extra_info. Returns the timings by phase and rival.
    """
    steps = {name: {ONLY: step} if callable(step) else dict(step) for name, step in rivals.items()}
    names = list(steps)
    taken: list[dict[str, dict[str, float]]] = []
    on_host: list[dict[str, dict[str, float]]] = []
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None

    def turn() -> None:
        first = len(taken) % len(names)
        taken.append({})
        on_host.append({})
        for name in names[first:] + names[:first]:
            if before_turn is not None:
                before_turn()
            if flushed is not None:
                flushed.zero_()
            taken[-1][name], on_host[-1][name] = _time(steps[name], device)

    benchmark.pedantic(turn, rounds=rounds, warmup_rounds=warmup)
    first_counted = min(warmup, len(taken) - 1)
    counted = taken[first_counted:]
    samples = {
        phase: {name: [one[name][phase] for one in counted] for name in names} for phase in counted[0][floor]
    }
    if with_host:
        extra["host_ms"] = {
            phase: {
                name: round(statistics.median(one[name][phase] for one in on_host[first_counted:]), 4)
                for name in names
            }
            for phase in samples
        }
    return record(benchmark, samples, floor=floor, title=title, device=device, **extra)


def record(
    benchmark,
    samples: Mapping[str, Mapping[str, list[float]]],
    *,
    floor: str,
    title: str,
    device: str = "cpu",
    **extra: object,
) -> dict[str, dict[str, Timing]]:
    """Print milliseconds by phase and rival, and keep them with the environment in extra_info."""
    phases = {
        phase: {name: _timing(own, by_rival[floor]) for name, own in by_rival.items()}
        for phase, by_rival in samples.items()
    }
    for phase, timings in phases.items():
        print(f"\n{table(title if phase == ONLY else f'{title}, {phase}', timings, floor)}", end="")
    print()
    stored = {
        phase: {name: _rounded(asdict(one)) for name, one in timings.items()}
        for phase, timings in phases.items()
    }
    chosen = {problem: choice["winner"] for problem, choice in kernel_choices().items()}
    benchmark.extra_info.update(
        environment=environment(device), title=title, floor=floor, phases=stored, choices=chosen, **extra
    )
    return phases


def table(title: str, timings: Mapping[str, Timing], floor: str) -> str:
    """One line per rival: median, quartiles, ratio to the floor with its quartiles."""
    lines = [f"{title}; ratios to {floor}, medians of rounds [quartiles]"]
    for name, timing in timings.items():
        low, high = timing.quartiles_ms
        ratio_low, ratio_high = timing.ratio_quartiles
        lines.append(
            f"  {name:34} {timing.median_ms:9.2f} ms [{low:9.2f} {high:9.2f}]"
            f"   {timing.ratio:6.3f} [{ratio_low:.3f} {ratio_high:.3f}]"
        )
    return "\n".join(lines)


def environment(device: str = "cpu") -> dict[str, str | int | float]:
    """What a figure was measured on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count() or 0,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{rival: importlib.metadata.version(rival) for rival in ("transformers", "peft", "loralib")},
    }


def whole(case: Mapping) -> dict[str, dict]:
    """Stored timings by rival, of all phases together."""
    return case["phases"].get(WHOLE) or case["phases"][ONLY]


def is_ours(name: str) -> bool:
    """Whether a rival is this project's."""
    return name.startswith(("lorakernels", "bloomft"))


def is_limit(name: str) -> bool:
    """Whether it does only a part of the work, which bounds the rivals; it is not one of them."""
    return name in LIMITS or name.endswith("products alone")


def limit_ms(timings: Mapping[str, dict]) -> float:
    """Milliseconds of the limit: all matrix products together, or the fastest of others; 0 if not timed."""
    products = [one["median_ms"] for name, one in timings.items() if name.endswith("products alone")]
    others = [one["median_ms"] for name, one in timings.items() if name in LIMITS]
    return sum(products) or min(others, default=0.0)


def rivals(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name without the limits', this project's among them."""
    return {name: value for name, value in values.items() if not is_limit(name)}


def ahead(values: Mapping[str, float]) -> list[str]:
    """Other projects' rivals with a smaller value than this project's first one."""
    own = next((value for name, value in values.items() if is_ours(name)), -math.inf)
    return [name for name, value in rivals(values).items() if not is_ours(name) and value < own]


def medians(timings: Mapping[str, dict]) -> dict[str, float]:
    """Milliseconds by rival, of stored timings."""
    return {name: one["median_ms"] for name, one in timings.items()}


def processor() -> str:
    """The processor's name as the system reports it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _time(
    phases: Mapping[str, Callable[[], object]], device: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of each phase and, where there are several, of the whole: until done, until returned."""
    marks, returned = [_now(device)], [time.perf_counter()]
    for function in phases.values():
        function()
        marks.append(_now(device))
        returned.append(time.perf_counter())
    host = [1e3 * (end - start) for start, end in itertools.pairwise(returned)]
    if device == "cuda":
        torch.cuda.synchronize()
        laps = [start.elapsed_time(end) for start, end in itertools.pairwise(marks)]
    else:
        laps = [1e3 * (end - start) for start, end in itertools.pairwise(marks)]
    return _with_whole(phases, laps), _with_whole(phases, host)


def _with_whole(phases: Mapping[str, object], laps: list[float]) -> dict[str, float]:
    milliseconds = dict(zip(phases, laps, strict=True))
    return milliseconds if len(phases) == 1 else {**milliseconds, WHOLE: sum(laps)}


def _now(device: str):
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _timing(samples: list[float], floor: list[float]) -> Timing:
    ratios = [own / other for own, other in zip(samples, floor, strict=True)]
    return Timing(
        statistics.median(samples), _quartiles(samples), statistics.median(ratios), _quartiles(ratios)
    )


def _quartiles(samples: list[float]) -> tuple[float, float]:
    if len(samples) == 1:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def _rounded(value):
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, tuple) else round(value, 4)
