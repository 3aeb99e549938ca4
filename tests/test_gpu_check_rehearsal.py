"""gpu-check's rehearsal: every item of both halves passes on a CPU, and what is timed is drawn.

One test, since a rehearsal takes long and pytest-xdist would run it once for each process that needs it.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import interleave, report
from benchmarks.gpu_check.items import all_items
from benchmarks.gpu_check.speed import launches
from benchmarks.gpu_check.speed.items import speed_items, warming

ROOT = Path(__file__).parents[1]


def test_every_item_passes_its_rehearsal_and_is_drawn(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--seconds", "560"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    checked, timed = (
        json.loads((tmp_path / name).read_text()) for name in ("correctness.json", "speed.json")
    )
    for content, items in ((checked, all_items()), (timed, speed_items())):
        assert [one["item"] for one in content["items"]] == [one.name for one in items]
        assert {one["status"] for one in content["items"]} == {"pass"}
        assert content["versions"]["torch"] == torch.__version__
        assert f"\n{len(items)} pass\n" in done.stdout
        for one in items:
            assert f"\nPASS    {one.name}  " in done.stdout
    assert {name: one["status"] for name, one in timed["compiled"].items()} == {
        one.name: "pass" for one in warming(speed_items())
    }
    cases = report.read_cases([tmp_path / "speed.json"])
    assert len(cases) == len(speed_items())
    for name, case in cases.items():
        assert interleave.whole(case)
        # beside the rivals there is something of ours
        assert any(map(interleave.is_ours, interleave.whole(case))), name
        assert all("GPU" in reason for reason in case["left_out"].values()), name
    profiled = cases["step[bloom-1b7]"]["kernels"]["bloomft"]
    assert len(profiled) == 1 + launches.MOST_KERNELS
    assert profiled[0]["share"] == 1
    pictures = report.write_report(cases, tmp_path)
    assert {"step.png", "lora_tax.png", "share_of_limit.png"} <= set(pictures)
    text = (tmp_path / "report.md").read_text("utf-8")
    for expected in ("bloomft, by kernel:", "lora_linear_gemm_kernel", "Milliseconds until the host"):
        assert expected in text
    assert "- cuDNN, without ALiBi: cuDNN needs a GPU" in text
