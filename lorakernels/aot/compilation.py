"""Compile a launch for an absent chip; read registers and spills off the machine code, the main loop off the
assembly that it was made from."""

import json
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton import knobs

from lorakernels.aot.chips import CHIPS, Chip
from lorakernels.aot.launches import Launch
from lorakernels.aot.stand_in import StandInDriver


@dataclass(frozen=True)
class Record:
    """One compiled kernel. Counts are of instructions in the loop with the most matrix instructions."""

    kernel: str
    role: str
    arch: str
    dtype: str
    tile: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    shared_limit: int = 0
    threads: int = 0
    blocks_per_sm: int = 0
    matrix_instructions: int = 0
    async_copies: int = 0
    error: str = ""

    @property
    def broken(self) -> str:
        """Why this kernel must not ship; empty where it may."""
        if self.error:
            return self.error
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes"
        if self.shared_bytes > self.shared_limit:
            return f"{self.shared_bytes} bytes of shared memory, limit {self.shared_limit}"
        return "" if self.blocks_per_sm else "not one block fits on a multiprocessor"


def compile_launches(work: tuple[str, str, list[Launch]]) -> list[dict]:
    """The records, as dicts, of launches for an arch and a key of DTYPES; an error is a record too."""
    arch, dtype, launches = work
    return [asdict(record) for launch in launches for record in _compile(CHIPS[arch], dtype, launch)]


def _compile(chip: Chip, dtype: str, launch: Launch) -> list[Record]:
    loaded: list[tuple[str, dict[str, str]]] = []

    def collect(module, function, name, metadata_group, hash) -> None:
        loaded.append((name, metadata_group))

    # one device for each launch, so that each is seen to load its own
    triton.runtime.driver.set_active(StandInDriver(chip, (chip.arch, dtype, launch)))
    knobs.runtime.kernel_load_end_hook.add(collect)
    try:
        launch.call.run()
        return [_record(chip, dtype, launch, *kernel) for kernel in loaded]
    except Exception as error:
        text = f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error) else ''}"
        return [Record(launch.call.name, launch.role, chip.arch, dtype, launch.tile, error=text)]
    finally:
        knobs.runtime.kernel_load_end_hook.remove(collect)


def _record(chip: Chip, dtype: str, launch: Launch, name: str, files: dict[str, str]) -> Record:
    metadata = json.loads(Path(files[f"{name}.json"]).read_text())
    threads = metadata["num_warps"] * chip.target.warp_size
    counts = (_nvidia if chip.nvidia else _amd)(name, files)
    return Record(
        kernel=name,
        role=launch.role,
        arch=chip.arch,
        dtype=dtype,
        tile=launch.tile,
        shared_bytes=metadata["shared"],
        shared_limit=chip.shared_limit,
        threads=threads,
        blocks_per_sm=chip.blocks_per_sm(counts["registers"], metadata["shared"], threads),
        registers=counts["registers"],
        spill_bytes=counts["spill_bytes"],
        matrix_instructions=counts["matrix_instructions"],
        async_copies=counts["async_copies"],
    )


def _nvidia(name: str, files: dict[str, str]) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", files[f"{name}.cubin"]]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = _found(r"REG:(\d+) STACK:(\d+)", usage).groups()
    # PTX, of which ptxas makes the machine's one for one unless it unrolls a loop; disassembling is slow
    matrix, copies = _main_loop(
        Path(files[f"{name}.ptx"]).read_text(),
        label=r"(\$L\w+):",
        jump=r"\bbra(?:\.uni)?\s+(\$L\w+)",
        matrix=r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b",
        copy=r"\bcp\.async\.(c[ag]|bulk)\.",
    )
    return {
        "registers": int(registers),
        "spill_bytes": int(stack),
        "matrix_instructions": matrix,
        "async_copies": copies,
    }


def _amd(name: str, files: dict[str, str]) -> dict[str, int]:
    text = Path(files[f"{name}.amdgcn"]).read_text()

    def number(field: str) -> int:
        return int(_found(rf"\.{field}:\s*(\d+)", text)[1])

    matrix, copies = _main_loop(
        text,
        label=r"(\.L\w+):",
        jump=r"s_c?branch\w*\s+(\.L\w+)",
        matrix=r"\bv_s?mfma",
        copy=r"\b(global|buffer)_load_lds|\bbuffer_load\S* .*\blds\b",
    )
    # a scalar register that moves to a vector one costs no memory: only these two do
    spilled = max(4 * 64 * number("vgpr_spill_count"), number("private_segment_fixed_size"))
    return {
        "registers": number("vgpr_count"),
        "spill_bytes": spilled,
        "matrix_instructions": matrix,
        "async_copies": copies,
    }


def _found(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output has nothing like {pattern}")
    return match


def _main_loop(text: str, *, label: str, jump: str, matrix: str, copy: str) -> tuple[int, int]:
    """Matrix instructions and async copies of the shortest loop that has the most of the former."""
    lines = text.splitlines()
    labels = {match[1]: index for index, line in enumerate(lines) if (match := re.match(label, line))}
    counts = []
    for index, line in enumerate(lines):
        back = re.search(jump, line)
        if back and labels.get(back[1], index) < index:
            body = lines[labels[back[1]] : index + 1]
            counts.append((sum(bool(re.search(matrix, one)) for one in body), -len(body), body))
    if not counts:
        return 0, 0
    most, _, body = max(counts, key=lambda item: item[:2])
    return most, sum(bool(re.search(copy, one)) for one in body)
