"""The reference of all keys, made from their definitions."""

from pathlib import Path

from bloomft.config.schema import reference_table

ROOT = Path(__file__).parents[3]


def test_the_readme_holds_the_reference():
    assert reference_table() in (ROOT / "README.md").read_text(encoding="utf-8")
