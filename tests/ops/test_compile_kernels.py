"""Every Triton kernel compiles for real GPUs, on a machine without one, into machine code that does not get worse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TARGETS = {75, 80, 90, 100, 120} if os.environ.get("FASTERCACHE_ALL_TARGETS") == "1" else {80}
FILLED = {75: 64, 120: 40}
"""Registers of a thread with which 1024 and 1536 threads, all that a multiprocessor of these takes, still fit."""
STACK = {("packed_blend_add bf16, 4 bits", 120): 8}
"""Bytes of a thread's stack that are known and borne."""
SHARED = 64 * 1024  # bytes a program may use on the smallest of the supported GPUs, sm_75

# Of each case of compile_kernels.py: registers of a thread, at most (the hardware gives them in eights; 32 leave room
# for 2048 threads on a multiprocessor), and its loads and stores of 16 bytes. Lower a bound when a kernel gets better;
# raise one only with a measurement.
EXPECTED = {
    "ring_push bf16": (24, 1, 1),
    "ring_push fp32": (24, 2, 2),
    "ring_push bf16, frames moved inward": (24, 1, 1),
    "ring_push_residual bf16": (24, 2, 1),
    "ring_push_residual fp32": (32, 4, 2),
    "ring_push_residual bf16, frames moved inward": (24, 2, 1),
    "ring_blend bf16": (32, 4, 1),
    "ring_blend fp16": (32, 4, 1),
    "ring_blend fp32": (40, 8, 2),
    "ring_blend_add bf16, no gate": (32, 5, 1),
    "ring_blend_add bf16, gate by channel": (32, 6, 1),
    "ring_blend_add fp16, gate by channel": (40, 6, 1),
    "ring_blend_add bf16, float32 gate by channel": (40, 7, 1),
    "ring_blend_add bf16, gate by element": (32, 6, 1),
    "ring_blend_add bf16, part of a sequence": (32, 6, 1),
    "packed_push bf16, 0 bits": (48, 2, 1),
    "packed_push bf16, 8 bits": (64, 3, 2),
    "packed_push bf16, 4 bits": (120, 6, 3),
    "packed_push_residual bf16, 0 bits": (48, 4, 1),
    "packed_push_residual bf16, 8 bits": (64, 5, 2),
    "packed_push_residual bf16, 4 bits": (120, 10, 3),
    "packed_blend bf16, 0 bits": (32, 1, 2),
    "packed_blend bf16, 8 bits": (40, 2, 2),
    "packed_blend bf16, 4 bits": (64, 3, 4),
    "packed_blend_add bf16, 8 bits": (64, 6, 2),
    "packed_blend_add bf16, 4 bits": (80, 11, 4),
    "cfg_reconstruct bf16": (32, 5, 2),
    "cfg_reconstruct bf16, in place": (32, 5, 1),
    "cfg_reconstruct fp16, 57 x 4 x 60 x 106": (32, 5, 2),
    "cfg_reconstruct fp32": (32, 6, 4),
    "cfg_reconstruct bf16, three maps": (32, 7, 2),
    "prediction_blend bf16": (32, 6, 1),
    "prediction_blend bf16, fresh": (40, 7, 1),
    "prediction_blend fp32": (48, 12, 2),
    "prediction_blend bf16, frames moved inward": (32, 6, 1),
}
# Its rows need not begin at multiples of 16 bytes, so only registers count.
EXPECTED_SPLIT = {
    "cfg_split bf16, 60 x 90": 128,
    "cfg_split fp32, 60 x 90": 128,
    "cfg_split fp16, 64 x 64": 208,
    "cfg_split fp32, 128 x 128": 160,
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict]]:
    """What came of each case, one entry for each target. Compiled in a process of its own, because here Triton
    interprets."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    found: dict[str, list[dict]] = {}
    for result in json.loads(run.stdout):
        found.setdefault(result["case"], []).append(result)
    return found


def test_the_list_is_whole_and_short(compiled):
    assert set(compiled) == set(EXPECTED) | set(EXPECTED_SPLIT)
    assert len(compiled) <= 40
    assert all({result["target"] for result in results} == TARGETS for results in compiled.values())


@pytest.mark.parametrize("case", [*EXPECTED, *EXPECTED_SPLIT])
def test_registers_and_shared_memory_suffice(compiled, case):
    registers = EXPECTED_SPLIT[case] if case in EXPECTED_SPLIT else EXPECTED[case][0]
    for result in compiled[case]:
        assert result["registers"] <= max(registers, FILLED.get(result["target"], 0)), result
        assert result["memory"] == STACK.get((case, result["target"]), 0), (
            result
        )  # no registers spilled to local memory
        assert result["shared"] <= SHARED, result


@pytest.mark.parametrize("case", EXPECTED)
def test_payload_moves_16_bytes_at_a_time(compiled, case):
    """All that is narrower are float32 values that many elements share: of the coefficients, scales (which a push
    writes) and gates."""
    _, loads, stores = EXPECTED[case]
    for result in compiled[case]:
        wide = {name: result["accesses"].pop(name, 0) for name in ("LDG.E.128", "STG.E.128")}
        assert wide == {"LDG.E.128": loads, "STG.E.128": stores}, result
        assert set(result["accesses"]) <= ({"LDG.E", "STG.E"} if case.startswith("packed_push") else {"LDG.E"}), result
