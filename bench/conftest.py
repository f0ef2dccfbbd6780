"""Options of the microbenchmarks."""

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--big",
        action="store_true",
        default=os.environ.get("BENCH_BIG") == "1",
        help="tensors of 256 MB (or BENCH_BIG=1)",
    )
