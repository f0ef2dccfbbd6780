"""Microbenchmarks of the ops against the plain PyTorch that does the same: `pytest bench/test_ops.py --benchmark-only`.

The cases are those of `bench.op_cases`, at 16 MB a site (256 MB with `--big`); Inductor's code, which takes minutes to
compile on a CPU, is timed by `bench.cpu_ops` and `bench.gpu`. Every timing follows a check. The calls of a round rotate
among sets of tensors that together exceed the last level of cache twice over. `extra_info` holds the bytes that the op
must move, the same for all forms of it, and GB/s (1e9 bytes) at the median.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from bench import op_cases, timing
from bench.op_cases import Case
from fastercache import ops

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SMALL, BIG = 16e6, 256e6
"""Bytes of one site's output."""
CHANNELS = 1024
ROUNDS = 15


def cases(device: str, size: float) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        name, shape = str(dtype).removeprefix("torch."), (round(size / dtype.itemsize / CHANNELS), CHANNELS)
        yield from op_cases.ring_cases(name, shape, dtype, device)
        if ops.packed_missing(torch.device(device)) is None:
            yield from op_cases.packed_cases(name, shape, dtype, device)
    yield from op_cases.cfg_cases("CogVideoX", op_cases.LATENTS["CogVideoX"], torch.float32, device)
    yield from op_cases.prediction_cases("CogVideoX", op_cases.LATENTS["CogVideoX"], torch.float32, device)
    yield op_cases.skipped_step_case(device, torch.float32)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    size = BIG if metafunc.config.getoption("--big") else SMALL
    found = [
        (device, case, form)
        for device in DEVICES
        for case in cases(device, size)
        for form in case.forms
        if form != "inductor"
    ]
    shown = {(device, case.op, form): f"{form} in {case.implementation(form, device)}" for device, case, form in found}
    ids = [f"{device}-{case.op}-{case.name}-{shown[device, case.op, form]}" for device, case, form in found]
    metafunc.parametrize(("device", "case", "form"), found, ids=ids)


def test_op(benchmark, device: str, case: Case, form: str) -> None:
    """Time a form of an op, after its result was found right."""
    error, right = case.error(form)
    assert right, f"the error is {error:.3g} of the largest value"
    sets = timing.rotating_sets(case, device)
    turns = itertools.cycle(range(len(sets)))

    def call() -> None:
        number = next(turns)
        case.forms[form](sets[number])
        if device == "cuda" and number == len(sets) - 1:  # once a round: its cost is shared by all calls of the round
            torch.cuda.synchronize()

    benchmark.group = f"{case.op} {device} {case.name}"
    benchmark.pedantic(call, rounds=ROUNDS, iterations=len(sets), warmup_rounds=1)
    benchmark.extra_info.update(
        bytes_moved=case.moved,
        buffer_sets=len(sets),
        threads=torch.get_num_threads(),
        implementation=case.implementation(form, device),
        torch=torch.__version__,
    )
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["GB/s"] = round(case.moved / benchmark.stats.stats.median / 1e9, 2)
