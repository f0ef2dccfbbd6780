"""Benchmarks: `python -m bench.shapes_quality`, `bench.shapes_ablations`, `bench.shapes_speed`,
`bench.frontier`; on a GPU `bench.gpu` and `bench.models`; `pytest bench --benchmark-only`.
"""
