"""What autocast means for every operator here: its arguments are cast on entry, its own products are not.

A public function hands its tensors to `cast_for_autocast`, which casts them as autocast casts those of
torch's own matrix products. The bodies of the operators, forward and backward, are decorated with
`without_autocast`: autocast stays enabled inside an operator, and would round the float32 products there to
16 bits.
"""

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar, TypeVarTuple, cast

import torch
from torch import Tensor

P = ParamSpec("P")
Result = TypeVar("Result")
Others = TypeVarTuple("Others")


def cast_for_autocast(first: Tensor, *others: *Others) -> tuple[Tensor, *Others]:
    """The tensors, cast to autocast's dtype where it is enabled for the first one's device.

    Any shapes; None and tensors that are float64 or not floating stay, as under torch's autocast. The casts
    are differentiable.
    """
    device = first.device.type
    if not torch.is_autocast_enabled(device):
        return first, *others
    dtype = torch.get_autocast_dtype(device)

    def in_dtype(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    # each stays what it was, a tensor or None, which types cannot say
    tensors = cast(tuple[Tensor | None, ...], (first, *others))
    return cast(tuple[Tensor, *Others], tuple(map(in_dtype, tensors)))


def without_autocast(
    body: Callable[Concatenate[Tensor, P], Result],
) -> Callable[Concatenate[Tensor, P], Result]:
    """The body of an operator, run with autocast disabled for the device of its first argument, a tensor."""

    @functools.wraps(body)
    def run(first: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        device = first.device.type
        if not torch.is_autocast_enabled(device):
            return body(first, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return body(first, *args, **kwargs)

    return run
