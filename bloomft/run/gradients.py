"""The gradients of all adapters in one buffer: added to, clipped and zeroed as one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

# A row of the norm's first sum, in elements: one float32 sum over millions would lose digits on a CPU.
ROW = 1024
# Each gradient starts at a multiple of so many elements, where 16-byte loads are aligned.
ALIGNMENT = 4


class FlatGradients:
    """The gradients of ``parameters``, which share a dtype and a device, as views of one tensor.

    They are there from the start, zero, and keep their places, so that a CUDA graph can add to them.

    Attributes:
        buffer: [n], zero between the gradients.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        lengths = [-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in parameters]
        first = parameters[0]
        self.buffer = torch.zeros(-(-sum(lengths) // ROW) * ROW, dtype=first.dtype, device=first.device)
        self._parameters, self._parts = list(parameters), []
        start = 0
        for parameter, length in zip(parameters, lengths, strict=True):
            parameter.grad = self.buffer[start : start + parameter.numel()].view_as(parameter)
            self._parts.append(parameter.grad)
            start += length

    def add(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``, a scalar.

        Raises RuntimeError where there is none for a parameter, as checkpointing can silently cause.
        """
        # not by loss.backward(), which would add one parameter at a time
        new = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        if missing := sum(gradient is None for gradient in new):
            raise RuntimeError(f"no gradient reached {missing} of {len(new)} adapter tensors")
        torch._foreach_add_(self._parts, list(new))

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
