"""A stand-in for a GPU that is not there, for Triton to specialise and compile for."""

import torch
from triton.backends.driver import DriverBase

from lorakernels.aot.chips import Chip


class _Utilities:
    def load_binary(self, name, binary, shared, device):
        return object(), None, 0, 0, 1 << 16

    def unload_module(self, module) -> None:
        pass

    def get_device_properties(self, device) -> dict:
        # the limit is checked afterwards, so that a broken one is reported with the rest
        return {"max_shared_mem": 1 << 30}


class StandInDriver(DriverBase):
    """Triton's driver for a GPU of the chip's kind, whose launches do nothing.

    device: Triton loads a kernel once for each device, anything that can be hashed.
    """

    def __init__(self, chip: Chip, device: object = 0) -> None:
        self.chip, self.device, self.utils = chip, device, _Utilities()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self):
        return self.chip.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self):
        raise NotImplementedError("nothing can be timed without a GPU")

    def get_current_device(self) -> object:
        return self.device

    def get_current_stream(self, device) -> int:
        return 0

    def launcher_cls(self, source, metadata):
        return lambda *arguments: None
