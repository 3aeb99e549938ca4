"""Python in a process of its own, for what only a whole process shows."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start_python(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    """``python *arguments`` on the packages of this checkout; its output and errors are pipes of text.

    What the environment says of OpenMP's threads is replaced: one thread, unless ``environment`` differs.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, seconds: float = 200) -> tuple[int, str, str]:
    """Waits for the end; returns exit status, output and errors."""
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, errors


def run_python(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """`start_python`, to its end, which has to be a success; returns its output."""
    status, output, errors = finish(start_python(*arguments, cwd=cwd, **environment))
    assert status == 0, errors
    return output
