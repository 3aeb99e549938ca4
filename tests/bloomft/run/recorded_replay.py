"""What a CUDA graph does, without a GPU: every operator runs again on the tensors of its recording."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Record(TorchDispatchMode):
    """Every operator below autograd that makes or changes a tensor, with its arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, result))
        return result


class RecordedReplay:
    """A `Recorder` for a CPU.

    Like a CUDA graph, a replay runs no Python between the operators: what a recorded function did with
    numbers, random states or tensors that it looked up is as it was. A view is part of the addresses.
    """

    def __init__(self):
        self.recorded = 0

    def warm_up(self, calculate: Callable[[], object]) -> None:
        calculate()

    def record(self, calculate: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        with _Record() as record:
            result = calculate()
        return result, lambda: _replay(record.calls)


@torch.no_grad()
def _replay(calls) -> None:
    for operator, args, kwargs, result in calls:
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        made = _tensors(result)
        if operator._schema.is_mutable:
            operator(*args, **kwargs)
        elif not all(_address(tensor) in given for tensor in made):
            again = _tensors(operator(*args, **kwargs))
            for place, value in zip(made, again, strict=True):
                if _address(place) not in given:
                    place.copy_(value)


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
