"""What setup.py does where something cannot be built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("setuptools")
NVCC = """#!/bin/sh
case "$1" in
  --list-gpu-arch) printf 'compute_%s\\n' 75 80 90 100 110 120;;
  *) echo "Cuda compilation tools, release 13.0, V13.0.88";;
esac
"""
# Compiles nothing: says what would be compiled. torch's own check of the versions runs as it is.
SCRIPT = """
import runpy, sys
import setuptools
from setuptools import Distribution
from setuptools.command.build_ext import build_ext
import torch
from torch.utils import cpp_extension
torch.version.cuda = {cuda!r}
kept = {{}}
setuptools.setup = lambda **given: kept.update(given)
namespace = runpy.run_path("setup.py")
def build_extension(self, extension):
    flags = extension.extra_compile_args
    print("built", extension.name, *(flag for flag in flags["nvcc"] if "gencode" in flag) if isinstance(flags, dict)
    else ())
build_ext.build_extension = build_extension
distribution = Distribution(dict(name="fastercache", ext_modules=kept["ext_modules"]))
command = kept["cmdclass"]["build_ext"](distribution)
command.ensure_finalized()
command.run()
print("left", *(extension.name for extension in command.extensions))
"""


def build(tmp_path: Path, cuda: str, **environment: str) -> subprocess.CompletedProcess:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    environment = (
        os.environ | {"CUDA_HOME": str(tmp_path), "FASTERCACHE_CUDA": "1", "FASTERCACHE_BUILD": "auto"} | environment
    )
    command = [sys.executable, "-c", SCRIPT.format(cuda=cuda)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_cuda_that_torch_refuses_takes_nothing_else_down(tmp_path):
    pytest.importorskip("pybind11")
    done = build(tmp_path, cuda="12.6")
    assert done.returncode == 0, done.stderr
    built = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("built")]
    assert built == ["fastercache._ops", "fastercache._layout"]
    assert "fastercache._ops_cuda not built" in done.stderr
    assert "left fastercache._ops fastercache._ops_cuda fastercache._layout" in done.stdout


def test_a_cuda_that_torch_takes_is_built_for_every_architecture(tmp_path):
    done = build(tmp_path, cuda="13.0")
    line = next(
        (line for line in done.stdout.splitlines() if line.startswith("built fastercache._ops_cuda")), done.stderr
    )
    images = [word.partition(",code=")[2] for word in line.split() if "gencode" in word]
    assert images == ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_100"], done.stderr


def test_a_required_build_still_fails(tmp_path):
    done = build(tmp_path, cuda="12.6", FASTERCACHE_BUILD="require")
    assert done.returncode != 0 and "fastercache._ops_cuda not built" in done.stderr


def test_an_unknown_build_mode_is_refused(tmp_path):
    done = build(tmp_path, cuda="13.0", FASTERCACHE_BUILD="required")
    assert done.returncode != 0
    assert "FASTERCACHE_BUILD is 'required'" in done.stderr and "auto" in done.stderr
