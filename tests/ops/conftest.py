"""Runs the Triton kernels in Triton's interpreter where there is no GPU, and fills every uninitialised tensor with
NaN."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before anything imports fastercache


@pytest.fixture(autouse=True, scope="module")
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, so an element that a kernel leaves out cannot pass for a right one."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
