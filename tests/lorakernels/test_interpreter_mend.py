"""The mend of bfloat16 under the interpreter: casts bit for bit torch's, products those of the values."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(y_ptr + offsets, x.to(y_ptr.dtype.element_ty), mask=offsets < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    grid = i[:, None] * SIZE + i[None, :]
    tl.store(c_ptr + grid, tl.dot(tl.load(a_ptr + grid), tl.load(b_ptr + grid)))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32])
def test_casts_agree_with_torch_to_the_bit(device, target):
    source = torch.float32 if target == torch.bfloat16 else torch.bfloat16
    bits = torch.randint(-(2**31), 2**31 - 1, (5000,), dtype=torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1 + 2**-8, 1 + 3 * 2**-8, 1e-40, 3.4e38])
    x = torch.cat([bits[~bits.isnan()], torch.randn(5000), special]).to(source).to(device)
    y = torch.zeros(x.numel(), dtype=target, device=device)
    cast_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    assert torch.equal(y, x.to(target))


def test_nan_stays_nan(device):
    x = torch.full((4,), float("nan"), device=device)
    y = torch.zeros(4, dtype=torch.bfloat16, device=device)
    cast_kernel[(1,)](x, y, 4, BLOCK=4)
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_multiplies_values(device, dtype):
    a, b = (torch.randn(32, 32, device=device).to(dtype) for _ in range(2))
    c = torch.zeros(32, 32, device=device)
    dot_kernel[(1,)](a, b, c, SIZE=32)
    # on a GPU float32 goes through tf32 unless told otherwise
    tolerance = 2e-3 if dtype == torch.float32 and device == "cuda" else 1e-5
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=tolerance, atol=tolerance)
