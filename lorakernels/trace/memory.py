"""The memory that tensors without data would take on the device, from when their storages begin and end."""

import weakref

from torch import Tensor


class LiveMemory:
    """Bytes of the storages that exist, and the most there were since `restart`.

    What is not seen: temporary tensors and workspaces inside one operation, and what the allocator loses by
    rounding and in pieces.

    Attributes:
        live, peak: in bytes.
    """

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.live

    def see(self, tensor: Tensor) -> None:
        """Count the tensor's storage, once, for as long as anything holds it; again where it was resized."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self._sizes:
            # torch keeps a storage's Python object for as long as the storage exists
            weakref.finalize(storage, self._release, address).atexit = False
        self._add(size - self._sizes.get(address, 0))
        self._sizes[address] = size

    def _release(self, address: int) -> None:
        self._add(-self._sizes.pop(address))

    def _add(self, change: int) -> None:
        self.live += change
        self.peak = max(self.peak, self.live)
