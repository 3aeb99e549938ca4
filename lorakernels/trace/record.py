"""What a trace counts: launches on the device, their bytes and FLOPs, memory, and the host's waits."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakernels.trace.memory import LiveMemory

if TYPE_CHECKING:
    from lorakernels.trace.calls import KernelCall


class HostSyncError(RuntimeError):
    """The host waits for the device where the case does not allow it."""


@dataclass(frozen=True)
class Launch:
    """One operation on the device.

    Attributes:
        kind: "aten", "triton" or "flex" (a kernel that torch.compile writes for FlexAttention).
        name: of the operation or kernel.
        tensors: dtypes and shapes, in words.
        read, written: bytes, each tensor once, unless the kernel is known to read one again.
        flops: of matrix products; 0 for everything else.
        wide: whether the products are of float32 or wider.
        call: of a Triton kernel, what it is compiled by.
    """

    kind: str
    name: str
    tensors: str
    read: int
    written: int
    flops: int = 0
    wide: bool = False
    call: "KernelCall | None" = field(default=None, compare=False)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.read + self.written


@dataclass
class Counts:
    """What one pass of a case does.

    peak_bytes: of the memory that tensors hold at once while it runs, those made before it included.
    """

    launches: list[Launch] = field(default_factory=list)
    host_syncs: list[str] = field(default_factory=list)
    peak_bytes: int = 0


# By operation ("nonzero", "item", "tolist", "to the CPU"), what the host finds in a tensor that it reads.
HostReads = Mapping[str, Callable[[Tensor], Any]]


@dataclass(frozen=True)
class Case:
    """One calculation by one side.

    Attributes:
        name: what is calculated, with its sizes and dtype.
        side: who calculates it. "lorakernels:NAME" makes NAME the backend of `lora_linear`.
        run: makes tensors on "cuda" and calculates inside ``with trace.recording("forward")`` and the like.
        host_reads: the waits for the device that the case allows.
    """

    name: str
    side: str
    run: Callable[["Trace"], None]
    host_reads: HostReads = field(default_factory=dict)


class Trace:
    """The passes of a case while it runs; what happens outside `recording` is not counted."""

    def __init__(self, host_reads: HostReads) -> None:
        self.host_reads = host_reads
        self.passes: dict[str, Counts] = {}
        self.memory = LiveMemory()
        self._current: Counts | None = None

    @contextlib.contextmanager
    def recording(self, name: str) -> Iterator[None]:
        """Count what happens inside as the pass of that name."""
        counts = self._current = self.passes.setdefault(name, Counts())
        self.memory.restart()
        try:
            yield
        finally:
            self._current = None
            counts.peak_bytes = max(counts.peak_bytes, self.memory.peak)

    def launch(self, launch: Launch) -> None:
        """Count a launch."""
        if self._current is not None:
            self._current.launches.append(launch)

    def host_read(self, operation: str, tensor: Tensor) -> Any:
        """What the host finds in tensor by an operation that waits for the device.

        Raises HostSyncError where the case does not allow it.
        """
        if operation not in self.host_reads:
            raise HostSyncError(f"the host waits for the device: {operation} of {described(tensor)}")
        self.wait(operation)
        return self.host_reads[operation](tensor)

    def wait(self, operation: str) -> None:
        """Count a wait for the device."""
        if self._current is not None:
            self._current.host_syncs.append(operation)


def described(tensor: Tensor) -> str:
    """bfloat16[8192, 2048], for instance."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def footprint(tensor: Tensor) -> int:
    """Bytes of the distinct elements of tensor: an expanded dimension counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


def is_wide(dtype: torch.dtype) -> bool:
    """Whether products of that dtype run outside the 16-bit matrix units."""
    return dtype.itemsize > 2
