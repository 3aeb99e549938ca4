"""The gradients of all adapters in one buffer: added to by the backward pass, clipped and zeroed as one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# A row of the norm's first sum, in elements: one float32 sum over millions would lose digits on a CPU.
ROW = 1024
# Each gradient starts at a multiple of so many elements, where 16-byte loads are aligned.
ALIGNMENT = 4


class FlatGradients:
    """The gradients of ``parameters``, which share a dtype and a device, as views of one zeroed tensor.

    A backward pass adds to them in place, so that their memory is the same for the whole run.

    Attributes:
        buffer: [n], zero between the parts.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        lengths = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
        first = parameters[0]
        self.buffer = torch.zeros(-(-sum(lengths) // ROW) * ROW, dtype=first.dtype, device=first.device)
        start = 0
        for parameter, length in zip(parameters, lengths, strict=True):
            parameter.grad = self.buffer[start : start + parameter.numel()].view_as(parameter)
            start += length
        # by identity, since tensors compare by element
        self._missing = {id(parameter) for parameter in parameters}
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda reached: self._missing.discard(id(reached)))
            for parameter in parameters
        ]

    def check_reached(self) -> None:
        """Raise RuntimeError where the first backward pass missed a parameter, as checkpointing can silently
        cause; later calls do nothing."""
        if self._hooks and self._missing:
            raise RuntimeError(
                f"no gradient reached {len(self._missing)} of {len(self._hooks)} adapter tensors"
            )
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def clip(self, largest: float) -> Tensor:
        """Scale to a norm of at most ``largest`` (0: not at all), as `torch.nn.utils.clip_grad_norm_` does.

        Returns the norm before it, a scalar on the device.
        """
        norm = torch.linalg.vector_norm(torch.linalg.vector_norm(self.buffer.view(-1, ROW), dim=1))
        # also without a bound: what is not finite spreads to every gradient, as in torch
        self.buffer.mul_(((largest or math.inf) / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def zero(self) -> None:
        """Start over."""
        self.buffer.zero_()
