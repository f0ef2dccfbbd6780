"""The C++ entry points survive arguments that nothing has checked: `fuzz_entry_points.py`, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastercache import ops

SCRIPT = Path(__file__).with_name("fuzz_entry_points.py")
SECONDS = float(os.environ.get("FASTERCACHE_FUZZ_SECONDS", "8"))
SEED = int(os.environ.get("FASTERCACHE_FUZZ_SEED", "0"))

needs_cpp = pytest.mark.skipif(
    ops.implementations()["ring_push"]["cpu"] != "C++", reason="the C++ library is not built or not in use"
)


def fuzz(log: Path, **environment: str) -> None:
    """Runs the fuzz; each op must both have accepted and have refused some of its arguments."""
    command = [sys.executable, str(SCRIPT), "--seconds", str(SECONDS), "--seed", str(SEED), "--log", str(log)]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=SECONDS + 120)
    call = log.read_text().rstrip(" \0") if log.exists() else "no call was made"
    assert run.returncode == 0, f"the process ended with {run.returncode} in this call:\n{call}\n{run.stderr[-4000:]}"
    for name, counts in json.loads(run.stdout)["ops"].items():
        assert counts["accepted"] > 20 and counts["refused"] > 20, (name, counts)


@needs_cpp
def test_no_call_touches_foreign_memory(tmp_path):
    fuzz(tmp_path / "call.txt")
