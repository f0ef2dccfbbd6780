"""Benchmarks: `python -m bench.shapes_quality`, `bench.shapes_ablations`, `bench.shapes_speed`, and `pytest bench --benchmark-only`."""
