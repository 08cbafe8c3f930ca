"""Measurements against eager mode and torch.compile: `python -m benchmarks.run`."""
