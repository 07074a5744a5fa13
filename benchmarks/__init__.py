"""Benchmarks: `python -m benchmarks --help`. One runner, one timer (flashtile.testing.timing), one file per area."""
