"""Matrix products of frozen 16-bit weights on a CPU, in the precision that this machine multiplies faster.

A CPU without matrix units for bfloat16 multiplies float32 about twice as fast, and casting a block of the
weight costs far less than the difference: the block is cast into a reused buffer that stays in cache. Which
of the two is faster is measured once for each dtype and thread count, by `dispatch`. Both accumulate in
float32.
"""

import functools
from collections.abc import Iterator

import torch

from lorakernels import dispatch
from lorakernels.dispatch import Implementation

__all__ = [
    "frozen_linear",
    "multiply_frozen",
    "multiply_frozen_grad",
    "precision_problem",
    "weight_blocks",
    "widens",
]

BLOCK_BYTES = 16 * 2**20
PROBE_ROWS, PROBE_SIZE = 512, 1024
# float32 is the more precise, so a 16-bit product must win by more than the noise of a busy machine
ADVANTAGE = 1.5


def widens(dtype: torch.dtype) -> bool:
    """Whether products with CPU weights of this dtype are made in float32: a measurement, then remembered.

    16 bits win where they are `ADVANTAGE` times as fast, as with matrix units for bfloat16. False for dtypes
    of more than 16 bits, which are never cast.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    trial = functools.partial(_Trial, dtype)
    return dispatch.choose(precision_problem(dtype), (WIDE, NARROW), trial, 1 / ADVANTAGE) is WIDE


def precision_problem(dtype: torch.dtype) -> str:
    """What `dispatch` remembers the choice for dtype under."""
    device = dispatch.device_name(torch.device("cpu"))
    return f"frozen products on {device}, {dispatch.dtype_name(dtype)} weights"


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
    return (WIDE if widens(weight.dtype) else NARROW).forward(x, weight, bias)


def multiply_frozen_grad(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``dy @ weight``, the gradient of x in `multiply_frozen`: dy [M, N], weight [N, K] -> [M, K]."""
    return (WIDE if widens(weight.dtype) else NARROW).backward(dy, weight)


def _wide(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide_x = x.float()
    out = torch.empty(len(x), len(weight), dtype=x.dtype)
    for start, stop, block in weight_blocks(weight, _block_rows(weight), torch.float32):
        product = wide_x @ block.T
        if bias is not None:
            product += bias[start:stop]
        out[:, start:stop] = product
    return out


def _wide_grad(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    dx = dy.new_zeros(len(dy), weight.shape[1], dtype=torch.float32)
    for start, stop, block in weight_blocks(weight, _block_rows(weight), torch.float32):
        dx.addmm_(dy[:, start:stop].float(), block)
    return dx.to(dy.dtype)


# float32 is the baseline: the more precise of the two
WIDE = Implementation("float32", _wide, _wide_grad)
NARROW = Implementation("16 bits", torch.nn.functional.linear, torch.matmul)


class _Trial:
    """A frozen layer of normal numbers, forward and backward."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.weight = (
            torch.randn(rows, PROBE_SIZE, generator=generator).to(dtype) for rows in (PROBE_ROWS, PROBE_SIZE)
        )

    def run(self, implementation: Implementation) -> tuple[torch.Tensor, torch.Tensor]:
        y = implementation.forward(self.x, self.weight, None)
        return y, implementation.backward(y, self.weight)

    def failures(self, implementation: Implementation) -> list[str]:
        y, dx = self.run(implementation)
        wide = self.weight.double()
        pairs = {"y": (y, self.x.double() @ wide.T), "dx": (dx, y.double() @ wide)}
        # both round a float32 sum once to dtype, by at most eps / 2 of each element
        bound = torch.finfo(self.weight.dtype).eps
        errors = {
            name: float((got.double() - exact).norm() / exact.norm()) for name, (got, exact) in pairs.items()
        }
        return [f"{name}: relative error {error:.3g}" for name, error in errors.items() if not error <= bound]


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
