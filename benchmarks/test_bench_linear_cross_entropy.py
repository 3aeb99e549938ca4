"""The vocabulary loss, forward and backward, against F.cross_entropy on full logits: time, memory, error.

BLOOM-560m's head: V = 250,880, H = 1024, two threads, denormals flushed on both sides. Time: both ways in one
process, in turn, medians. Memory: each way in a process of its own, the peak over what its inputs take.

    python -m pytest benchmarks/test_bench_linear_cross_entropy.py -s
"""

import functools
import multiprocessing

import pytest
import torch

from benchmarks import interleave, process_memory
from benchmarks.baselines.cross_entropy import full_logits, row_chunks
from lorakernels import linear_cross_entropy
from lorakernels.ops.lora_linear.check import relative_error

VOCABULARY, WIDTH, THREADS = 250_880, 1024, 2
WAYS = {"full_logits": full_logits, "row_chunks": row_chunks, "linear_cross_entropy": linear_cross_entropy}
SIZES = [(512, torch.float32), (512, torch.bfloat16), (4096, torch.float32)]
IDS = ["512-fp32", "512-bf16", "4096-fp32"]


def make_problem(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, frozen weight and labels; the logits have a standard deviation of about 3."""
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(VOCABULARY, WIDTH, dtype=dtype)
    for block in weight.split(8192):
        block.copy_(torch.randn(block.shape, generator=generator) * 0.1)
    hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCABULARY, (rows,), generator=generator)


def step(way: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """The loss and the gradient of hidden."""
    loss = WAYS[way](hidden, weight, labels)
    return [loss.detach(), *torch.autograd.grad(loss, hidden)]


def peak_over_inputs(way: str, rows: int, dtype: torch.dtype) -> int:
    """Bytes that one step takes at its peak beyond its inputs; to be called in a fresh process."""
    problem = make_problem(rows, dtype)
    step(way, problem[0][:8].detach().requires_grad_(), problem[1][:512], problem[2][:8] % 512)
    process_memory.reset_peak()
    before = process_memory.resident()
    step(way, *problem)
    return process_memory.peak() - before


@pytest.mark.parametrize(("rows", "dtype"), SIZES, ids=IDS)
def test_time(benchmark, rows, dtype):
    problem = make_problem(rows, dtype)
    steps = {way: functools.partial(step, way, *problem) for way in WAYS}
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    right = steps["full_logits"]()
    errors = map(relative_error, steps["linear_cross_entropy"](), right)
    wrong = [f"{error:.2g} from full_logits" for error in errors if error > tolerance]
    interleave.require_right({"linear_cross_entropy": wrong})
    timings = interleave.measure(steps, floor="full_logits", rounds=5 if rows <= 512 else 3, warmup=0)
    flops = 4 * rows * VOCABULARY * WIDTH
    rate = flops / timings["linear_cross_entropy"].median_ms / 1e6
    print(f"\n{interleave.table(f'{rows} rows {dtype}', timings, 'full_logits')}\n  {rate:.0f} GFLOP/s")
    benchmark.extra_info.update(interleave.environment())
    benchmark.extra_info["ratios"] = {name: round(timing.ratio, 4) for name, timing in timings.items()}
    benchmark.pedantic(steps["linear_cross_entropy"], rounds=1)


@pytest.mark.parametrize(("rows", "dtype"), SIZES, ids=IDS)
def test_memory(rows, dtype):
    peaks = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[way] = pool.apply(peak_over_inputs, (way, rows, dtype))
    for way, peak in peaks.items():
        share = peak / peaks["full_logits"]
        print(f"\n{rows} rows {dtype} {way}: {peak / 2**20:.0f} MiB, {share:.3f} of full_logits", end="")
    print()
    assert peaks["linear_cross_entropy"] < peaks["full_logits"] / 10
