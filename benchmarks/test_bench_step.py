"""The whole training step, forward and backward, against PEFT: BLOOM-560m's shape, 1 x 1024 tokens.

Each rival lives in a process of its own, since its settings and its memory are the process's; the steps are
taken in turn, medians reported. Every loss and adapter gradient is compared with PEFT's before a time is
printed. ``--full`` takes all 24 layers (12 for the ablation), otherwise there are 4.

    python -m pytest benchmarks/test_bench_step.py -s [--full]
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks.baselines.bloom_step import (
    RIVALS,
    Shape,
    scratch_folder,
    smaller,
    total_flops,
    write_weights,
)
from benchmarks.interleave import environment
from benchmarks.step_processes import GEMMS, RivalProcess

THREADS = 2
INSTALLED, SETTINGS, OURS = "peft as installed", "peft, our settings", "bloomft"
LADDER = [name for name in RIVALS if name != INSTALLED]


@dataclass(frozen=True)
class Case:
    """A shape and who takes part; tolerance of losses, ten times that of gradients."""

    shape: Shape
    rivals: tuple[str, ...] = (INSTALLED, SETTINGS, OURS, GEMMS)
    tolerance: float = 1e-5


CASES = {
    "fp32": Case(Shape()),
    "fp32, half masked": Case(Shape(masked=512)),
    "bf16": Case(Shape(dtype="bfloat16"), (INSTALLED, SETTINGS, OURS), 3e-3),
    # Half the layers: every rival under our settings keeps its memory, and all of them must fit.
    "ablation": Case(Shape(layers=12), tuple(LADDER)),
}


@pytest.mark.parametrize("case", CASES)
def test_step(case, full, benchmark):
    settings = CASES[case]
    shape = settings.shape if full else smaller(settings.shape, layers=4)
    with scratch_folder() as folder:
        weights = write_weights(shape, Path(folder))
        rivals = {name: RivalProcess(name, shape, weights, THREADS) for name in settings.rivals}
        try:
            _warm_up_and_compare(rivals, settings.tolerance)
            seconds, memory = _take_turns(rivals, rounds=3)
        finally:
            for rival in rivals.values():
                rival.close()
    benchmark.extra_info.update(environment(), seconds=seconds, memory=memory, layers=shape.layers)
    benchmark.pedantic(lambda: None, rounds=1)
    print("\n" + _report(case, shape, seconds, memory))


def _warm_up_and_compare(rivals: dict[str, RivalProcess], tolerance: float) -> None:
    results = {}
    for name, rival in rivals.items():
        rival.step()
        if name != GEMMS:
            results[name] = rival.results()
    loss, gradients = next(iter(results.values()))  # PEFT's
    for name, (own_loss, own_gradients) in results.items():
        assert abs(own_loss - loss) <= tolerance * abs(loss), f"{name}: loss {own_loss}, PEFT's {loss}"
        for own, expected in zip(own_gradients, gradients, strict=True):
            error = np.linalg.norm(own.astype("f8") - expected) / np.linalg.norm(expected.astype("f8"))
            assert error <= 10 * tolerance, f"{name}: a gradient is off by {error:.1e}"


def _take_turns(
    rivals: dict[str, RivalProcess], rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    seconds = {name: [] for name in rivals}
    memory = dict.fromkeys(rivals, 0)
    for turn in range(rounds):
        names = list(rivals)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken, peak = rivals[name].step()
            seconds[name].append(taken)
            memory[name] = max(memory[name], peak)
    return seconds, memory


def _report(case: str, shape: Shape, seconds: dict[str, list[float]], memory: dict[str, int]) -> str:
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    lines = [f"{case}: {shape.layers} layers, 1 x {shape.tokens} tokens, {THREADS} threads"]
    for name, median in medians.items():
        line = f"  {name:20} {median:7.2f} s [{min(seconds[name]):.2f} {max(seconds[name]):.2f}]"
        line += f"  {memory[name] / 2**30:5.2f} GiB over the weights"
        for rival in (INSTALLED, SETTINGS):
            if rival in medians and name not in (rival, GEMMS):
                line += f"  {medians[rival] / median:5.2f} x {rival}"
        lines.append(line)
    if GEMMS in medians:
        share = medians[GEMMS] / medians[OURS]
        rate = total_flops(shape) / medians[GEMMS] / 1e9
        lines.append(
            f"  the products alone: {total_flops(shape) / 1e9:.0f} GFLOP at {rate:.0f} GFLOP/s; "
            f"bloomft's step runs at {share:.0%} of that rate"
        )
    return "\n".join(lines)
