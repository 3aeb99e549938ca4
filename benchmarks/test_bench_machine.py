"""The machine's two limits, which the report's roofline is drawn from: products and copies.

python -m pytest benchmarks/test_bench_machine.py --benchmark-only -s
"""

import pytest
import torch

from benchmarks import interleave
from lorakernels import cpu_gemm
from lorakernels.tolerance import deviations, relative_error

SIZE, COPIED_BYTES = 2048, 256 * 2**20
PRODUCT, COPY = "square product", "copy"


@pytest.mark.benchmark(group="machine")
@pytest.mark.skipif(torch.cuda.is_available(), reason="limits of the CPU")
def test_limits(benchmark):
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    source = torch.randn(COPIED_BYTES // 4)
    multiply, target = cpu_gemm.fastest(a.dtype).backward, torch.empty_like(source)
    got, exact = multiply(a, b), a.double() @ b.double()
    interleave.require_right(
        {PRODUCT: deviations(PRODUCT, got, exact, a.dtype, operands=a.dtype, terms=SIZE)}
    )
    interleave.compare(
        benchmark,
        {PRODUCT: lambda: multiply(a, b), COPY: lambda: target.copy_(source)},
        floor=PRODUCT,
        rounds=15,
        title=f"{SIZE}³ product in float32, copy of {COPIED_BYTES >> 20} MiB",
        errors={PRODUCT: relative_error(got, exact)},
        flops={PRODUCT: 2 * SIZE**3},
        bytes={COPY: 2 * COPIED_BYTES},
    )
