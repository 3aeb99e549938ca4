"""What an item finds: each error with its bound, and a line for each thing that is wrong."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakernels.tolerance import largest_error, relative_error


@dataclass
class Findings:
    """Collected while an item runs; it passes when there is no fault.

    Attributes:
        figures: {result, error, bound} of each comparison with float64.
        notes: further facts for the reader, such as what "auto" chose.
        faults: one line for each thing that is wrong.
        cases: timings by case, each in the form of a benchmark in pytest-benchmark's JSON.
    """

    figures: list[dict[str, str | float]] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    cases: dict[str, dict] = field(default_factory=dict)

    def compare(
        self,
        result: str,
        got: Tensor,
        exact: Tensor,
        dtype: torch.dtype,
        *,
        at_most: float | None = None,
        **rule,
    ) -> None:
        """Compare got, of dtype, with exact in float64, by the rule of `tolerance` or by at_most."""
        if got.dtype != dtype:
            self.faults.append(f"{result}: {got.dtype} instead of {dtype}")
        bound = largest_error(exact, dtype, **rule) if at_most is None else at_most
        self._judge(result, relative_error(got, exact), bound)

    def compare_heads(
        self, result: str, got: Tensor, exact: Tensor, dtype: torch.dtype, **rule: object
    ) -> None:
        """`compare` for every head of got, exact [B, heads, T, D]; the figure kept is the worst head's."""
        heads = Findings()
        for h in range(exact.shape[1]):
            heads.compare(f"{result}, head {h}", got[:, h], exact[:, h], dtype, **rule)
        self.faults += heads.faults
        self.figures.append(max(heads.figures, key=share_of_bound))

    def require(self, condition: bool, fault: str) -> None:
        """Note the fault unless the condition holds."""
        if not condition:
            self.faults.append(fault)

    def _judge(self, result: str, error: float, bound: float) -> None:
        self.figures.append({"result": result, "error": error, "bound": bound})
        self.require(error <= bound, f"{result}: relative error {error:.3g} above the bound {bound:.3g}")


def share_of_bound(figure: dict[str, str | float]) -> float:
    """The error as a share of what is allowed; 0 where there is none."""
    return figure["error"] / figure["bound"] if figure["error"] else 0.0
