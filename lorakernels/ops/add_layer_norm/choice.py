"""The choice for an operator with a layer norm, which has one kernel beside torch's operations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakernels import dispatch
from lorakernels.dispatch import Implementation, Trial
from lorakernels.installed import has_triton
from lorakernels.ops.lora_linear.implementations import check_triton

# Of x for a measurement on a GPU: they are read and written in 2 us at 4.26 TB/s, less than a launch takes.
LEAST_ELEMENTS = 2**21


@dataclass(frozen=True)
class Implementations:
    """What may compute an operator of x [M, K]: the definition, torch's operations and a kernel."""

    reference: Implementation
    aten: Implementation
    triton: Implementation

    def select(
        self,
        x: Tensor,
        backend: str,
        *,
        fits: bool,
        describe: Callable[[str], str],
        make_trial: Callable[[], Trial],
        least_width: int = 1,
    ) -> Implementation:
        """The implementation of one problem: on a GPU the faster of two, elsewhere torch's operations.

        Args:
            fits: whether the kernel has registers for a problem of that width.
            describe: the name of the problem for `dispatch`, given the backend.
            make_trial: as in `dispatch.choose`.
            least_width: K of which no fewer can be checked.

        Raises:
            ValueError: backend, or the environment variable in its place, asks for Triton where it cannot
                run.
        """
        if backend == "auto":
            backend = dispatch.default_backend()
        # an empty result needs no kernel, and GPU grids cannot be empty
        if x.numel() == 0:
            return self.aten if backend != "reference" else self.reference
        forced = backend != "auto"
        chosen = (self._named(x, backend, fits),) if forced else self._candidates(x, fits)
        # a CPU has nothing to choose from, and a small one takes no longer than its launch
        if x.is_cpu or x.numel() < LEAST_ELEMENTS or x.shape[1] < least_width:
            return chosen[0]
        return dispatch.choose(
            describe(backend), chosen, make_trial, reference=None if forced else self.reference
        )

    def _candidates(self, x: Tensor, fits: bool) -> tuple[Implementation, ...]:
        """What may compute a problem on x's device under backend="auto", the baseline first."""
        fused = x.is_cuda and x.dtype != torch.float64 and fits and has_triton()
        return (self.aten, self.triton) if fused else (self.aten,)

    def _named(self, x: Tensor, backend: str, fits: bool) -> Implementation:
        """The implementation for a backend of the LoRA linear; all but two of them leave it to torch."""
        family = backend.split(":")[0]
        if family != "triton":
            return self.reference if family == "reference" else self.aten
        check_triton(x)
        return self.triton if fits else self.aten
