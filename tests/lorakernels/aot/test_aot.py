"""The shipped kernels compile for chips that are not there, without a spill and within their limits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton

from lorakernels.trace import kernel_costs

ROOT = Path(__file__).parents[3]
ARCHS = {"sm_80", "sm_90", "sm_100", "gfx942"}
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
    assert {one["arch"] for one in records} == ARCHS
    assert all(one["spill_bytes"] == 0 for one in records)
    assert all(one["shared_bytes"] <= one["shared_limit"] for one in records)


@pytest.mark.timeout(560)
def test_every_kernel_is_compiled_at_every_rank_and_for_ragged_rows(records):
    assert {one["kernel"] for one in records} == set(kernel_costs.COSTS)

    def compiled(role: str) -> set[tuple[str, str]]:
        return {(one["arch"], one["tile"]) for one in records if one["role"] == role}

    def ranks(*several: int) -> set[tuple[str, str]]:
        return {(arch, f"rank {rank}") for arch in ARCHS for rank in several}

    for role in ("shrink", "adapter_grad over rows", "reduce", "pack", "layer norm and shrink"):
        assert compiled(role) == ranks(8, 16, 64)
        assert compiled(f"{role}, ragged") == ranks(16, 64)
    # larger ranks take two passes over dy
    for role in ("adapter_grad dS dB", "reduce and pack"):
        assert compiled(role) == ranks(8, 16)
        assert compiled(f"{role}, ragged") == ranks(16)
    for role in ("shrink", "adapter_grad over rows", "layer norm and shrink"):
        for shape in ("", ", ragged"):
            assert compiled(f"{role} with dropout{shape}") == ranks(16, 64)
    for role in ("addition and layer norm", "layer norm gradient"):
        for shape in ("", ", ragged"):
            assert compiled(f"{role}{shape}") == {(arch, "row") for arch in ARCHS}
    for role in ("forward", "dx", "dx with dropout"):
        assert {arch for arch, _ in compiled(role)} == ARCHS
        assert compiled(f"{role}, ragged") < compiled(role)
        assert {arch for arch, _ in compiled(f"{role}, ragged")} == ARCHS
    # elsewhere it is the vendor's product
    for shape in ("", ", ragged"):
        assert {arch for arch, _ in compiled(f"dx through GELU{shape}")} == {"sm_90", "sm_100"}
    for role in ("forward", "forward without gradient", "weight gradient"):
        for shape in ("", ", ragged"):
            assert compiled(f"cross entropy {role}{shape}") == {(arch, "row") for arch in ARCHS}


@pytest.mark.timeout(560)
def test_registers_shared_memory_and_matrix_instructions_are_those_of_the_table(records):
    table = Path(__file__).parent / "resources" / f"triton-{triton.__version__}.json"
    if not table.exists():
        pytest.skip(f"Triton {triton.__version__} has no table: python -m lorakernels.aot --json {table}")

    def resources(listed: list[dict]) -> dict[tuple[str, ...], list[tuple[int, ...]]]:
        found: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
        for one in listed:
            counts = (one["registers"], one["shared_bytes"], one["matrix_instructions"])
            found.setdefault((one["arch"], one["kernel"], one["role"], one["tile"]), []).append(counts)
        return {name: sorted(counts) for name, counts in found.items()}

    assert resources(records) == resources(json.loads(table.read_text()))


@pytest.mark.timeout(560)
def test_the_main_loop_has_matrix_instructions_and_async_copies(records):
    for one in records:
        if one["kernel"] in ("lora_linear_tma_kernel", "lora_linear_gemm_kernel"):
            assert one["matrix_instructions"] > 0, one
            assert one["async_copies"] > 0 or one["arch"] == "gfx942", one


def test_a_spill_is_found():
    # a tile whose sums alone overflow the registers must be refused
    script = (
        "import os, sys; os.environ['TRITON_INTERPRET'] = '0'\n"
        "from lorakernels.aot.__main__ import main\n"
        "from lorakernels.ops.lora_linear.triton import tiles\n"
        "tiles.TMA_TILES = tiles.MASKED_TMA_TILES = (tiles.Tile(256, 256, 32, 4, 2),)\n"
        "sys.exit(main(['--arch', 'sm_90', '--only', 'forward', '--jobs', '1']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert "BROKEN sm_90 bf16+fp32 lora_linear_tma_kernel forward tma-256x256x32w4s2: spills" in done.stderr


def test_a_kernel_that_launches_share_is_listed_for_each(tmp_path):
    # dA multiplies x with the parts of dS, two under either dtype of the adapters
    path = tmp_path / "records.json"
    command = [
        sys.executable,
        "-m",
        "lorakernels.aot",
        "--json",
        str(path),
        "--only",
        "adapter_grad over rows",
    ]
    command += ["--arch", "sm_90", "--dtype", "bf16", "bf16+fp32", "--jobs", "1"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=200)
    listed = {"bf16": [], "bf16+fp32": []}
    for one in json.loads(path.read_text()):
        listed[one["dtype"]].append((one["kernel"], one["role"], one["tile"]))
    assert listed["bf16"]
    assert listed["bf16"] == listed["bf16+fp32"]
