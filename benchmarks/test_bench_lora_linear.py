"""One LoRA linear, forward and backward, over the frozen linear alone; PEFT and others in the same rounds.

    python -m pytest benchmarks/test_bench_lora_linear.py --benchmark-only -s

On a CPU in float32 at M = 1024, with one thread and with all; on a CUDA device in bfloat16 at M = 8192. The
operations alone cost 1 + 1.5·r·(1/K + 1/N) of the frozen layer.
"""

import os

import pytest
import torch

from benchmarks import interleave
from benchmarks.baselines import lora_linear as baselines
from lorakernels import LoRALinear, dispatch
from lorakernels.ops.lora_linear import check

ON_GPU = torch.cuda.is_available()
DEVICE, M, DTYPE = ("cuda", 8192, torch.bfloat16) if ON_GPU else ("cpu", 1024, torch.float32)
ROUNDS = 50 if ON_GPU else 25
THREADS = (1,) if ON_GPU else tuple(sorted({1, min(2, os.cpu_count() or 1)}))
# (K, N, ratio to the frozen layer that this project sets itself on a CPU)
SHAPES = ((1024, 3072, 1.06), (2048, 6144, 1.05))


def lorakernels_linear(problem: check.Problem) -> baselines.Layer:
    """LoRALinear, as a model has it."""
    layer = LoRALinear(problem.weight, problem.bias, problem.lora_a, problem.lora_b, problem.scale)
    return layer, [layer.lora_a, layer.lora_b]


@pytest.mark.parametrize("r", [8, 16])
@pytest.mark.parametrize(("k", "n", "target"), SHAPES, ids=["K1024", "K2048"])
@pytest.mark.parametrize("threads", THREADS)
def test_forward_and_backward(benchmark, threads, k, n, target, r):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weight, bias = (
        torch.randn(n, k, device=DEVICE).div(k**0.5).to(DTYPE),
        torch.randn(n, device=DEVICE).to(DTYPE),
    )
    problem = check.random_problem(M, weight, bias, r, torch.float32)
    layers = {
        "frozen linear": baselines.frozen(problem),
        "lorakernels": lorakernels_linear(problem),
        "plain expression": baselines.plain(problem),
        "addmm in place": baselines.addmm_in_place(problem),
        "PEFT": baselines.peft_linear(problem),
    }
    if torch.float32 != DTYPE:
        layers["PEFT, adapters not upcast"] = baselines.peft_linear(problem, upcast_adapters=False)
    if ON_GPU:
        layers["PEFT compiled"] = baselines.peft_linear(problem, compiled=True)
    steps = {name: step_of(layer, problem) for name, layer in layers.items()}
    wrong = {"lorakernels": check.failures(steps["lorakernels"](), problem)}
    interleave.require_right(wrong)

    timings = interleave.measure(steps, floor="frozen linear", rounds=ROUNDS, device=DEVICE)
    least = 1 + 1.5 * r * (1 / k + 1 / n)
    title = f"M={M} K={k} N={n} r={r} {DTYPE} threads={threads}, operations alone {least:.3f}"
    print(f"\n{interleave.table(title, timings, 'frozen linear')}")
    ratio = timings["lorakernels"].ratio
    if not ON_GPU:
        print(f"  target {target}: {'met' if ratio <= target else 'missed'} with {ratio:.3f}")
    elif dispatch.choices():
        print(dispatch.report())
    benchmark.extra_info.update(interleave.environment(DEVICE))
    benchmark.extra_info["ratios"] = {name: round(timing.ratio, 4) for name, timing in timings.items()}
    benchmark.extra_info["median_ms"] = {name: round(one.median_ms, 3) for name, one in timings.items()}
    benchmark.pedantic(steps["lorakernels"], rounds=3)


def step_of(layer: baselines.Layer, problem: check.Problem):
    """A call that computes y and every gradient: dx and, where there are adapters, dA and dB."""
    function, adapters = layer
    x = problem.x.detach().clone().requires_grad_()

    def step() -> list[torch.Tensor]:
        y = function(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *adapters], problem.dy)]

    return step
