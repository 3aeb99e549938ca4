"""Budgets hold what a trace counts: more is refused, and so is less, which asks for a lower budget."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from lorakernels.trace.__main__ import compare

ROOT = Path(__file__).parents[3]
NAME = "lora_linear M=8192 K=2048 N=6144 r=8 bfloat16, lorakernels:triton"
BUDGET = {
    "case": "c", "side": "lorakernels:triton", "pass": "forward",
    "launches": 4, "bytes": 1000, "host_syncs": 0, "peak_bytes": 2000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, []),
        ({"bytes": 1010}, []),
        ({"bytes": 990}, []),
        ({"bytes": 1011}, ["c, lorakernels:triton, forward: 1,011 bytes, above its budget of 1,000"]),
        ({"bytes": 989}, ["c, lorakernels:triton, forward: 989 bytes, lower its budget of 1,000"]),
        ({"launches": 5}, ["c, lorakernels:triton, forward: 5 launches, above its budget of 4"]),
        ({"launches": 3}, ["c, lorakernels:triton, forward: 3 launches, lower its budget of 4"]),
        ({"host_syncs": 1}, ["c, lorakernels:triton, forward: 1 host_syncs, above its budget of 0"]),
        ({"peak_bytes": 2020}, []),
        (
            {"peak_bytes": 2021},
            ["c, lorakernels:triton, forward: 2,021 peak_bytes, above its budget of 2,000"],
        ),
        (
            {"peak_bytes": 1979},
            ["c, lorakernels:triton, forward: 1,979 peak_bytes, lower its budget of 2,000"],
        ),
        (
            {"case": "d"},
            [
                "c, lorakernels:triton, forward: a budget, but no such case",
                "d, lorakernels:triton, forward: no budget",
            ],
        ),
    ],
)
def test_a_count_that_is_not_the_budget_is_named(changed, expected):
    assert compare([{**BUDGET, **changed}], [BUDGET]) == expected


def test_rivals_have_no_budgets():
    assert compare([BUDGET, {**BUDGET, "side": "peft", "launches": 9}], [BUDGET]) == []


def test_one_case_does_not_need_the_others():
    other = {**BUDGET, "case": "d"}
    assert compare([BUDGET], [BUDGET, other], complete=False) == []
    assert compare([BUDGET], [BUDGET, other]) == [
        "d, lorakernels:triton, forward: a budget, but no such case"
    ]


@pytest.mark.parametrize(
    ("option", "expected"),
    [("--case", "--case: nothing has 'nothing' in"), ("--cases", "nothing: No module named 'nothing'")],
)
def test_a_case_that_does_not_exist_is_named_in_one_line(option, expected):
    command = [sys.executable, "-m", "lorakernels.trace", option, "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_changed_implementations_break_their_budgets():
    done = subprocess.run(
        [sys.executable, "-m", "tests.lorakernels.trace.mutations"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    unchanged, copied, waiting, without_launch, in_more_parts, keeping = json.loads(done.stdout)
    assert unchanged == [0, ""]
    assert copied[0] == waiting[0] == without_launch[0] == in_more_parts[0] == keeping[0] == 1
    assert f"{NAME}, forward: 4 launches, above its budget of 3\n" in copied[1]
    assert f"{NAME}: the host waits for the device: item of bfloat16[]\n" in waiting[1]
    assert f"{NAME}, backward: 5 launches, lower its budget of 7\n" in without_launch[1]
    assert f"{NAME}, backward: " in in_more_parts[1]
    assert "launches" not in in_more_parts[1]
    assert "bytes, above its budget of" in in_more_parts[1]
    # the kept tensor is at the peak of both passes, of both families, and is neither launch nor traffic
    assert keeping[1].count(" peak_bytes, above its budget of ") == len(keeping[1].splitlines()) == 4
