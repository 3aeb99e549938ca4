"""speed.json: what became of each item, and the cases in the form that benchmarks.report reads."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_check.pool import PASS, Item
from benchmarks.gpu_check.report import Report

FILE = "speed.json"
KERNEL_WIDTH = 90


class SpeedReport(Report):
    """Also what the compiling items took, and the table of every case as soon as it is timed."""

    def __init__(self, folder: Path, items: Sequence[Item], about: dict[str, object]) -> None:
        self._compiled: dict[str, dict] = {}
        super().__init__(folder, items, about, FILE)

    def add_compiled(self, item: Item, outcome: dict) -> None:
        """Keep the outcome of an item that only fills the caches: without it, others take longer."""
        kept = {key: outcome[key] for key in ("status", "seconds", "detail")}
        self._compiled[item.name] = kept
        self._write()
        if outcome["status"] != PASS:
            print(f"{item.name}: {outcome['status']}: {outcome['detail']}", flush=True)

    def add(self, item: Item, outcome: dict) -> None:
        """Keep an item's outcome and its cases on disk, and print them."""
        super().add(item, outcome)
        for name, case in outcome.get("cases", {}).items():
            print("\n".join(lines(name, case["extra_info"])), flush=True)

    def _content(self) -> dict[str, object]:
        cases = [
            {"name": name, **case}
            for outcome in self._outcomes.values()
            for name, case in outcome.get("cases", {}).items()
        ]
        return {
            **super()._content(),
            "machine_info": {"device": self._about["device"]},
            "commit_info": {"id": self._about["source"]},
            "datetime": self._about["date"],
            "compiled": self._compiled,
            "benchmarks": cases,
        }


def lines(name: str, found: dict) -> Iterator[str]:
    """A stored case: every side's milliseconds, ratio and host time; what was left out; its kernels."""
    yield f"  {name}: {found['title']}; ratios to {found['floor']}"
    for phase, timings in found["phases"].items():
        for side, timing in timings.items():
            low, high = timing["quartiles_ms"]
            yield (
                f"    {phase:9}{side:42}{timing['median_ms']:10.3f} ms [{low:.3f} {high:.3f}]"
                f"{timing['ratio']:8.3f}   host {found['host_ms'][phase][side]:.3f} ms"
            )
    for side, reason in found["left_out"].items():
        yield f"    left out: {side}: {reason}"
    for side, kernels in found.get("kernels", {}).items():
        yield f"    {side}, by kernel:"
        for row in kernels:
            moved = f", {row['share_of_copy']:.0%} of a copy's rate" if "share_of_copy" in row else ""
            kernel = row["kernel"][:KERNEL_WIDTH]
            yield f"      {row['share']:6.1%} {row['ms']:9.4f} ms {row['calls']:5} x {kernel}{moved}"
