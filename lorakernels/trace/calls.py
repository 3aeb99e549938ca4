"""A call of a Triton kernel without its tensors: all that Triton specialises and compiles by."""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# what CUDA's and HIP's allocators align to at least, and more than Triton asks for
ALIGNMENT = 256


@dataclass(frozen=True)
class Pointer:
    """A tensor as Triton's specialisation sees it.

    Attributes:
        dtype: of the elements.
        address: bytes past an aligned one.
        storage: bytes of the memory that it is a view of.
    """

    dtype: torch.dtype
    address: int
    storage: int

    def data_ptr(self) -> int:
        """By which Triton learns the alignment."""
        return self.address

    def ptr_range(self) -> int:
        """By which Triton for AMD learns whether offsets fit in 32 bits."""
        return self.storage


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor as Triton's specialisation sees it: the dtype, and the block that is loaded."""

    dtype: torch.dtype
    block: tuple[int, ...]

    def described(self) -> TensorDescriptor:
        """A descriptor with these, of no memory."""
        memory = Pointer(self.dtype, 0, 0)
        return TensorDescriptor(memory, list(self.block), [self.block[1], 1], list(self.block))


@dataclass(frozen=True)
class KernelCall:
    """A call of the kernel that `module` calls `name`; arguments, constants and options by name."""

    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...]
    grid: tuple[int, ...]

    @classmethod
    def of(cls, kernel: JITFunction, arguments: dict[str, Any], grid: tuple[int, ...]) -> "KernelCall":
        """The call of kernel with these arguments, tensors among them."""
        plain = tuple((name, _plain(value)) for name, value in arguments.items())
        return cls(kernel.fn.__module__, kernel.fn.__name__, plain, grid)

    def run(self) -> None:
        """Compile the kernel for Triton's active driver and launch it there."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        arguments = {
            name: value.described() if isinstance(value, Descriptor) else value
            for name, value in self.arguments
        }
        kernel.run(grid=self.grid, warmup=False, **arguments)


def _plain(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        return Descriptor(value.base.dtype, tuple(value.block_shape))
    if not isinstance(value, Tensor):
        return value
    address = int(value.storage_offset()) * value.element_size() % ALIGNMENT
    return Pointer(value.dtype, address, int(value.untyped_storage().nbytes()))
