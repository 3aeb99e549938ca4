"""python -m lorakernels.trace [--cases MODULE ...] [--case TEXT] [--launches] [--json FILE] [--budgets FILE]

Counts what forward and backward launch on a GPU, without one, and computes from it the time that the measured
rates of rates.py allow; nothing is timed. One ATen operation counts as one launch. Exits with 1 where a case
waits for the device unasked, or its counts are not those of the budgets.
"""

import argparse
import importlib
import json
import os
import sys
from collections import Counter
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakernels.trace.record import Case, Counts

# by count, the share by which it may differ from its budget
SLACK = {"launches": 0.0, "bytes": 0.01, "host_syncs": 0.0, "peak_bytes": 0.01}
OURS = "lorakernels:"


def main(arguments: list[str] | None = None) -> int:
    """Trace, print the table, write and compare; 1 where a count is not as it must be, 2 without a case."""
    # set before Triton is imported: an interpreted kernel is not launched
    os.environ["TRITON_INTERPRET"] = "0"
    from lorakernels.trace.pretend import trace_case
    from lorakernels.trace.record import HostSyncError

    options = _parse(arguments)
    cases = _cases(options.cases, options.case)
    if not cases:
        print(f"--case: nothing has {options.case!r} in its name and side", file=sys.stderr)
        return 2
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    print(_HEADER)
    shown = ""
    for case in cases:
        if case.name != shown:
            shown = case.name
            print(f"{case.name}")
        try:
            passes = trace_case(case).passes
        except HostSyncError as error:
            failures.append(f"{case.name}, {case.side}: {error}")
            continue
        for name, counts in passes.items():
            records.append(_record(case, name, counts))
            print(_row(case, name, counts))
            if options.launches:
                print("\n".join(_launches(counts)))
    print(_footer())
    if options.json:
        lines = ",\n ".join(map(json.dumps, records))
        with open(options.json, "w") as file:
            file.write(f"[{lines}]\n")
    if options.budgets:
        with open(options.budgets) as file:
            failures += compare(records, json.load(file), complete=not options.case)
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def compare(
    records: list[dict[str, Any]], budgets: list[dict[str, Any]], *, complete: bool = True
) -> list[str]:
    """What is wrong with records, one line each: above a budget, below one, or without one.

    Both are lists in the form of --json; of records this package's own sides alone have budgets. Launches and
    host_syncs are exact, bytes and peak_bytes within 1%. complete: every budget must have its record.
    """
    key = ("case", "side", "pass")
    ours = {tuple(one[part] for part in key): one for one in records if one["side"].startswith(OURS)}
    allowed = {tuple(one[part] for part in key): one for one in budgets}
    wrong = [f"{', '.join(name)}: no budget" for name in ours.keys() - allowed.keys()]
    if complete:
        wrong += [f"{', '.join(name)}: a budget, but no such case" for name in allowed.keys() - ours.keys()]
    for name in ours.keys() & allowed.keys():
        for count, slack in SLACK.items():
            found, budget = ours[name][count], allowed[name][count]
            if abs(found - budget) > slack * budget:
                advice = "above its budget" if found > budget else "lower its budget"
                wrong.append(f"{', '.join(name)}: {found:,} {count}, {advice} of {budget:,}")
    return sorted(wrong)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lorakernels.trace", description="Count the GPU's work without a GPU."
    )
    parser.add_argument(
        "--cases", nargs="+", type=_module, default=[], metavar="MODULE", help="more: modules with cases()"
    )
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases with this in name and side")
    parser.add_argument("--launches", action="store_true", help="list every launch")
    parser.add_argument("--json", metavar="FILE", help="write the records as a JSON list")
    parser.add_argument("--budgets", metavar="FILE", help="compare with such a list")
    return parser.parse_args(arguments)


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from error


def _cases(modules: list[ModuleType], text: str) -> "list[Case]":
    """Those of lorakernels.trace.cases and of modules, the sides of a case together."""
    from lorakernels.trace import cases as operators

    by_name: dict[str, list[Case]] = {}
    for module in (operators, *modules):
        for case in module.cases():
            by_name.setdefault(case.name, []).append(case)
    return [case for group in by_name.values() for case in group if text in f"{case.name}, {case.side}"]


def _record(case: "Case", name: str, counts: "Counts") -> dict[str, Any]:
    from lorakernels.trace.rates import device_seconds

    return {
        "case": case.name,
        "side": case.side,
        "pass": name,
        "launches": len(counts.launches),
        "bytes": sum(one.bytes for one in counts.launches),
        "flops": sum(one.flops for one in counts.launches),
        "host_syncs": len(counts.host_syncs),
        "peak_bytes": counts.peak_bytes,
        "roofline_us": round(1e6 * device_seconds(counts.launches), 1),
    }


_HEADER = (
    f"  {'side':25} {'pass':9} {'launches':>8} {'GB':>8} {'TFLOP':>8} {'syncs':>5} {'peak GiB,':>9} "
    f"{'device us,':>10} {'host us,':>8}\n{'':70} {'computed':>9} {'computed':>10} {'computed':>8}"
)


def _row(case: "Case", name: str, counts: "Counts") -> str:
    from lorakernels.trace.rates import host_seconds

    one = _record(case, name, counts)
    return (
        f"  {case.side:25} {name:9} {one['launches']:8,d} {one['bytes'] / 1e9:8.3f} "
        f"{one['flops'] / 1e12:8.3f} {one['host_syncs']:5d} {one['peak_bytes'] / 2**30:9.3f} "
        f"{one['roofline_us']:10,.1f} {1e6 * host_seconds(counts.launches):8,.0f}"
    )


def _footer() -> str:
    from lorakernels.trace.rates import BYTES_RATE, HOST, MATRIX_RATE

    return (
        f"Computed, not measured: the device at {MATRIX_RATE / 1e12:.0f} TFLOP/s and "
        f"{BYTES_RATE / 1e12:.2f} TB/s, the host at {1e6 * HOST['aten']:.0f} µs an ATen\n"
        f"launch and {1e6 * HOST['triton']:.0f} µs a Triton launch."
    )


def _launches(counts: "Counts") -> list[str]:
    times = Counter(counts.launches)
    lines = [
        f"    {count} x {one.name}: {one.read:,d} bytes read, {one.written:,d} written, {one.flops:,d} FLOP; "
        f"{one.tensors}"
        for one, count in times.items()
    ]
    return lines + [f"    the host waits: {operation}" for operation in counts.host_syncs]


if __name__ == "__main__":
    sys.exit(main())
