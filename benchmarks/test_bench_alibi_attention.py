"""ALiBi attention, forward and backward, at BLOOM-560m's shape: 16 heads, D = 64, T = 1,024, two threads.

Every way gets views of one fused projection and gives its gradient, in turn, in one process, denormals
flushed on all sides; medians. The packed rows hold four documents; the other ways know no documents and
attend to all.

    python -m pytest benchmarks/test_bench_alibi_attention.py -s
"""

import functools

import pytest
import torch

from benchmarks import interleave
from benchmarks.baselines import attention as baselines
from lorakernels import alibi_attention, alibi_slopes
from lorakernels.ops.alibi_attention.reference import alibi_attention_reference
from lorakernels.ops.lora_linear.check import error_bound, relative_error

HEADS, WIDTH, LENGTH, THREADS, ROUNDS = 16, 64, 1024, 2, 9
DOCUMENTS = (torch.arange(LENGTH)[None] * 4) // LENGTH
EAGER = "eager (transformers)"
WAYS = {
    EAGER: baselines.eager,
    "sdpa_with_bias": baselines.sdpa_with_bias,
    "sdpa_with_extra_dimension": baselines.sdpa_with_extra_dimension,
    "sdpa_by_block": baselines.sdpa_by_block,
    "alibi_attention": alibi_attention,
    "alibi_attention, 4 documents": lambda *args: alibi_attention(*args, document_ids=DOCUMENTS),
}


def step(function, fused: torch.Tensor, incoming: torch.Tensor, slopes: torch.Tensor) -> list[torch.Tensor]:
    """The result [1, T, hidden] and the gradient of the fused projection."""
    out = function(*(part.transpose(1, 2) for part in fused.unbind(3)), slopes).transpose(1, 2).flatten(2)
    return [out.detach(), *torch.autograd.grad(out, fused, incoming)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_time(benchmark, dtype):
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(1, LENGTH, HEADS, 3, WIDTH, generator=generator).to(dtype).requires_grad_()
    incoming = torch.randn(1, LENGTH, HEADS * WIDTH, generator=generator).to(dtype)
    slopes = alibi_slopes(HEADS)
    steps = {
        way: functools.partial(step, function, fused, incoming, slopes) for way, function in WAYS.items()
    }
    oracle = functools.partial(alibi_attention_reference, bias_dtype=dtype)
    exact = step(oracle, fused.detach().double().requires_grad_(), incoming.double(), slopes)
    wrong = []
    for got, plain, right in zip(steps["alibi_attention"](), steps[EAGER](), exact, strict=True):
        error, bound = (
            relative_error(got, right),
            error_bound(relative_error(plain, right), dtype, right.numel()),
        )
        print(f"\n  relative error {error:.2g}, eager {relative_error(plain, right):.2g}", end="")
        wrong += [f"{error:.2g} above {bound:.2g}"] if error > bound else []
    interleave.require_right({"alibi_attention": wrong})
    timings = interleave.measure(steps, floor=EAGER, rounds=ROUNDS)
    print(f"\n{interleave.table(f'T={LENGTH} heads={HEADS} D={WIDTH} {dtype}', timings, EAGER)}")
    benchmark.extra_info.update(interleave.environment())
    benchmark.extra_info["ratios"] = {name: round(timing.ratio, 4) for name, timing in timings.items()}
    benchmark.pedantic(steps["alibi_attention"], rounds=3)
