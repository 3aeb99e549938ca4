"""The whole training step, forward and backward, against PEFT: BLOOM-560m's shape, 1 x 1024 tokens.

Each rival has a separate process, since settings and memory are per process; the steps are taken in turn,
medians reported. Every loss and adapter gradient is compared with float64 before a time is
printed, by what the dtype costs at best (baselines/rounded_model.py). ``--full`` takes all 24
layers (12 for the ablation) and every case, each turn in a fresh process after one untimed step, since not
all fit in memory together; otherwise there are 4 layers.

    python -m pytest benchmarks/test_bench_step.py --benchmark-only -s [--full]
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks import process_memory
from benchmarks.baselines.bloom_step import (
    RIVALS,
    Shape,
    attention_products,
    exact_results,
    gemms,
    scratch_folder,
    smaller,
    total_flops,
    write_weights,
)
from benchmarks.baselines.rounded_model import gradient_bound, loss_bound
from benchmarks.interleave import ONLY, Timing, record, require_right
from benchmarks.step_processes import ATTENTION, FLOORS, GEMMS, RivalProcess
from lorakernels.tolerance import relative_error

THREADS = 2
INSTALLED, SETTINGS, OURS = "PEFT as installed", "PEFT, same thread and memory settings", "bloomft"
DEFAULT, FULL = "fp32", pytest.mark.full
NARROW = "PEFT, same settings, bf16 adapters"
PEFTS = (INSTALLED, SETTINGS, NARROW)
LADDER = [name for name in RIVALS if name not in (INSTALLED, NARROW)]


@dataclass(frozen=True)
class Case:
    """A shape and its rivals."""

    shape: Shape
    rivals: tuple[str, ...] = (INSTALLED, SETTINGS, OURS, *FLOORS)


CASES = {
    "fp32": Case(Shape()),
    "fp32, half masked": Case(Shape(masked=512)),
    "bf16": Case(Shape(dtype="bfloat16"), (INSTALLED, SETTINGS, NARROW, OURS)),
    # Half the layers, for the time it takes.
    "ablation": Case(Shape(layers=12), tuple(LADDER)),
}


@pytest.mark.timeout(3600)
@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name == DEFAULT else FULL) for name in CASES]
)
def test_step(case, full, benchmark):
    settings = CASES[case]
    shape = settings.shape if full else smaller(settings.shape, layers=4)
    with scratch_folder() as folder:
        weights = write_weights(shape, Path(folder))
        exact, rounded = (
            process_memory.in_fresh_process(exact_results, shape, weights, THREADS, is_rounded)
            for is_rounded in (False, True)
        )
        require = functools.partial(_require_right, exact=exact, rounded=rounded, shape=shape)
        rivals = {name: RivalProcess(name, shape, weights, THREADS) for name in settings.rivals}
        try:
            turns = functools.partial(_take_turns, rivals, require, rounds=3, keep=not full)
            milliseconds, memory, errors = benchmark.pedantic(turns, rounds=1)
        finally:
            for rival in rivals.values():
                rival.close()
    floor = GEMMS if GEMMS in rivals else settings.rivals[0]
    timings = record(
        benchmark,
        {ONLY: milliseconds},
        floor=floor,
        title=f"{case}: BLOOM-560m's shape, {shape.layers} layers, 1 x {shape.tokens} tokens, "
        f"{THREADS} threads",
        case={"layers": shape.layers, "tokens": shape.tokens, "masked": shape.masked, "dtype": shape.dtype},
        memory=memory,
        errors=errors,
        flops=_flops(shape) if GEMMS in rivals else {},
    )[ONLY]
    print(_ratios(timings, memory, shape))


def _take_turns(
    rivals: dict[str, RivalProcess], require: Callable[[dict], dict[str, float]], rounds: int, keep: bool
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, float]]:
    """Milliseconds of each turn, peak memory, worst errors; one process at a time without keep."""
    milliseconds = {name: [] for name in rivals}
    memory, results, errors = dict.fromkeys(rivals, 0), {}, {}
    for turn in range(rounds):
        names = list(rivals)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken, peak = rivals[name].step()
            milliseconds[name].append(1e3 * taken)
            memory[name] = max(memory[name], peak)
            if turn == 0 and name not in FLOORS:
                results[name] = rivals[name].results()
            if not keep:
                rivals[name].close()
        errors = errors or require(results)
    return milliseconds, memory, errors


def _require_right(results: dict[str, tuple], exact: tuple, rounded: tuple, shape: Shape) -> dict[str, float]:
    """Raise unless ours are as close to float64 as the dtype allows; returns each rival's worst errors."""
    dtype, widest = getattr(torch, shape.dtype), 4 * shape.hidden_size
    right, once = (list(map(torch.from_numpy, gradients)) for _, gradients in (exact, rounded))
    bounds = [loss_bound(exact[0], rounded[0], dtype, shape.tokens - shape.masked, widest)]
    bounds += [gradient_bound(*pair, dtype, widest) for pair in zip(right, once, strict=True)]
    found = {
        name: [abs(loss - exact[0]) / abs(exact[0])]
        + [
            relative_error(torch.from_numpy(own), expected)
            for own, expected in zip(gradients, right, strict=True)
        ]
        for name, (loss, gradients) in results.items()
    }
    require_right(
        {
            name: [
                f"result {index} of loss and gradients: {error:.2g} above {bound:.2g}"
                for index, (error, bound) in enumerate(zip(errors, bounds, strict=True))
                if not error <= bound
            ]
            for name, errors in found.items()
            if name not in PEFTS
        }
    )
    worst = {f"{name}, loss": errors[0] for name, errors in found.items()}
    return worst | {f"{name}, gradients": max(errors[1:]) for name, errors in found.items()}


def _ratios(timings: dict[str, Timing], memory: dict[str, int], shape: Shape) -> str:
    """Memory of each rival, how ours compares with PEFT, and the share of the products' rate."""
    held = {name: peak / 2**30 for name, peak in memory.items() if name not in FLOORS}
    lines = [f"  {name:20} {peak:5.2f} GiB over the weights" for name, peak in held.items()]
    ours = timings[OURS].median_ms
    for rival in (INSTALLED, SETTINGS):
        if rival in timings:
            faster, leaner = timings[rival].median_ms / ours, memory[rival] / memory[OURS]
            lines.append(f"  bloomft: {faster:.2f} x as fast as {rival}, 1/{leaner:.1f} of its memory")
    if GEMMS in timings:
        flops, needed, taken = _flops(shape), 0.0, 0.0
        for floor in FLOORS:
            needed, taken = needed + flops[floor], taken + timings[floor].median_ms
            lines.append(
                f"  {'' if floor == GEMMS else 'with '}{floor}: {needed / 1e9:.0f} GFLOP at "
                f"{needed / taken / 1e6:.0f} GFLOP/s; bloomft's step runs at {taken / ours:.0%} of that rate"
            )
    return "\n".join(lines)


def _flops(shape: Shape) -> dict[str, float]:
    return {GEMMS: total_flops(gemms(shape)), ATTENTION: total_flops(attention_products(shape))}
