"""A module with a line of its source changed: what a test must notice."""

import importlib.util
import sys
from pathlib import Path


def changed(module, start: str, line: str, replacement: str, folder: Path, everywhere=()):
    """module from a copy of its source, in which line is replaced where it first stands after start."""
    source = Path(module.__file__).read_text()
    for before, after in everywhere:
        assert before in source, f"{before!r} is no longer there: update the mutation"
        source = source.replace(before, after)
    at = source.index(start)
    assert line in source[at:], f"{line!r} is no longer after {start}: update the mutation"
    path = folder / "changed.py"
    path.write_text(source[:at] + source[at:].replace(line, replacement, 1))
    spec = importlib.util.spec_from_file_location("changed", path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules["changed"] = copy
    spec.loader.exec_module(copy)
    return copy
