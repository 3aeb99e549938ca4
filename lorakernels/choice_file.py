"""Choices between implementations as they are recorded: in a run's checkpoint, and in a file on disk.

The file is ~/.cache/lorakernels/choices.json, or in LORAKERNELS_CACHE_DIR. Choices stand in it under the
versions that they were measured with: of torch, Triton and this package's sources.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Choice:
    """What was chosen for a problem: the winner, the milliseconds of each, and why others were dropped.

    Where nothing was timed, there are no milliseconds: a sole candidate, or the reference in place of all.
    """

    winner: str
    milliseconds: dict[str, float] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)


def parse(recorded: dict[str, dict]) -> dict[str, Choice]:
    """The choices of {problem: {winner, milliseconds, rejected}}.

    Raises AttributeError or TypeError for anything else.
    """
    parsed = {problem: Choice(**choice) for problem, choice in recorded.items()}
    for problem, choice in parsed.items():
        texts = [choice.winner, *choice.milliseconds, *choice.rejected, *choice.rejected.values()]
        times = choice.milliseconds.values()
        if not all(isinstance(text, str) for text in texts) or not all(
            type(t) in (int, float) for t in times
        ):
            raise TypeError(f"{problem}: {choice}")
    return parsed


def read() -> dict[str, Choice]:
    """The choices of the file that these versions measured; none where it is missing or damaged."""
    try:
        return parse(_content().get(versions(), {}))
    except (AttributeError, TypeError):
        return {}


def write(problem: str, choice: Choice) -> None:
    """Add a choice to the file by renaming a new one over it; where that fails the next process measures."""
    path, content = _path(), _content()
    current = content.setdefault(versions(), {})
    if not isinstance(current, dict):
        current = content[versions()] = {}
    current[problem] = asdict(choice)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(temporary, path)


@functools.cache
def versions() -> str:
    """What a measured time depends on besides the problem: torch, triton and this package's sources."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("**/*.py")):
        digest.update(path.read_bytes())
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    runtime = torch.version.cuda or torch.version.hip or "cpu"
    return f"torch {torch.__version__}, {runtime}, triton {triton_version}, sources {digest.hexdigest()[:16]}"


def _path() -> Path:
    if folder := os.environ.get("LORAKERNELS_CACHE_DIR"):
        return Path(folder) / "choices.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakernels" / "choices.json"


def _content() -> dict[str, Any]:
    try:
        content = json.loads(_path().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
