"""The loss over BLOOM's vocabulary, with its head frozen."""

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baselines import cross_entropy as baselines
from benchmarks.gpu_check.dense_items import VOCABULARY, exact_loss, judge, make_loss_problem
from benchmarks.gpu_check.findings import Findings
from benchmarks.gpu_check.pool import Item, Setting
from benchmarks.gpu_check.speed.models import HEAD_ROWS
from benchmarks.gpu_check.speed.sides import (
    GRAPH,
    MODES,
    ROWS_GIVEN,
    Case,
    Differentiated,
    Side,
    UnavailableError,
    other_side,
)
from bloomft.batch import IGNORE_INDEX
from lorakernels import dispatch, linear_cross_entropy
from lorakernels.ops.linear_cross_entropy import check

FLOOR, OURS, LIGER = "its products alone", "lorakernels", "Liger"
OTHERS = {
    "transformers, full logits": baselines.full_logits,
    "logits in chunks, computed twice": baselines.row_chunks,
    "Liger's method, re-implemented": baselines.gradient_in_forward,
}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def items() -> list[Item]:
    """Eagerly and as a graph."""
    return [Item(f"loss{suffix}", check_loss, {"mode": mode}, limit=90.0) for mode, suffix in MODES.items()]


def check_loss(findings: Findings, setting: Setting, mode: str) -> None:
    """Every side in bfloat16."""
    rows, width, vocabulary = setting.pick((8192, 2048, VOCABULARY), (24, 32, 4100))
    hidden, weight, labels = make_loss_problem(setting, rows, width, vocabulary, torch.bfloat16)
    share = torch.full((rows,), 1 / rows, device=hidden.device)
    exact = exact_loss(hidden, weight, labels, share)
    exact[0] = exact[0].mean()
    named = list(zip(check.RESULTS, exact, strict=True))[:2]

    def differentiated(loss: Loss) -> Differentiated:
        leaf = hidden.clone().requires_grad_()
        return Differentiated(lambda: loss(leaf, weight, labels), [leaf])

    def make_other(get: Callable[[], Loss]) -> Side:
        return other_side(differentiated(get()), named)

    def make_ours() -> Side:
        rows_with_labels = (labels != IGNORE_INDEX).nonzero()[:, 0] if mode == GRAPH else None
        both = differentiated(lambda *inputs: linear_cross_entropy(*inputs, rows=rows_with_labels))

        def wrong(got: list[Tensor]) -> list[str]:
            found = Findings()
            # the head is frozen
            judge(found, "mean", [*got, None], exact, hidden, weight)
            findings.figures.extend(found.figures)
            return found.faults

        return Side(both.phases(), both.results, named, wrong)

    case = Case(
        f"loss[{rows}-bf16]",
        "linear_cross_entropy",
        f"loss over {rows} rows of {vocabulary} logits, width {width}, {dispatch.dtype_name(hidden.dtype)}"
        f"{ROWS_GIVEN[mode]}",
        FLOOR,
        mode,
        extra={
            "case": {"rows": rows, "dtype": dispatch.dtype_name(hidden.dtype)},
            "rows_given": mode == GRAPH,
            "flops": dict.fromkeys((FLOOR, OURS), 4 * rows * vocabulary * width),
        },
    )
    builders = {
        FLOOR: lambda: Side(products_alone(hidden, weight)),
        OURS: make_ours,
        LIGER: lambda: make_other(lambda: liger(setting.device)),
        **{name: functools.partial(make_other, lambda loss=loss: loss) for name, loss in OTHERS.items()},
    }
    case.measure(findings, setting, builders)


def products_alone(hidden: Tensor, weight: Tensor) -> dict[str, Callable[[], object]]:
    """hidden @ weight.T, then logits @ weight, some rows at a time."""
    logits = [part @ weight.T for part in hidden[:HEAD_ROWS].split(HEAD_ROWS)]

    def forward() -> None:
        for part in hidden.split(HEAD_ROWS):
            part @ weight.T

    def backward() -> None:
        for part in hidden.split(HEAD_ROWS):
            logits[0][: len(part)] @ weight

    return {"forward": forward, "backward": backward}


def liger(device: str) -> Loss:
    """Liger's own kernel; UnavailableError without it, or without a GPU, which it needs."""
    if device != "cuda":
        raise UnavailableError("Liger's kernels need a GPU")
    if importlib.util.find_spec("liger_kernel") is None:
        raise UnavailableError("Liger is not installed")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, labels: loss(weight, hidden, labels)
