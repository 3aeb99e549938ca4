"""The shipped kernels compile for chips that are not there, without a spill and within their limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
FIELDS = {
    "kernel", "role", "arch", "dtype", "tile", "registers", "spill_bytes", "shared_bytes", "shared_limit",
    "blocks_per_sm", "matrix_instructions", "async_copies",
}  # fmt: skip


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("aot") / "records.json"
    # a process of its own: here the kernels may be interpreted
    command = [sys.executable, "-m", "lorakernels.aot", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
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


def test_a_spill_is_found():
    # a tile whose sums alone overflow the registers must be refused
    script = (
        "import os, sys; os.environ['TRITON_INTERPRET'] = '0'\n"
        "from lorakernels.aot.__main__ import main\n"
        "from lorakernels.ops.lora_linear import triton\n"
        "triton.TILES = {2: (triton.Tile(256, 256, 32, 4, 2),)}\n"
        "sys.exit(main(['--arch', 'sm_90', '--only', 'forward', '--jobs', '1']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert "BROKEN sm_90 bf16+fp32 lora_linear_forward_kernel forward 256x256x32w4s2: spills" in done.stderr


def test_a_kernel_that_launches_share_is_listed_for_each(tmp_path):
    # dA multiplies x with dS, in float32 under either dtype of the adapters
    path = tmp_path / "records.json"
    command = [sys.executable, "-m", "lorakernels.aot", "--json", str(path), "--only", "adapter_grad dA"]
    command += ["--arch", "sm_90", "--dtype", "bf16", "bf16+fp32", "--jobs", "1"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=200)
    listed = {"bf16": [], "bf16+fp32": []}
    for one in json.loads(path.read_text()):
        listed[one["dtype"]].append((one["kernel"], one["role"], one["tile"]))
    assert listed["bf16"]
    assert listed["bf16"] == listed["bf16+fp32"]
