"""ALiBi attention, forward and backward, at BLOOM-560m's shape: 16 heads, D = 64, T = 1,024.

    python -m pytest benchmarks/test_bench_alibi_attention.py --benchmark-only -s

Every implementation gets views of one fused projection and returns its gradient. The packed rows hold four
documents; the other implementations attend to the whole row.
"""

import functools

import pytest
import torch

from benchmarks import interleave, process_memory
from benchmarks.baselines import attention as baselines
from bloomft.process import setup_process
from lorakernels import alibi_attention, alibi_slopes
from lorakernels.dispatch import dtype_name
from lorakernels.ops.alibi_attention.reference import alibi_attention_reference
from lorakernels.tolerance import deviations, relative_error

HEADS, WIDTH, LENGTH, ROUNDS = 16, 64, 1024, 9
DOCUMENTS = (torch.arange(LENGTH)[None] * 4) // LENGTH
ROUNDINGS = {"out": 2, "gradient": 3}
EAGER, OURS, PACKED = "eager (transformers)", "lorakernels", "lorakernels, 4 documents"
RIVALS = {
    EAGER: baselines.eager,
    "SDPA with a bias": baselines.sdpa_with_bias,
    "SDPA with an extra dimension": baselines.sdpa_with_extra_dimension,
    "SDPA, PyTorch's flash kernel for CPUs": baselines.sdpa_by_block,
    OURS: alibi_attention,
    PACKED: functools.partial(alibi_attention, document_ids=DOCUMENTS),
}


def make_problem(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fused projection, the gradient of the result, and the slopes."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(1, LENGTH, HEADS, 3, WIDTH, generator=generator).to(dtype).requires_grad_()
    incoming = torch.randn(1, LENGTH, HEADS * WIDTH, generator=generator).to(dtype)
    return fused, incoming, alibi_slopes(HEADS)


def step(function, fused: torch.Tensor, incoming: torch.Tensor, slopes: torch.Tensor) -> list[torch.Tensor]:
    """The result [1, T, hidden] and the gradient of the fused projection."""
    out = function(*(part.transpose(1, 2) for part in fused.unbind(3)), slopes).transpose(1, 2).flatten(2)
    return [out.detach(), *torch.autograd.grad(out, fused, incoming)]


def peak_over_inputs(rival: str, dtype: torch.dtype) -> int:
    """Bytes that one step takes at its peak beyond its inputs; to be called in a fresh process."""
    setup_process()
    problem = make_problem(dtype)
    return process_memory.peak_over(lambda: step(RIVALS[rival], *problem))


@pytest.mark.benchmark(group="alibi_attention")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_attention(benchmark, dtype):
    fused, incoming, slopes = make_problem(dtype)
    steps = {
        rival: functools.partial(step, function, fused, incoming, slopes)
        for rival, function in RIVALS.items()
    }
    wide = fused.detach().double().requires_grad_()
    exact = step(alibi_attention_reference, wide, incoming.double(), slopes)
    wrong, errors = [], {}
    for rival in (OURS, EAGER):
        for (name, roundings), got, right in zip(ROUNDINGS.items(), steps[rival](), exact, strict=True):
            errors[f"{rival}, {name}"] = relative_error(got, right)
            if rival == OURS:
                options = {"operands": dtype, "terms": LENGTH + WIDTH, "roundings": roundings}
                wrong += deviations(name, got, right, dtype, **options)
    interleave.require_right({OURS: wrong})
    memory = {
        rival: process_memory.in_fresh_process(peak_over_inputs, rival, dtype) for rival in (EAGER, OURS)
    }
    interleave.compare(
        benchmark,
        steps,
        floor=EAGER,
        rounds=ROUNDS,
        title=f"ALiBi attention, T={LENGTH} heads={HEADS} D={WIDTH} {dtype_name(dtype)}",
        case={"T": LENGTH, "dtype": dtype_name(dtype)},
        errors=errors,
        memory=memory,
    )
