"""The base model that the package carries: its text, its training and its files."""

from pathlib import Path

SHIPPED_BASE = Path(__file__).parent / "base"  # a Hugging Face folder, with recipe.json
