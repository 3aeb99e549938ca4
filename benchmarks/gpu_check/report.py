"""What became of each item: a JSON file, rewritten after each of them, and lines of text."""

import contextlib
import importlib.metadata
import json
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.findings import share_of_bound
from benchmarks.gpu_check.pool import ERROR, FAIL, NOT_RUN, PASS, Item, not_run
from bloomft.files import write_atomically

FILE = "correctness.json"
_NOT_YET = "not yet"
_WORDS = {PASS: "PASS", FAIL: "FAIL", ERROR: "ERROR", NOT_RUN: "NOT RUN"}


class Report:
    """The outcomes so far of a list of items, kept in a file of folder, which is rewritten after each."""

    def __init__(
        self, folder: Path, items: Sequence[Item], about: dict[str, object], file: str = FILE
    ) -> None:
        self._path, self._about = folder / file, about
        self._outcomes = {item.name: not_run(_NOT_YET) for item in items}
        self._write()

    def add(self, item: Item, outcome: dict) -> None:
        """Keep an item's outcome on disk, and print a line about it."""
        self._outcomes[item.name] = outcome
        self._write()
        done = sum(one["detail"] != _NOT_YET for one in self._outcomes.values())
        print(f"[{done}/{len(self._outcomes)}] {self._line(item.name)}", flush=True)

    def print_all(self) -> None:
        """One line per item, what is wrong below it, and a summary."""
        for name, outcome in self._outcomes.items():
            print(self._line(name))
            if outcome["status"] != PASS:
                print("".join(f"    {line}\n" for line in outcome["detail"].splitlines()), end="")
        counts = Counter(outcome["status"] for outcome in self._outcomes.values())
        print(", ".join(f"{counts[status]} {status}" for status in _WORDS if counts[status]), flush=True)

    def passed(self) -> bool:
        """Whether every item ran and passed."""
        return all(outcome["status"] == PASS for outcome in self._outcomes.values())

    def _line(self, name: str) -> str:
        outcome = self._outcomes[name]
        line = f"{_WORDS[outcome['status']]:7} {name}  {outcome['seconds']:.1f} s"
        if figures := outcome.get("figures"):
            worst = max(figures, key=share_of_bound)
            line += f"  at most {share_of_bound(worst):.2f} of the bound ({worst['result']})"
        return line

    def _content(self) -> dict[str, object]:
        items = [
            {"item": name, **{key: value for key, value in outcome.items() if key != "cases"}}
            for name, outcome in self._outcomes.items()
        ]
        return {**self._about, "items": items}

    def _write(self) -> None:
        write_atomically(self._path, f"{json.dumps(self._content(), indent=1)}\n".encode())


def about(device: str, rehearsal: bool) -> dict[str, object]:
    """What the figures were found on: device, versions, commit and date."""
    import torch

    from benchmarks.interleave import processor

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "rehearsal": rehearsal,
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: importlib.metadata.version(name) for name in ("triton", "transformers")},
        },
        "source": _source(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _source() -> str:
    """The commit of the sources and whether they were changed since; without one, the package's version."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"bloomft {importlib.metadata.version('bloomft')}"
        return "no commit, and bloomft is not installed"
    return f"commit {commit.strip()}{', with changes' if changed else ''}"
