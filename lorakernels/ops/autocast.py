"""What autocast means for every operator here: its arguments are cast on entry, its own products are not.

A public function hands its tensors to `cast_for_autocast`, which casts them as autocast casts those of
torch's own matrix products. The bodies of the operators, forward and backward, are decorated with
`without_autocast`: autocast stays enabled inside an operator, and would round the float32 products there to
16 bits.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P, Result = ParamSpec("P"), TypeVar("Result")


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, cast to autocast's dtype where it is enabled for the first one's device.

    Any shapes; None and tensors that are float64 or not floating stay, as under torch's autocast. The casts
    are differentiable.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
            return tensor
        return tensor.to(dtype)

    return tuple(map(cast, tensors))


def without_autocast(body: Callable[P, Result]) -> Callable[P, Result]:
    """The body of an operator, run with autocast disabled for the device of its first argument, a tensor."""

    @functools.wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return body(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return body(*args, **kwargs)

    return run
