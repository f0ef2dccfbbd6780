"""Cases that only `make test-all` runs: further ones of what `make test` has one of."""

from __future__ import annotations

import os
from typing import Any

import pytest

LONG = os.environ.get("FASTERCACHE_LONG") == "1"

long = pytest.mark.skipif(not LONG, reason="one of several: make test-all runs it")


def longer(*values: Any) -> Any:
    """A case of `pytest.mark.parametrize`."""
    return pytest.param(*values, marks=long)
