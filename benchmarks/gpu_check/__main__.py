"""The command: ``python -m benchmarks.gpu_check --out DIR [--seconds N] [--only HALF] [--rehearse]``.

Exit status 0 when every item ran and passed, 1 otherwise, 2 for a mistake in the arguments.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.pool import Item, Setting, environment, run_items

MOST_WORKERS, REHEARSAL_WORKERS = 12, 2
CORRECTNESS, SPEED = "correctness", "speed"
# What has to be timed alone needs the rest of the seconds.
SHARE_SIDE_BY_SIDE = 4 / 7


def check(
    items: Sequence[Item],
    out: Path,
    *,
    device: str,
    rehearsal: bool,
    workers: int,
    seconds: float,
    timed: Sequence[Item] = (),
) -> int:
    """Run the items side by side, then those that are timed, alone, and print a line for each.

    Both take at most seconds together. What compilers make for the timed ones is made beside the first.
    out/correctness.json and out/speed.json, of what there is, are kept up to date. Returns the exit status.
    """
    from benchmarks.gpu_check.report import Report, about
    from benchmarks.gpu_check.speed.items import warming
    from benchmarks.gpu_check.speed.report import SpeedReport

    end = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    facts = about(device, rehearsal)
    report = Report(out, items, facts) if items else None
    speed_report = SpeedReport(out, timed, facts) if timed else None
    compiling = warming(timed)
    first = {item.name for item in compiling}

    def add(item: Item, outcome: dict) -> None:
        if item.name in first:
            speed_report.add_compiled(item, outcome)
        else:
            report.add(item, outcome)

    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        setting = Setting(device, rehearsal, Path(scratch))
        share = seconds * (SHARE_SIDE_BY_SIDE if timed else 1)
        run_items([*compiling, *items], setting, workers=workers, seconds=share, report=add)
        if speed_report is not None:
            run_items(timed, setting, workers=1, seconds=end - time.monotonic(), report=speed_report.add)
    reports = [one for one in (report, speed_report) if one is not None]
    for one in reports:
        one.print_all()
    return 0 if all(one.passed() for one in reports) else 1


def main(arguments: Sequence[str]) -> int:
    """Parse the arguments and run every item; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of correctness.json and speed.json")
    parser.add_argument("--seconds", type=float, default=420.0, help="limit of all items together")
    parser.add_argument("--only", choices=(CORRECTNESS, SPEED), help="one of the two halves")
    parser.add_argument("--rehearse", action="store_true", help="every item on the CPU, at small sizes")
    options = parser.parse_args(arguments)
    if options.rehearse:
        os.environ |= environment("cpu")
    import torch

    from benchmarks.gpu_check.items import all_items
    from benchmarks.gpu_check.speed.items import speed_items

    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("no CUDA device; --rehearse runs every item on the CPU")
    cores = len(os.sched_getaffinity(0))
    return check(
        all_items() if options.only != SPEED else [],
        options.out,
        device="cpu" if options.rehearse else "cuda",
        rehearsal=options.rehearse,
        workers=min(REHEARSAL_WORKERS if options.rehearse else MOST_WORKERS, cores),
        seconds=options.seconds,
        timed=speed_items() if options.only != CORRECTNESS else [],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
