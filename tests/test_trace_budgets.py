"""What the operators, a block and the whole step launch and hold on a GPU is what budgets.json says; no GPU.

Where fewer launches, bytes or waits or less memory are needed, the budgets are made anew, by

    python -m lorakernels.trace --cases benchmarks.traced_cases --case lorakernels: --json tests/budgets.json
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "tests" / "budgets.json"
FIELDS = {"case", "side", "pass", "launches", "bytes", "flops", "host_syncs", "peak_bytes", "roofline_us"}


def test_every_case_keeps_its_budget(tmp_path):
    path = tmp_path / "trace.json"
    command = [sys.executable, "-m", "lorakernels.trace", "--cases", "benchmarks.traced_cases"]
    done = subprocess.run(
        [*command, "--budgets", str(BUDGETS), "--json", str(path)],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(map(len, done.stdout.splitlines())) <= 100
    records = json.loads(path.read_text())
    assert all(set(one) == FIELDS for one in records)
    assert {one["side"] for one in records} == {
        "frozen", "addmm", "peft", "peft:bf16",
        "lorakernels:aten", "lorakernels:triton", "lorakernels:triton:vendor",
    }  # fmt: skip
    assert {one["pass"] for one in records} == {"forward", "backward", "step"}
