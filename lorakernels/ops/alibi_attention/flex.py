"""`alibi_attention` on CUDA: FlexAttention (Dong et al. 2024, arXiv:2412.05496), bias and mask inside its
kernels.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from lorakernels import dispatch
from lorakernels.dispatch import Implementation
from lorakernels.ops.alibi_attention.mask import BLOCK, AttentionMask, attention_mask
from lorakernels.tolerance import relative_error

Options = dict[str, Any]

# tl.dot takes no fewer columns
LEAST_WIDTH = 16
# Dtypes, widths, options, one row or several, one block or several, with gradients or without: more kinds of
# calls than torch compiles for by default before it raises.
MOST_COMPILATIONS = 64
# So many shapes are compiled as constants, the first one and those that a second batch has: with sizes that
# vary, kernels were measured to be up to 4.5 times slower.
MOST_CONSTANT = 4
# Options of the kernels to choose from, torch's own for the chip first. Tiles have to divide BLOCK. Resources
# in the comments: compiled for sm_90, 16 bits, D = 128, where torch's own forward is a 128x64 tile that takes
# 128 KiB of shared memory, one block a multiprocessor, and its backward spills registers.
FORWARD: dict[str, Options] = {
    "default": {},
    # with torch's stages and warps: 0.227 ms on an H200 where torch's own tiles take 0.330
    "64x64": {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64},
    # 80 KiB: two blocks a multiprocessor, of one warp group each
    "64x64, 2 stages, 4 warps": {
        "fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_stages": 2, "fwd_num_warps": 4,
    },
    # 160 KiB; as many reads of key and value as torch's own, in half as many steps
    "128x128, 2 stages, 8 warps": {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 128, "fwd_num_stages": 2, "fwd_num_warps": 8,
    },
}  # fmt: skip
# M1 and N1 are the tile of dk and dv, M2 and N2 that of dq; N1 has to be a multiple of M1, M2 of N2.
BACKWARD: dict[str, Options] = {
    "default": {},
    # 97 KiB, no spills
    "32x128, 2 stages, 8 warps": {
        "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 128, "bwd_BLOCK_M2": 128, "bwd_BLOCK_N2": 32,
        "bwd_num_stages": 2, "bwd_num_warps": 8,
    },
    # 65 KiB, no spills: two blocks a multiprocessor
    "32x64, 2 stages, 4 warps": {
        "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32,
        "bwd_num_stages": 2, "bwd_num_warps": 4,
    },
}  # fmt: skip
# What the choice is checked by: how far, relative to the whole, results of other options may be from torch's.
AGREEMENT = {torch.float16: 2**-8, torch.bfloat16: 2**-6, torch.float32: 2**-8}

# of this process, by shape: what tells the batch that had it first, and the shapes that are constants
_first_batch: dict[tuple[int, ...], weakref.ref[Tensor]] = {}
_constant: set[tuple[int, ...]] = set()


def attention(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, mask: AttentionMask) -> Tensor:
    """`alibi_attention` for CUDA tensors, Tq = T; compiles itself where no torch.compile surrounds it."""
    trained = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    if torch.compiler.is_compiling():
        return masked_attention(query, key, value, slopes, mask, _known(query, trained))
    # the same options in both, so that a shape's results do not depend on which shapes came before it
    options = choose(query.shape, query.dtype, query.device, trained=trained)
    compiled = _compiled(constant=_is_constant(tuple(query.shape), mask))
    return _run(compiled, query, key, value, slopes, mask, options)


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


@dataclass(frozen=True)
class _Pass:
    """One of the two kernels, whose options are chosen apart: the forward pass's or the backward pass's."""

    name: str
    options: dict[str, Options]

    def problem(self, device: torch.device, dtype: torch.dtype, width: int) -> str:
        """The name of the choice."""
        on, of = dispatch.device_name(device), dispatch.dtype_name(dtype)
        return f"alibi_attention {self.name} on {on}, {of}, D={width}"

    @functools.cached_property
    def candidates(self) -> tuple[Implementation, ...]:
        """One for each name in options."""
        return tuple(Implementation(name, masked_attention, masked_attention) for name in self.options)


_PASSES = _FORWARD_PASS, _BACKWARD_PASS = _Pass("forward", FORWARD), _Pass("backward", BACKWARD)


def choose(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, trained: bool) -> Options:
    """The options for queries [B, heads, T, D] of dtype, by dtype and D; measured on the first large shape.

    trained: with those of the backward pass.
    """
    batch, heads, length, width = shape
    if device.type != "cuda" or batch * heads * length**2 * width < dispatch.LARGE["cuda"]:
        return {}
    chosen: Options = {}
    for one in _PASSES[: 1 + trained]:
        trial = functools.partial(_Trial, shape, dtype, device, one, chosen)
        winner = dispatch.choose(one.problem(device, dtype, width), one.candidates, trial)
        chosen = chosen | one.options[winner.name]
    return chosen


def _known(query: Tensor, trained: bool) -> Options:
    """The same where a compiler traces, which cannot stop to measure: torch's own where nothing is chosen."""
    chosen: Options = {}
    width = operator.index(query.shape[3])  # a constant from here on, as it is for the kernels
    for one in _PASSES[: 1 + trained]:
        chosen = chosen | one.options[_known_name(one.name, query.device, query.dtype, width)]
    return chosen


@torch.compiler.assume_constant_result
def _known_name(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str:
    one = next(one for one in _PASSES if one.name == name)
    winner = dispatch.known(one.problem(device, dtype, width), one.candidates)
    return (winner or one.candidates[0]).name


class _Trial:
    """Attention over random numbers in queries' shape, without documents.

    What is timed is the forward pass, or the whole of forward and backward, whose forward has the options
    `chosen` before and is the same for every candidate.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, measured: _Pass, chosen: Options
    ) -> None:
        batch, heads, length, width = shape
        self.device, self.measured, self.chosen = device, measured, chosen
        self.trained = measured is _BACKWARD_PASS
        generator = torch.Generator(device).manual_seed(0)

        def random(*sizes: int) -> Tensor:
            wide = torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32)
            return wide.to(dtype)

        # stored as a projection writes them
        parts = random(batch, length, heads, 3, width).unbind(3)
        self.parts = [part.transpose(1, 2).requires_grad_(self.trained) for part in parts]
        self.out_gradient = random(batch, length, heads, width).transpose(1, 2)
        slopes = torch.linspace(0.01, 0.7, heads, device=device)
        self.others = slopes, attention_mask(None, batch, length, device)

    def results(self, name: str) -> list[Tensor]:
        """The output [B, heads, T, D], or the gradients of query, key and value."""
        options = self.chosen | self.measured.options[name]
        out = _run(_compiled(constant=True), *self.parts, *self.others, options)
        return [*torch.autograd.grad(out, self.parts, self.out_gradient)] if self.trained else [out]

    def run(self, implementation: Implementation) -> None:
        self.results(implementation.name)

    def failures(self, implementation: Implementation) -> list[str]:
        right, got = (self.results(name) for name in (next(iter(self.measured.options)), implementation.name))
        errors = [relative_error(one, expected) for one, expected in zip(got, right, strict=True)]
        allowed = AGREEMENT[self.out_gradient.dtype]
        return [f"relative error {error:.3g} above {allowed:.3g}" for error in errors if not error <= allowed]

    def compile(self, implementation: Implementation) -> None:
        """Nothing: torch.compile compiles these kernels, in processes of its own, one graph at a time."""


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slopes: Tensor,
    mask: AttentionMask,
    options: Options | None = None,
) -> Tensor:
    """FlexAttention with ALiBi's bias, made and added in float32, and the mask's blocks; [B, heads, T, D].

    options: FlexAttention's kernel_options; None or empty for its own choice.
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
        kernel_options=cast(Any, options or None),  # the dict's own type is not public
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
