"""Matrix products of frozen 16-bit weights on a CPU, in the precision that this machine multiplies faster.

A CPU without matrix units for bfloat16 multiplies float32 about twice as fast, and casting a block of the
weight costs far less than the difference: the block is cast into a reused buffer that stays in cache. Which
of the two is faster is measured once for each dtype and thread count. Both accumulate in float32.
"""

import time
from collections.abc import Iterator

import torch

__all__ = ["frozen_linear", "multiply_frozen", "multiply_frozen_grad", "weight_blocks", "widens"]

BLOCK_BYTES = 16 * 2**20
PROBE_ROWS, PROBE_SIZE, PROBE_REPEATS = 512, 1024, 3
# float32 is the more precise, so a 16-bit product must win by more than the noise of a busy machine
ADVANTAGE = 1.5
_widens: dict[torch.dtype, bool] = {}


def widens(dtype: torch.dtype) -> bool:
    """Whether products with CPU weights of this dtype are made in float32: a measurement, then remembered.

    The first call for a 16-bit dtype times both ways, in turn, on a 512 x 1024 x 1024 product, three times
    (some 50 ms), and keeps the answer for the life of the process. 16 bits win if their fastest time is 1.5
    times as fast, as with matrix units for bfloat16. False for other dtypes, which are never cast.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    if dtype not in _widens:
        wide, narrow = _times(dtype)
        _widens[dtype] = wide < ADVANTAGE * narrow
    return _widens[dtype]


def _times(dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of the product in float32, cast included, and in dtype."""
    x = torch.ones(PROBE_ROWS, PROBE_SIZE)
    weight = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype)
    block, out, narrow_x = torch.empty(PROBE_SIZE, PROBE_SIZE), torch.empty_like(x), x.to(dtype)
    narrow_out = torch.empty_like(narrow_x)
    wide, narrow = [], []
    for _ in range(PROBE_REPEATS):
        start = time.perf_counter()
        torch.mm(x, block.copy_(weight).T, out=out)
        middle = time.perf_counter()
        torch.mm(narrow_x, weight.T, out=narrow_out)
        wide.append(middle - start)
        narrow.append(time.perf_counter() - middle)
    return min(wide), min(narrow)


def weight_blocks(
    weight: torch.Tensor, rows: int, dtype: torch.dtype
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield ``(start, stop, block)`` for each group of `rows` rows of weight [N, K], cast to dtype.

    Where the dtypes differ, every block is written into one buffer: use it up before taking the next.
    """
    same = weight.dtype == dtype
    shape = (0 if same else min(rows, len(weight)), weight.shape[1])
    buffer = torch.empty(shape, dtype=dtype, device=weight.device)
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows]
        yield start, start + len(block), block if same else buffer[: len(block)].copy_(block)


def _block_rows(weight: torch.Tensor) -> int:
    return max(1, BLOCK_BYTES // (4 * max(1, weight.shape[1])))


def multiply_frozen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ weight.T + bias`` outside autograd: x [M, K], weight [N, K], bias [N] -> [M, N]."""
    if not widens(weight.dtype):
        return torch.nn.functional.linear(x, weight, bias)
    wide_x = x.float()
    out = torch.empty(len(x), len(weight), dtype=x.dtype)
    for start, stop, block in weight_blocks(weight, _block_rows(weight), torch.float32):
        product = wide_x @ block.T
        if bias is not None:
            product += bias[start:stop]
        out[:, start:stop] = product
    return out


def multiply_frozen_grad(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``dy @ weight``, the gradient of x in `multiply_frozen`: dy [M, N], weight [N, K] -> [M, K]."""
    if not widens(weight.dtype):
        return dy @ weight
    dx = dy.new_zeros(len(dy), weight.shape[1], dtype=torch.float32)
    for start, stop, block in weight_blocks(weight, _block_rows(weight), torch.float32):
        dx.addmm_(dy[:, start:stop].float(), block)
    return dx.to(dy.dtype)


@torch.library.custom_op("lorakernels::frozen_linear", mutates_args=(), device_types="cpu")
def _frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return multiply_frozen(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))


@torch.library.custom_op("lorakernels::frozen_linear_backward", mutates_args=(), device_types="cpu")
def _frozen_linear_backward(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return multiply_frozen_grad(dy.flatten(0, -2), weight).view(*dy.shape[:-1], weight.shape[1])


@_frozen_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_frozen_linear_backward.register_fake
def _(dy, weight):
    return dy.new_empty(*dy.shape[:-1], weight.shape[1])


def _save_weight(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _input_gradient(ctx, dy):
    (weight,) = ctx.saved_tensors
    return _frozen_linear_backward(dy, weight), None, None


_frozen_linear.register_autograd(_input_gradient, setup_context=_save_weight)


def _refuse_double_backward(ctx, *_gradients):
    raise RuntimeError("frozen_linear is differentiable once: its backward has no gradient")


_frozen_linear_backward.register_autograd(_refuse_double_backward)


def frozen_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``F.linear`` for a weight that is not trained; saves a reference to the weight and nothing else.

    x [..., K], weight [N, K], bias [N] or None, of one floating dtype; returns [..., N] of that dtype. On a
    CPU that multiplies float32 faster than the weight's 16-bit dtype, casts the weight block by block and
    accumulates in float32. Everywhere else, and under autocast, it is `F.linear`.

    Raises ValueError if weight or bias requires a gradient or the shapes do not fit, TypeError on mixed
    dtypes.
    """
    device = x.device.type
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight: expected [N, K] for x [..., K] {list(x.shape)}, got {list(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.requires_grad:
            raise ValueError(f"{name}: expected a frozen tensor, got one with requires_grad=True")
        if tensor.dtype != x.dtype and not torch.is_autocast_enabled(device):
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {tensor.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape {[len(weight)]}, got {list(bias.shape)}")
    if torch.is_autocast_enabled(device):
        return torch.nn.functional.linear(x, weight, bias)
    if device != "cpu" or x.ndim == 1 or weight.dtype not in (torch.float16, torch.bfloat16):
        return torch.nn.functional.linear(x, weight, bias)
    return _frozen_linear(x, weight, bias)
