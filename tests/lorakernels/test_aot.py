"""The shipped kernels compile for chips that are not there, without a spill and within their limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
FIELDS = {
    "kernel", "role", "arch", "dtype", "tile", "registers", "spill_bytes", "shared_bytes", "shared_limit",
    "blocks_per_sm", "matrix_instructions", "async_copies",
}  # fmt: skip


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # a fresh process: here the kernels may be interpreted
    return subprocess.run(
        [sys.executable, "-m", "lorakernels.aot", *arguments],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=540,
    )  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("aot") / "records.json"
    done = run("--json", str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "least microseconds" in done.stdout
    return json.loads(path.read_text())


@pytest.mark.timeout(560)
def test_every_shipped_tile_compiles_without_a_spill(records):
    assert records
    assert all(set(one) >= FIELDS for one in records)
    assert {one["arch"] for one in records} == {"sm_80", "sm_90", "gfx942"}
    assert all(one["spill_bytes"] == 0 for one in records)
    assert all(one["shared_bytes"] <= one["shared_limit"] for one in records)
    for role in ("forward", "dx", "dx with dropout", "shrink", "adapter_grad dS dB", "adapter_grad dA"):
        assert {one["arch"] for one in records if one["role"] == role} == {"sm_80", "sm_90", "gfx942"}


@pytest.mark.timeout(560)
def test_the_main_loop_has_matrix_instructions_and_async_copies(records):
    for one in records:
        if one["kernel"] == "lora_linear_forward_kernel":
            assert one["matrix_instructions"] > 0, one
            assert one["async_copies"] > 0 or one["arch"] == "gfx942", one


def test_a_spill_is_found(tmp_path):
    # registers capped below need: the same command must then refuse
    source = tmp_path / "sitecustomize.py"
    source.write_text(
        "import os\n"
        "from lorakernels.ops.lora_linear import triton as t\n"
        "t.TILES = {2: (t.Tile(256, 256, 64, 4, 3),), 4: t.TILES[4]}\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    done = run("--arch", "sm_90", "--only", "forward", "--jobs", "1", PYTHONPATH=path, TRITON_INTERPRET="0")
    assert done.returncode == 1
    assert "spills" in done.stderr
