"""The BLOOM to train: its base, the fused classes, the adapters and their files."""
