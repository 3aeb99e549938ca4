"""python -m lorakernels.aot [--arch sm_80 sm_90 gfx942 ...] [--dtype bf16 ...] [--all] [--json FILE]

Without arguments: the part for continuous integration, the launches of sm_80, sm_90, sm_100 and gfx942 in
bf16 with float32 adapters, at ranks 8, 16 and 64 (with dropout or ragged rows at 64), with the weight by rows
and even widths. Compiled kernels stay in Triton's cache (TRITON_CACHE_DIR), whose key is their source. Exits
with 1 where a kernel does not compile, spills, or breaks a limit of its chip.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from dataclasses import astuple

CI_ARCHS, CI_DTYPES = ("sm_80", "sm_90", "sm_100", "gfx942"), ("bf16+fp32",)


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table of resources and the roofline; 1 where something must not ship, else 0."""
    # set before Triton is imported: an interpreted kernel has nothing to compile
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from lorakernels.aot import roofline
    from lorakernels.aot.chips import CHIPS
    from lorakernels.aot.compilation import Record
    from lorakernels.aot.launches import DTYPES

    options = _parse(arguments, list(CHIPS), list(DTYPES))
    records = []
    for found in _compile_all(options):
        records += [Record(**one) for one in found]
    records = sorted(set(records), key=lambda one: (one.arch, one.dtype, one.kernel, one.role, astuple(one)))
    print(_table(records))
    for arch in options.arch:
        print(f"\n{roofline.table(CHIPS[arch])}")
    if options.json:
        lines = ",\n ".join(json.dumps(vars(one)) for one in records)
        with open(options.json, "w") as file:
            file.write(f"[{lines}]\n")
    broken = [one for one in records if one.broken]
    for one in broken:
        print(
            f"BROKEN {one.arch} {one.dtype} {one.kernel} {one.role} {one.tile}: {one.broken}", file=sys.stderr
        )
    print(f"\n{len(records)} kernels, {len(broken)} broken")
    return 1 if broken else 0


def _parse(arguments: list[str] | None, archs: list[str], dtypes: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lorakernels.aot", description="Compile without a GPU.")
    parser.add_argument("--arch", nargs="+", choices=archs, help=f"targets (default: {' '.join(CI_ARCHS)})")
    parser.add_argument("--dtype", nargs="+", choices=dtypes, help="dtype of x, + that of wider adapters")
    parser.add_argument(
        "--all", action="store_true", help="every target, dtype, width and storage order of the weight"
    )
    parser.add_argument("--only", metavar="ROLE", default="", help="launches whose role begins like that")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--json", metavar="FILE", help="write the records as a JSON list")
    options = parser.parse_args(arguments)
    options.arch = options.arch or (archs if options.all else list(CI_ARCHS))
    options.dtype = options.dtype or (dtypes if options.all else list(CI_DTYPES))
    return options


def _compile_all(options: argparse.Namespace) -> Iterator[list[dict]]:
    from lorakernels.aot.chips import CHIPS
    from lorakernels.aot.compilation import compile_launches
    from lorakernels.aot.launches import Launch, launches

    # together what may compile to the same: the second one is found in Triton's cache
    work: dict[tuple[str, str, str, str], list[Launch]] = {}
    for arch in options.arch:
        for dtype in options.dtype:
            # tf32 is NVIDIA's
            if dtype == "tf32" and not CHIPS[arch].nvidia:
                continue
            for launch in launches(CHIPS[arch], dtype, everything=options.all):
                if launch.role.startswith(options.only):
                    work.setdefault((arch, dtype, launch.call.name, launch.tile), []).append(launch)
    groups = [(arch, dtype, found) for (arch, dtype, *_), found in work.items()]
    if options.jobs <= 1:
        yield from map(compile_launches, groups)
        return
    # spawn: a forked copy of torch's threads may hang
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for done, records in enumerate(pool.imap_unordered(compile_launches, groups), 1):
            if sys.stderr.isatty():
                print(f"\r{done}/{len(groups)} groups of launches", end="", file=sys.stderr, flush=True)
            yield records


def _table(records: list) -> str:
    lines = [
        f"{'arch':7} {'dtype':9} {'kernel':38} {'role':27} {'tile':15} "
        f"{'regs':>4} {'spill':>5} {'shared':>7} {'limit':>7} {'blocks':>6} {'mma':>4} {'copies':>6}"
    ]
    for one in records:
        lines.append(
            f"{one.arch:7} {one.dtype:9} {one.kernel:38} {one.role:27} {one.tile:15} {one.registers:4d} "
            f"{one.spill_bytes:5d} {one.shared_bytes:7d} {one.shared_limit:7d} {one.blocks_per_sm:6d} "
            f"{one.matrix_instructions:4d} {one.async_copies:6d}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
