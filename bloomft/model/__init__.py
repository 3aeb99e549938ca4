"""The BLOOM that trains: its base, the fused classes, the adapters and their files."""
