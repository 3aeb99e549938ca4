"""The vocabulary loss, forward and backward, against F.cross_entropy on full logits: time, memory, error.

BLOOM-560m's head: V = 250,880, H = 1024, two threads, denormals flushed on both sides. Time: both ways in one
process, in turn, medians. Memory: each way in a process of its own, the peak over what its inputs take.

    python -m pytest benchmarks/test_bench_linear_cross_entropy.py -s
"""

import multiprocessing
import statistics
import time
from pathlib import Path

import pytest
import torch

from benchmarks.baselines.cross_entropy import full_logits, row_chunks
from lorakernels import linear_cross_entropy

VOCABULARY, WIDTH, THREADS = 250_880, 1024, 2
WAYS = {"full_logits": full_logits, "row_chunks": row_chunks, "linear_cross_entropy": linear_cross_entropy}
SIZES = [(512, torch.float32), (512, torch.bfloat16), (4096, torch.float32)]


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


def memory_of(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_over_inputs(way: str, rows: int, dtype: torch.dtype) -> int:
    """Bytes that one step takes at its peak beyond its inputs; to be called in a fresh process."""
    problem = make_problem(rows, dtype)
    step(way, problem[0][:8].detach().requires_grad_(), problem[1][:512], problem[2][:8] % 512)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_of("VmRSS")
    step(way, *problem)
    return memory_of("VmHWM") - before


@pytest.mark.parametrize(("rows", "dtype"), SIZES, ids=["512-fp32", "512-bf16", "4096-fp32"])
def test_time(rows, dtype):
    problem = make_problem(rows, dtype)
    seconds = {way: [] for way in WAYS}
    results = {}
    for _ in range(5 if rows <= 512 else 3):
        for way in WAYS:
            start = time.perf_counter()
            results[way] = step(way, *problem)
            seconds[way].append(time.perf_counter() - start)
    for got, plain in zip(results["linear_cross_entropy"], results["full_logits"], strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert (got.double() - plain.double()).norm() <= tolerance * plain.double().norm()
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    flops = 4 * rows * VOCABULARY * WIDTH
    for way, median in medians.items():
        print(
            f"\n{rows} rows {dtype} {way}: {median:.2f} s, {flops / median / 1e9:.0f} GFLOP/s, "
            f"{medians['full_logits'] / median:.2f} x full_logits",
            end="",
        )
    print()


@pytest.mark.parametrize(("rows", "dtype"), SIZES, ids=["512-fp32", "512-bf16", "4096-fp32"])
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
