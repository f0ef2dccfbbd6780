"""The C++ code under AddressSanitizer and UBSan: its own tests, a fuzz of them, and a fuzz of the entry points that
torch calls.

FASTERCACHE_FUZZ_SECONDS and FASTERCACHE_FUZZ_SEED lengthen and vary the fuzzing.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

import fastercache
from fastercache import triton_kernels

from .test_fuzz import SECONDS, SEED, fuzz, needs_cpp

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> list[str]:
    """The command that compiles with sanitizers; skips where the compiler or their libraries are missing."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no compiler {COMPILER}")
    command = [COMPILER, *FLAGS]
    out = str(tmp_path_factory.mktemp("probe") / "probe")
    probe = subprocess.run(
        [*command, "-x", "c++", "-", "-o", out], input="int main() {}", capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"{COMPILER} cannot link the sanitizers: {probe.stderr.strip()}")
    return command


def compiled(command: list[str], *arguments: str) -> None:
    run = subprocess.run([*command, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def kernels(compiler, tmp_path_factory) -> str:
    program = str(tmp_path_factory.mktemp("kernels") / "test_kernels")
    compiled(compiler, "-Wall", "-Wextra", str(CSRC / "tests" / "test_kernels.cpp"), "-o", program)
    return program


@pytest.mark.parametrize(
    "arguments", [[], ["--fuzz", str(SECONDS / 2), "--seed", str(1000 + SEED)]], ids=["tests", "fuzz"]
)
def test_kernels(kernels, arguments):
    run = subprocess.run([kernels, *arguments], capture_output=True, text=True, timeout=SECONDS + 120)
    assert run.returncode == 0, run.stderr[-6000:]
    assert "runs passed" in run.stdout


@needs_cpp
def test_entry_points(compiler, tmp_path):
    """The library with sanitizers, in a copy of the package that has it in place of the installed one."""
    # Python itself has no sanitizer: their library has to be there before it, and libstdc++ for them to see exceptions
    # thrown.
    names = ("libasan.so", "libstdc++.so")
    preloaded = [
        subprocess.run([compiler[0], f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    if not all(Path(path).is_file() for path in preloaded):
        pytest.skip(f"{compiler[0]} does not say where {' and '.join(names)} lie")
    package = tmp_path / "fastercache"
    package.mkdir()
    for path in Path(fastercache.__file__).parent.iterdir():
        if not path.name.startswith(("_ops", "triton_kernels", "__pycache__")):
            (package / path.name).symlink_to(path)
    (package / "triton_kernels").symlink_to(Path(triton_kernels.__file__).parent)
    places = [flag for path in include_paths() for flag in ("-isystem", path)] + [
        f"-L{path}" for path in library_paths()
    ]
    flags = ["-fPIC", "-shared", "-DTORCH_STABLE_ONLY", *places]
    compiled(compiler, *flags, str(CSRC / "bindings" / "ops.cpp"), "-ltorch_cpu", "-o", str(package / "_ops.so"))
    fuzz(
        tmp_path / "call.txt",
        LD_PRELOAD=" ".join(preloaded),
        ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1",
        PYTHONPATH=str(tmp_path),
    )
