"""`alibi_attention` on CUDA: FlexAttention (Dong et al. 2024, arXiv:2412.05496), bias and mask inside its
kernels.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from lorakernels import dispatch
from lorakernels.dispatch import Implementation
from lorakernels.ops.alibi_attention.mask import BLOCK, AttentionMask, attention_mask
from lorakernels.tolerance import relative_error

# tl.dot takes no fewer columns
LEAST_WIDTH = 16
# Dtypes, widths, one row or several, one block or several, with gradients or without: more kinds of calls
# than torch compiles for by default before it raises.
MOST_COMPILATIONS = 64
# So many shapes are compiled as constants, the first one and those that a second batch has: with sizes that
# vary, kernels were measured to be up to 4.5 times slower.
MOST_CONSTANT = 4
# Options of the forward kernel to choose from; torch's own tiles first.
TILES: dict[str, dict[str, Any]] = {"default": {}, "64x64": {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64}}
# What the choice is checked by: how far, relative to the whole, results of other tiles may be from the first.
AGREEMENT = {torch.float16: 2**-8, torch.bfloat16: 2**-6, torch.float32: 2**-8}

# of this process, by shape: what tells the batch that had it first, and the shapes that are constants
_first_batch: dict[tuple[int, ...], weakref.ref[Tensor]] = {}
_constant: set[tuple[int, ...]] = set()


def attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, mask: AttentionMask) -> Tensor:
    """`alibi_attention` for CUDA tensors, Tq = T; compiles itself where no torch.compile surrounds it."""
    if torch.compiler.is_compiling():
        return masked_attention(query, key, value, slopes, mask)
    # the same tiles in both, so that a shape's results do not depend on which shapes came before it
    compiled, tiles = _compiled(constant=_is_constant(tuple(query.shape), mask)), TILES[_select(query).name]
    return _run(compiled, query, key, value, slopes, mask, tiles)


def _run(compiled: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS):
        return compiled(*arguments)


def _is_constant(shape: tuple[int, ...], mask: AttentionMask) -> bool:
    """Whether the kernels for this shape of query are compiled for it alone; a mask is made once a batch."""
    if shape in _constant:
        return True
    again = _first_batch.setdefault(shape, weakref.ref(mask.starts))() is not mask.starts
    if (again or not _constant) and len(_constant) < MOST_CONSTANT:
        _constant.add(shape)
    return shape in _constant


@functools.cache
def _compiled(*, constant: bool) -> Callable[..., Tensor]:
    # functions of their own: with one cache, either could answer a call that the other was compiled for
    if constant:
        return torch.compile(_of_constant_shape, fullgraph=True, dynamic=False)
    return torch.compile(_of_varying_shape, fullgraph=True)


def _of_constant_shape(*arguments: Any) -> Tensor:
    return masked_attention(*arguments)


def _of_varying_shape(*arguments: Any) -> Tensor:
    return masked_attention(*arguments)


def _select(query: Tensor) -> Implementation:
    """Which of TILES computes calls of query's dtype and width, measured on the first large one."""
    candidates = tuple(Implementation(name, _with_tiles, _with_tiles) for name in TILES)
    batch, heads, length, width = query.shape
    if not query.is_cuda or batch * heads * length**2 * width < dispatch.LARGE["cuda"]:
        return candidates[0]
    device, dtype = dispatch.device_name(query.device), dispatch.dtype_name(query.dtype)
    described = f"alibi_attention on {device}, {dtype}, D={width}"
    return dispatch.choose(described, candidates, functools.partial(_Trial, query))


def _with_tiles(problem: "_Trial", name: str) -> Tensor:
    with torch.no_grad():
        return _run(_compiled(constant=True), *problem.arguments, TILES[name])


class _Trial:
    """A forward pass of random numbers in query's shape, without documents."""

    def __init__(self, query: Tensor) -> None:
        self.device, (batch, heads, length, width) = query.device, query.shape
        generator = torch.Generator(self.device).manual_seed(0)
        # stored as a projection writes them
        parts = torch.randn(
            batch, length, heads, 3, width, generator=generator, device=self.device, dtype=torch.float32
        ).to(query.dtype)
        slopes = torch.linspace(0.01, 0.7, heads, device=self.device)
        mask = attention_mask(None, batch, length, self.device)
        self.arguments = (*(part.transpose(1, 2) for part in parts.unbind(3)), slopes, mask)

    def run(self, implementation: Implementation) -> None:
        implementation.forward(self, implementation.name)

    def failures(self, implementation: Implementation) -> list[str]:
        right, got = (_with_tiles(self, name) for name in (next(iter(TILES)), implementation.name))
        error, allowed = relative_error(got, right), AGREEMENT[got.dtype]
        return [] if error <= allowed else [f"relative error {error:.3g} above {allowed:.3g}"]

    def compile(self, implementation: Implementation) -> None:
        """Nothing: torch.compile compiles these kernels, by processes of its own."""


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    mask: AttentionMask,
    tiles: dict[str, Any] | None = None,
) -> Tensor:
    """FlexAttention with ALiBi's bias, made and added in float32, and the mask's blocks; [B, heads, T, D].

    tiles: FlexAttention's kernel_options; None for its own choice.
    """
    slopes, width = slopes.float(), query.shape[3]

    def add_bias(score, b, h, q, k):
        return score + slopes[h] * (k - q)

    if width < LEAST_WIDTH:
        query, key, value = (_widened(tensor) for tensor in (query, key, value))
    out = flex_attention(
        query,
        key,
        value,
        score_mod=add_bias,
        block_mask=block_mask(mask),
        scale=width**-0.5,
        kernel_options=cast(Any, tiles or None),  # the dict's own type is not public
    )
    if width < LEAST_WIDTH:
        out = out.transpose(1, 2)[..., :width].contiguous().transpose(1, 2)
    return out


def block_mask(mask: AttentionMask) -> BlockMask:
    """The mask as FlexAttention takes it. Raises ValueError for index tensors that its kernels would misread.

    They find a row's blocks at ``row · heads of the mask · stride of the head``: the head's stride must be
    that of a contiguous tensor, although there is one head; with another one every row reads the first
    row's blocks.
    """
    blocks = mask._asdict()
    starts = blocks.pop("starts")
    for tensor in blocks.values():
        if tensor.stride(1) != tensor.stride(2) * tensor.shape[2]:
            raise ValueError(
                "mask: expected index tensors with the second stride of a contiguous tensor, got strides "
                f"{list(tensor.stride())} for shape {list(tensor.shape)}"
            )
    one_for_all = starts.shape[0] == 1

    def allowed(b, h, q, k):
        return (k <= q) & (k >= starts[0 if one_for_all else b, q])

    length = starts.shape[1]
    return BlockMask(seq_lengths=(length, length), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=allowed, **blocks)


def _widened(tensor: Tensor) -> Tensor:
    """tensor [B, heads, T, D] with zeros up to the least width, stored as [B, T, heads, D]."""
    return pad(tensor.transpose(1, 2), (0, LEAST_WIDTH - tensor.shape[3])).transpose(1, 2)
