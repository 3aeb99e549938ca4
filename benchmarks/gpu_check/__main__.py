"""The command: ``python -m benchmarks.gpu_check --out DIR [--seconds N] [--rehearse]``.

Exit status 0 when every item ran and passed, 1 otherwise, 2 for a mistake in the arguments.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.pool import Item, Setting, run_items

MOST_WORKERS, REHEARSAL_WORKERS = 12, 2


def check(
    items: Sequence[Item], out: Path, *, device: str, rehearsal: bool, workers: int, seconds: float
) -> int:
    """Run the items, keep out/correctness.json up to date, print a line for each; the exit status."""
    from benchmarks.gpu_check.report import Report, about

    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, items, about(device, rehearsal))
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        setting = Setting(device, rehearsal, Path(scratch))
        run_items(items, setting, workers=workers, seconds=seconds, report=report.add)
    report.print_all()
    return 0 if report.passed() else 1


def main(arguments: Sequence[str]) -> int:
    """Parse the arguments and run every item; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of correctness.json")
    parser.add_argument("--seconds", type=float, default=240.0, help="limit of all items together")
    parser.add_argument("--rehearse", action="store_true", help="every item on the CPU, at small sizes")
    options = parser.parse_args(arguments)
    import torch

    from benchmarks.gpu_check.items import all_items

    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("no CUDA device; --rehearse runs every item on the CPU")
    cores = len(os.sched_getaffinity(0))
    return check(
        all_items(),
        options.out,
        device="cpu" if options.rehearse else "cuda",
        rehearsal=options.rehearse,
        workers=min(REHEARSAL_WORKERS if options.rehearse else MOST_WORKERS, cores),
        seconds=options.seconds,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
