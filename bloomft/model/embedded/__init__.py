"""The base model that the package carries: its text, its training and its files."""
