"""The import contracts (`[tool.importlinter]` in pyproject.toml): they hold, and what would break them is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS, CIRCLES, TORCH = "Each room uses", "No circle", "Schedules and plans know no torch"


def broken_in(folder: Path) -> tuple[list[str], str]:
    """The names of the broken contracts of the package in a folder, and all that the linter printed."""
    command = (
        "import sys; from importlinter.cli import lint_imports_command as lint; sys.argv[0] = 'lint-imports'; lint()"
    )
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--no-logo"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    text = done.stdout + done.stderr
    assert done.returncode in (0, 1) and "Contracts:" in text, text
    broken = [line for line in text.splitlines() if re.search(r"\bBROKEN\b", line)]
    assert bool(broken) == bool(done.returncode)
    return broken, text


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A copy of what the linter reads, with the link from the package to `triton_kernels/`."""
    folder = tmp_path_factory.mktemp("package")
    unread = shutil.ignore_patterns("__pycache__", "*.so", "pipeline")
    for name in ("fastercache", "triton_kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=unread)
    shutil.copy(ROOT / "pyproject.toml", folder)
    assert (folder / "fastercache/triton_kernels").is_symlink()
    return folder


def test_the_package_keeps_its_contracts(package):
    assert broken_in(package)[0] == []


def test_a_built_tree_which_joins_the_kernels_to_the_package_keeps_them_too(package, tmp_path):
    shutil.copytree(package / "fastercache", tmp_path / "fastercache")  # the link becomes a folder
    shutil.copy(package / "pyproject.toml", tmp_path)
    assert not (tmp_path / "fastercache/triton_kernels").is_symlink()
    assert broken_in(tmp_path)[0] == []


VIOLATIONS = {
    "a room above": ("fastercache/cache/ring.py", "from fastercache.runtime.engine import Engine", LAYERS),
    "a room above inside a function": (
        "fastercache/models/family.py",
        "def late():\n    from fastercache.cache import ring",
        LAYERS,
    ),
    "the public names": ("fastercache/report/flops.py", "from fastercache import Summary", LAYERS),
    "the command line": ("fastercache/shapes/world.py", "from fastercache import cli", LAYERS),
    "a room without a place": ("fastercache/tools.py", "", LAYERS),
    "from the kernels": ("triton_kernels/ring_push.py", "from fastercache import ops", LAYERS),
    "from the kernels to a schedule": (
        "triton_kernels/coefficients.py",
        "from fastercache.schedule.step import Step",
        LAYERS,
    ),
    "into the kernels": (
        "fastercache/errors.py",
        "from fastercache.triton_kernels.coefficients import Coefficient",
        LAYERS,
    ),
    "a circle in a room": ("fastercache/cache/ring.py", "from fastercache.cache.budget import CacheBudget", CIRCLES),
    "a circle of kernels": ("triton_kernels/_triton.py", "from fastercache.triton_kernels import ring_push", CIRCLES),
    "torch in a schedule": ("fastercache/schedule/policies/fora.py", "import torch", TORCH),
    "torch through the kernels": (
        "fastercache/schedule/plan.py",
        "from fastercache.triton_kernels import ring_blend",
        TORCH,
    ),
    "torch in the coefficients": ("triton_kernels/coefficients.py", "import torch", TORCH),
}


@pytest.mark.parametrize(("file", "line", "contract"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_found(package, file, line, contract):
    path = package / file
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\n\n{line}\n")
    try:
        broken, text = broken_in(package)
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_text(before)
    assert any(contract in one for one in broken), text


def test_what_type_checkers_alone_read_is_no_violation(package):
    path = package / "fastercache/errors.py"
    before = path.read_text()
    path.write_text(
        before
        + "\n\nfrom typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from fastercache.schedule.step import Step\n"
    )
    try:
        assert broken_in(package)[0] == []
    finally:
        path.write_text(before)
