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

from lorakernels.ops.lora_linear import triton
from lorakernels.trace.__main__ import main

BUDGETS = Path(__file__).parents[2] / "budgets.json"
shrink, pack, one_pass = triton._shrink, triton._pack, triton._one_pass


def copied(x, *others):
    """One more copy of x."""
    return shrink(x.clone(), *others)


def waiting(x, *others):
    """The host reads a number off x."""
    if x.amax().item() == 0.0:
        raise ValueError("x: expected something else than zeros")
    return shrink(x, *others)


def without_launch(factor, x, rank_contiguous):
    """What packs the factor is left out."""
    with patch.object(triton, "_launch_reduce", lambda *_: None):
        return pack(factor, x, rank_contiguous)


def in_more_parts(dy, factor, s):
    """As many launches, and partial sums of dS for more splits."""
    with patch.object(triton, "PROGRAMS", 16 * triton.PROGRAMS):
        return one_pass(dy, factor, s)


CHANGES = {"_shrink": (shrink, copied, waiting), "_pack": (without_launch,), "_one_pass": (in_more_parts,)}


def judged(name: str, change) -> tuple[int, str]:
    """Exit status and messages for one case with triton's function of that name replaced."""
    case = ["--case", "r=8 bfloat16, lorakernels:triton", "--budgets", str(BUDGETS)]
    messages = io.StringIO()
    table = contextlib.redirect_stdout(io.StringIO())
    with patch.object(triton, name, change), contextlib.redirect_stderr(messages), table:
        status = main(case)
    return status, messages.getvalue()


if __name__ == "__main__":
    print(json.dumps([judged(name, change) for name, changes in CHANGES.items() for change in changes]))
