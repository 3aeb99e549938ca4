"""python -m benchmarks.report [JSON ...] [--compare OLD.json]: tables and plots of stored benchmarks.

JSON files are those of ``pytest benchmarks --benchmark-only --benchmark-json=FILE``; without one, those of
every machine under benchmarks/results, but for --compare this machine's. If two files hold the same case, the
later one counts. Writes report.md and the plots next to the files, the front page's table and picture, and
the figures of docs/benchmarks.md between their two markers: the given files', or else those of the front
page's CPU. With --compare nothing is written: cases of ours whose ratio got worse beyond the noise are
listed, and the exit status is then 1.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks import front_page, interleave, plots
from benchmarks.front_page import Notes
from benchmarks.interleave import ahead, is_limit, is_ours, limit_ms, medians, rivals, whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
AOT_TABLE = RESULTS / "aot.txt"
HOW = (
    "Medians of interleaved rounds with quartiles; ratios are taken within each round. No figure was kept "
    "of a case before its results had been checked against their reference, unless a note says otherwise."
)
COMPUTED = (
    "Kernels compiled for absent chips, and the least times that their published peaks allow: "
    "`python -m lorakernels.aot`. No GPU was timed."
)
BEGIN, END = "<!-- figures: python -m benchmarks.report -->\n", "<!-- end of figures -->\n"


def main(arguments: Sequence[str]) -> int:
    """Write the report, or compare; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="*", type=Path, help="files of pytest-benchmark")
    parser.add_argument(
        "--compare", type=Path, metavar="OLD", help="an earlier file to compare the ratios with"
    )
    options = parser.parse_args(arguments)
    stored = RESULTS / (machine_folder() if options.compare else front_page.MACHINES["CPU"])
    paths = options.json or sorted(stored.glob("*.json"))
    if not paths:
        parser.error(f"no JSON given, and none under {stored}")
    cases = read_cases(paths)
    if options.compare:
        worse = list(regressions(read_cases([options.compare]), cases))
        print("\n".join(worse) or "no ratio of ours got worse beyond the noise")
        return 1 if worse else 0
    folder = paths[0].parent
    pictures = write_report(cases, folder)
    if not options.json:
        for other in {path.parent for path in RESULTS.glob("*/*.json")} - {folder}:
            write_report(read_cases(sorted(other.glob("*.json"))), other)
    write_front_page()
    PAGE.write_text(with_figures(PAGE.read_text("utf-8"), cases, pictures, folder), encoding="utf-8")
    print(f"{folder / 'report.md'}, {', '.join(pictures)} and the figures of {PAGE} are written")
    return 0


def machine_folder() -> str:
    """The name that results of this machine are kept under."""
    environment = interleave.environment()
    return f"{environment['device']}-{environment['cores']}-cores".replace(" ", "-")


def write_report(cases: dict[str, dict], folder: Path) -> list[str]:
    """Write the plots and report.md of one machine; returns the plots' file names."""
    pictures = plots.draw(cases, folder)
    (folder / "report.md").write_text(report(cases, pictures), encoding="utf-8")
    return pictures


def write_front_page() -> None:
    """Write the table and the picture that compare the machines."""
    gpu, cpu = (read_cases(sorted((RESULTS / name).glob("*.json"))) for name in front_page.MACHINES.values())
    plots.draw_front_page(gpu, cpu, RESULTS / "front-page.png")
    (RESULTS / "front-page.md").write_text(front_page.table(gpu, cpu), encoding="utf-8")


def read_cases(paths: Sequence[Path]) -> dict[str, dict]:
    """extra_info of every stored benchmark, with its group and date, by test id without its file."""
    cases = {}
    for path in paths:
        # gpu_check's correctness.json, which may be in the same folder, has none
        stored = json.loads(path.read_text(encoding="utf-8"))
        for one in stored.get("benchmarks", ()):
            if "phases" in one["extra_info"]:
                date = stored["datetime"][:10]
                cases[one["name"]] = {"group": one["group"], "date": date, **one["extra_info"]}
    return dict(sorted(cases.items(), key=lambda item: (item[1]["group"], item[0])))


def regressions(old: dict[str, dict], new: dict[str, dict]) -> Iterator[str]:
    """One line for each ratio of ours whose lower quartile is above the old one's upper quartile.

    It names the measured choices that differ between the two runs: often the cause.
    """
    for name in old.keys() & new.keys():
        for phase, timings in new[name]["phases"].items():
            for rival, timing in timings.items():
                before = old[name]["phases"].get(phase, {}).get(rival)
                if before is None or not is_ours(rival) or "ratio_quartiles" not in timing:
                    continue
                if timing["ratio_quartiles"][0] > before["ratio_quartiles"][1]:
                    yield (
                        f"{name}, {phase}, {rival}: {timing['ratio']:.3f} of {new[name]['floor']}, "
                        f"was {before['ratio']:.3f} [{before['ratio_quartiles'][0]:.3f} "
                        f"{before['ratio_quartiles'][1]:.3f}]{_other_choices(old[name], new[name])}"
                    )


def _other_choices(old: dict, new: dict) -> str:
    before, now = old.get("choices", {}), new.get("choices", {})
    changed = sorted(problem for problem in before.keys() & now.keys() if before[problem] != now[problem])
    return "".join(f"; {problem}: {now[problem]}, was {before[problem]}" for problem in changed)


def report(cases: dict[str, dict], pictures: Sequence[str]) -> str:
    """Every case, rival and phase; then what was computed, not measured."""
    machines, notes = sorted({_machine(case) for case in cases.values()}), Notes(cases.values())
    lines = ["# Benchmarks", "", HOW, "", *(f"Measured on {machine}." for machine in machines)]
    lines += [*notes.lines(), ""]
    lines += [f"![{Path(name).stem}]({name})" for name in pictures]
    group = None
    for name, case in cases.items():
        if case["group"] != group:
            group = case["group"]
            lines += ["", f"## {group}"]
        lines += [
            "",
            f"### {case['title']}{notes.mark(case)}",
            "",
            f"`{name}`, ratios to {case['floor']}",
            "",
        ]
        lines += [
            "| phase | implementation | ms | ratio | peak memory | limit |",
            "|---|---|---|---|---|---|",
        ]
        for phase, timings in case["phases"].items():
            limit, faster = limit_ms(timings), ahead(medians(timings))
            for rival, timing in rivals(timings).items():
                mark = " (**faster than ours**)" if rival in faster else ""
                lines.append(
                    f"| {phase} | {rival}{mark} | {_spread(timing, '_ms', 2)} | {_spread(timing, '', 3)} | "
                    f"{_memory(case, rival)} | {_limit(limit, 2)} |"
                )
        limits = [
            f"- {phase}, {name}: {_spread(timing, '_ms', 2)} ms {_memory(case, name)}".rstrip()
            for phase, timings in case["phases"].items()
            for name, timing in timings.items()
            if is_limit(name)
        ]
        lines += ["", "Limits, which do a part of the work:", "", *limits] if limits else []
        if "counts" in case:
            number, unit = case["counts"]["number"], case["counts"]["unit"]
            rates = (
                f"{rival} {1e3 * number / timing['median_ms']:,.0f}"
                for rival, timing in rivals(whole(case)).items()
            )
            lines += ["", f"{unit} a second: {', '.join(rates)}"]
        lines += _beside_the_times(case)
    if AOT_TABLE.exists():
        lines += [
            "",
            "## Computed, not measured",
            "",
            COMPUTED,
            "",
            "```text",
            AOT_TABLE.read_text(encoding="utf-8").rstrip(),
            "```",
        ]
    return "\n".join(lines) + "\n"


def _beside_the_times(case: dict) -> list[str]:
    """What gpu_check also keeps of a case: the host's time, the GPU's state, what was left out, kernels."""
    lines = []
    if "host_ms" in case:
        taken = case["host_ms"].get(interleave.WHOLE) or case["host_ms"][interleave.ONLY]
        listed = ", ".join(f"{side} {milliseconds:.3f}" for side, milliseconds in taken.items())
        lines += ["", f"Milliseconds until the host had launched it: {listed}"]
    for when, state in case.get("gpu_state", {}).items():
        if state:
            listed = ", ".join(f"{name} {value}" for name, value in state.items())
            lines += ["", f"The GPU {when}: {listed}"]
    if case.get("left_out"):
        lines += ["", "Left out:", "", *(f"- {side}: {reason}" for side, reason in case["left_out"].items())]
    for side, kernels in case.get("kernels", {}).items():
        lines += ["", f"{side}, by kernel:", ""]
        lines += ["| kernel | calls | ms | share | rate, of a copy's |", "|---|---|---|---|---|"]
        for row in kernels:
            rate = f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else ""
            name = row["kernel"].replace("|", "\\|")
            lines.append(f"| `{name}` | {row['calls']} | {row['ms']:.4f} | {row['share']:.1%} | {rate} |")
    return lines


def with_figures(page: str, cases: dict[str, dict], pictures: Sequence[str], folder: Path) -> str:
    """The text of `PAGE` with new figures between the two markers; ValueError without the markers."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: expected the markers {BEGIN.strip()} and {END.strip()}")
    seen_from_page = os.path.relpath(folder.resolve(), PAGE.parent)
    return head + BEGIN + figures(cases, pictures, seen_from_page) + END + tail


def figures(cases: dict[str, dict], pictures: Sequence[str], folder: str) -> str:
    """One line per case: ours against its rivals, whose times are given as multiples of ours.

    ``folder``, as seen from the page, holds report.md and the pictures.
    """
    machines = "; ".join(sorted({_machine(case) for case in cases.values()}))
    lines = [
        f"Measured on {machines}. A ratio is the rival's time over ours, medians of interleaved rounds;",
        f"[every figure with its spread]({folder}/report.md).",
        "",
    ]
    lines += [
        "| what | ours | limit | rivals: times as long | peak memory: ours, theirs |",
        "|---|---|---|---|---|",
    ]
    notes = Notes(cases.values())
    for case in cases.values():
        ours = next((name for name in whole(case) if is_ours(name)), None)
        if ours is None:
            continue
        milliseconds = medians(whole(case))
        own, limit, faster = milliseconds[ours], limit_ms(whole(case)), ahead(milliseconds)
        others = [
            f"{name} **{taken / own:.2f}, faster**" if name in faster else f"{name} {taken / own:.2f}"
            for name, taken in rivals(milliseconds).items()
            if not is_ours(name)
        ]
        peaks = [_memory(case, ours)]
        peaks += [
            f"{name} {_memory(case, name)}" for name in rivals(case.get("memory", {})) if not is_ours(name)
        ]
        lines.append(
            f"| {case['title']}{notes.mark(case)} | {own:.1f} ms | "
            f"{_limit(limit, 1)} | {'; '.join(others)} | {'; '.join(peaks).strip()} |"
        )
    lines += [*notes.lines(), "", *(f"![{Path(name).stem}]({folder}/{name})" for name in pictures)]
    return "\n".join(lines) + "\n"


def _machine(case: dict) -> str:
    environment = case["environment"]
    cores = f"{environment['cores']} cores, " if "cores" in environment else ""
    return f"{environment['device']}, {cores}torch {environment['torch']}"


def _spread(timing: dict, suffix: str, digits: int) -> str:
    middle = f"{timing['median_ms' if suffix else 'ratio']:.{digits}f}"
    quartiles = timing.get("quartiles_ms" if suffix else "ratio_quartiles")
    return middle if quartiles is None else f"{middle} [{quartiles[0]:.{digits}f} {quartiles[1]:.{digits}f}]"


def _limit(milliseconds: float, digits: int) -> str:
    return f"{milliseconds:.{digits}f} ms" if milliseconds else "not timed"


def _memory(case: dict, rival: str) -> str:
    peak = case.get("memory", {}).get(rival)
    return "" if peak is None else f"{peak / 2**20:,.0f} MiB"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
