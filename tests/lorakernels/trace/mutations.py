"""Prints what `python -m lorakernels.trace --budgets` says of implementations that were changed on purpose.

A JSON list of [status, messages], one for each of CHANGES. A process of its own: elsewhere the kernels may be
interpreted.
"""

import contextlib
import io
import json
import os
from pathlib import Path
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch

from lorakernels.ops.lora_linear.triton import parts, thin
from lorakernels.trace.__main__ import main

KEPT: list[torch.Tensor] = []
BUDGETS = Path(__file__).parents[2] / "budgets.json"
shrink, reduce, one_pass = thin.shrink, parts.reduce, thin.both_thin_gradients


def copied(layout, x, *others, **options):
    """One more copy of x."""
    return shrink(layout, x.clone(), *others, **options)


def waiting(layout, x, *others, **options):
    """The host reads a number off x."""
    if x.amax().item() == 0.0:
        raise ValueError("x: expected something else than zeros")
    return shrink(layout, x, *others, **options)


def without_launch(*arguments, **options):
    """What adds partial sums is left out."""
    with patch.object(parts, "_launch_reduce", lambda *_, **__: None):
        return reduce(*arguments, **options)


def in_more_parts(*arguments):
    """As many launches, and partial sums of dB for more splits."""
    with patch.object(thin, "PASS_PROGRAMS", 16 * thin.PASS_PROGRAMS):
        return one_pass(*arguments)


def keeping(layout, x, *others, **options):
    """A tensor as large as x, neither written nor read, that nothing lets go."""
    KEPT.append(torch.empty_like(x))
    return shrink(layout, x, *others, **options)


CHANGES = (
    (thin, "shrink", shrink),
    (thin, "shrink", copied),
    (thin, "shrink", waiting),
    (parts, "reduce", without_launch),
    (thin, "both_thin_gradients", in_more_parts),
    (thin, "shrink", keeping),
)


def judged(module, name: str, change) -> tuple[int, str]:
    """Exit status and messages for one case with a function of that name replaced."""
    case = ["--case", "r=8 bfloat16, lorakernels:triton", "--budgets", str(BUDGETS)]
    messages = io.StringIO()
    table = contextlib.redirect_stdout(io.StringIO())
    with patch.object(module, name, change), contextlib.redirect_stderr(messages), table:
        status = main(case)
    return status, messages.getvalue()


if __name__ == "__main__":
    print(json.dumps([judged(*change) for change in CHANGES]))
