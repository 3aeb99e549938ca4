"""One training run: its state, its files and what it tells."""
