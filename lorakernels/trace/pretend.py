"""Tensors without data that say they are on a GPU, for the CUDA code to run on where there is none.

They are meta tensors, of which torch's own code below Python knows that they have no data; Python is told
that their device is cuda:0. (torch's fake tensors do not do: autograd's engine asks for the real device.)
A dispatch mode sees every ATen operation, runs the bodies of operators that are written in Python, and
answers what the host reads; Triton's launches are counted in place of being made. All of that holds for one
process and one thread, and rests on private parts of torch.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from lorakernels import dispatch
from lorakernels.aot.chips import CHIPS, Chip
from lorakernels.aot.stand_in import StandInDriver
from lorakernels.ops.alibi_attention import flex
from lorakernels.trace import attention, costs, kernel_costs
from lorakernels.trace.calls import KernelCall
from lorakernels.trace.record import Case, Trace

# bytes of a data centre's GPU: less than any of them has today
MEMORY = 80 * 2**30
CUDA, META, CPU = torch.device("cuda", 0), torch.device("meta"), torch.device("cpu")


def trace_case(case: Case, chip: Chip = CHIPS["sm_90"]) -> Trace:
    """Run a case on tensors without data, for a chip.

    Raises HostSyncError where it waits for the device unasked.
    """
    trace = Trace(case.host_reads)
    backend = case.side.partition(":")[2] if case.side.startswith("lorakernels:") else ""
    with patch.dict(os.environ, {"LORAKERNELS_BACKEND": backend}), cuda_without_gpu(trace, chip):
        case.run(trace)
    return trace


@contextlib.contextmanager
def cuda_without_gpu(trace: Trace, chip: Chip) -> Iterator[None]:
    """Inside, "cuda" means tensors without data, and trace counts what happens to them."""
    truth = _Truth()
    # what implementations ask of a device
    properties = SimpleNamespace(
        name=chip.part,
        major=chip.traits.major,
        shared_memory_per_block_optin=chip.shared_limit,
        multi_processor_count=chip.multiprocessors,
        total_memory=MEMORY,
    )
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "get_device_name", lambda *_: properties.name),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (dispatch, "device_properties", lambda _: properties),
            (torch.cuda, "synchronize", lambda *_: trace.host_read("synchronize", torch.empty(0))),
            (_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: ["cuda", "meta"]),
            (triton.runtime.driver, "_active", StandInDriver(chip)),
            (JITFunction, "run", _counted_launch(trace)),
            # nothing can be timed: the first one that the backend allows
            (dispatch, "choose", lambda problem, candidates, *_, **__: candidates[0]),
            (flex, "flex_attention", attention.stand_in(trace)),
            (flex, "_compiled", lambda **_: flex.masked_attention),
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(truth.hidden())
        stack.enter_context(_Functions(trace, truth))
        stack.enter_context(_Operations(trace, truth))
        yield


class _Truth:
    """A tensor's real device, and whether Python is told of it."""

    def __init__(self) -> None:
        self.told = False

    def has_data(self, tensor: Tensor) -> bool:
        """Whether tensor is really on the CPU."""
        # a function mode would find our property again
        with torch._C.DisableTorchFunction():
            return torch._C.TensorBase.device.__get__(tensor).type != "meta"

    def device(self, tensor: Tensor) -> torch.device:
        """Where Python is told that tensor is."""
        if self.has_data(tensor):
            return CPU
        return META if self.told else CUDA

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, tensors without data say that they are on the GPU, unless `telling`."""
        for name, value in (
            ("device", self.device),
            ("is_cuda", lambda tensor: self.device(tensor) is CUDA),
            ("is_meta", lambda tensor: self.device(tensor) is META),
        ):
            # of Tensor itself, in front of what it inherits
            setattr(Tensor, name, property(value))
        try:
            yield
        finally:
            for name in ("device", "is_cuda", "is_meta"):
                delattr(Tensor, name)

    @contextlib.contextmanager
    def telling(self, told: bool) -> Iterator[None]:
        """Inside, the truth is told or not: torch's own shape functions, written in Python, need it."""
        before, self.told = self.told, told
        try:
            yield
        finally:
            self.told = before


class _Functions(TorchFunctionMode):
    """Calls that would reach CUDA, or the data, before an operation is dispatched."""

    def __init__(self, trace: Trace, truth: _Truth) -> None:
        super().__init__()
        self.trace, self.truth = trace, truth

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {name: _without_data(value) for name, value in (kwargs or {}).items()}
        if func is Tensor.tolist and not self.truth.has_data(args[0]):
            return self.trace.host_read("tolist", args[0])
        if func is Tensor.cpu and not self.truth.has_data(args[0]):
            return self.trace.host_read("to the CPU", args[0])
        if func is Tensor.pin_memory:
            return args[0]  # what is pinned is copied without waiting, which non_blocking says too
        if func in (Tensor.to, Tensor.cuda):
            args = tuple(map(_without_data, args))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            self.trace.wait("copy from the CPU")
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Every operation below autograd."""

    def __init__(self, trace: Trace, truth: _Truth) -> None:
        super().__init__()
        self.trace, self.truth = trace, truth

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {name: _without_data(value) for name, value in (kwargs or {}).items()}
        operator = OPDEFS.get(func._schema.name)
        if operator is not None:
            with self, _Functions(self.trace, self.truth), self.truth.telling(False):
                return operator._init_fn(*args, **kwargs)
        if _is_composite(func):
            # called below autograd they arrive whole, and would hide casts and products
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with self.truth.telling(True):
            return self._plain(func, args, kwargs)

    def _plain(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of an operation that is not made of others, after counting it."""
        name, given = func._schema.name.partition("::")[2], list(costs.tensors_in((args, kwargs)))
        if name == "_local_scalar_dense" and not self.truth.has_data(args[0]):
            return self.trace.host_read("item", args[0])
        if name in ("copy_", "_to_copy"):
            source = given[-1]
            from_cpu, to_cpu = self.truth.has_data(source), self._copies_to_cpu(name, args, kwargs)
            if to_cpu and not from_cpu:
                return self.trace.host_read("to the CPU", source)
            if from_cpu and not to_cpu and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                self.trace.wait("copy from the CPU")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            args = (args[0], self._without_masks(args[1]), *args[2:])
        result = self._result(name, func, args, kwargs)
        made = list(costs.tensors_in(result))
        for tensor in made:
            if not self.truth.has_data(tensor):
                self.trace.memory.see(tensor)
        everything = [*given, *made]
        if not all(map(self.truth.has_data, everything)):
            launch = costs.launch_of(func, args, kwargs, result)
            if launch is not None:
                self.trace.launch(launch)
        return result

    def _copies_to_cpu(self, name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
        if name == "copy_":
            return self.truth.has_data(args[0])
        device = kwargs.get("device")
        return self.truth.has_data(args[0]) if device is None else device == CPU

    def _without_masks(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Indices with numbers in place of masks, which CUDA, too, finds by nonzero first."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype != torch.bool or self.truth.has_data(index):
                found.append(index)
            else:
                with self:
                    found += index.nonzero().unbind(1)
        return found

    def _result(self, name: str, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if name == "_fused_adamw_":
            # it has no shape function, and returns nothing
            return None
        if name == "nonzero" and not self.truth.has_data(args[0]):
            rows = self.trace.host_read("nonzero", args[0])
            return torch.empty(rows, args[0].ndim, dtype=torch.int64, device=META)
        return func(*args, **kwargs)


def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _without_data(value: Any) -> Any:
    """A device that is CUDA's as meta; anything else as it is."""
    if isinstance(value, torch.device):
        return META if value.type == "cuda" else value
    return META if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


def _counted_launch(trace: Trace) -> Callable[..., None]:
    """In place of `JITFunction.run`."""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: value for name, value in kwargs.items() if name in names}
        size = tuple(grid(arguments) if callable(grid) else grid)
        if not all(size):
            raise ValueError(f"{kernel.__name__}: expected a grid without zeros, got {size}")
        launch = kernel_costs.launch_of(kernel.__name__, arguments, (*size, 1, 1)[:3])
        trace.launch(replace(launch, call=KernelCall.of(kernel, arguments | kwargs, size)))

    return run
