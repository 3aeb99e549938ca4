"""One training run: its state, its files and its output."""
