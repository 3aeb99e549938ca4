"""ALiBi attention, forward and backward, at BLOOM-560m's shape: 16 heads, D = 64, T = 1,024, two threads.

Every way gets views of one fused projection and gives its gradient, in turn, in one process, denormals
flushed on all sides; medians. The packed rows hold four documents; the other ways know no documents and
attend to all.

    python -m pytest benchmarks/test_bench_alibi_attention.py -s
"""

import statistics
import time

import pytest
import torch

from benchmarks.baselines import attention as baselines
from lorakernels import alibi_attention, alibi_slopes
from lorakernels.ops.alibi_attention.reference import alibi_attention_reference
from lorakernels.ops.lora_linear.check import error_bound, relative_error

HEADS, WIDTH, LENGTH, THREADS, ROUNDS = 16, 64, 1024, 2, 9
DOCUMENTS = (torch.arange(LENGTH)[None] * 4) // LENGTH
WAYS = {
    "eager (transformers)": baselines.eager,
    "sdpa_with_bias": baselines.sdpa_with_bias,
    "sdpa_with_extra_dimension": baselines.sdpa_with_extra_dimension,
    "sdpa_by_block": baselines.sdpa_by_block,
    "alibi_attention": alibi_attention,
    "alibi_attention, 4 documents": lambda *args: alibi_attention(*args, document_ids=DOCUMENTS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_time(dtype):
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(1, LENGTH, HEADS, 3, WIDTH, generator=generator).to(dtype).requires_grad_()
    incoming = torch.randn(1, LENGTH, HEADS * WIDTH, generator=generator).to(dtype)
    slopes = alibi_slopes(HEADS)
    seconds = {way: [] for way in WAYS}
    results = {}
    for _ in range(ROUNDS):
        for way, function in WAYS.items():
            start = time.perf_counter()
            out = function(*(part.transpose(1, 2) for part in fused.unbind(3)), slopes)
            out = out.transpose(1, 2).flatten(2)
            middle = time.perf_counter()
            (gradient,) = torch.autograd.grad(out, fused, incoming)
            seconds[way].append((middle - start, time.perf_counter() - middle))
            results[way] = out.detach(), gradient
    wide = fused.detach().double().requires_grad_()
    parts = (part.transpose(1, 2) for part in wide.unbind(3))
    out = alibi_attention_reference(*parts, slopes, bias_dtype=dtype).transpose(1, 2).flatten(2)
    exact = out.detach(), *torch.autograd.grad(out, wide, incoming.double())
    for got, plain, right in zip(
        results["alibi_attention"], results["eager (transformers)"], exact, strict=True
    ):
        bound = error_bound(relative_error(plain, right), dtype, right.numel())
        assert relative_error(got, right) <= bound
    totals = {way: statistics.median(map(sum, times)) for way, times in seconds.items()}
    for way, times in seconds.items():
        forward, backward = (1e3 * statistics.median(part) for part in zip(*times, strict=True))
        ratio = totals["eager (transformers)"] / totals[way]
        print(f"\n{dtype} {way}: {forward:.1f} + {backward:.1f} ms, {ratio:.2f} x eager", end="")
    print()
