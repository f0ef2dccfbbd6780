"""What `import fastercache` finds, from wherever Python is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def from_folder(folder: Path, *flags: str) -> str:
    """Path of the package that a new interpreter in `folder` imports, with no help from PYTHONPATH."""
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *flags, "-c", "import fastercache; print(fastercache.__file__)"],
        cwd=folder,
        env=plain,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr


def test_from_the_folder_above_a_clone_the_package_is_found(tmp_path):
    """`fastercache/` of a clone has no __init__.py; Python takes it for a namespace package if no path entry has the
    real one."""
    clone = tmp_path / "fastercache"
    clone.mkdir()
    (clone / "fastercache").symlink_to(ROOT / "fastercache")
    (tmp_path / "empty").mkdir()
    installed = from_folder(tmp_path / "empty")
    if "ModuleNotFoundError" in installed:
        pytest.skip("fastercache is not installed, only on the path")
    assert from_folder(tmp_path) == installed and installed.endswith("fastercache/__init__.py")


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """A copy of what the builds read, and a folder with an editable wheel and an sdist of it."""
    source, out = tmp_path_factory.mktemp("above") / "fastercache", tmp_path_factory.mktemp("out")
    unread = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("fastercache", "triton_kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=unread)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as b; out = sys.argv[1]; b.build_editable(out); b.build_sdist(out)"
    subprocess.run(
        [sys.executable, "-c", build, out],
        cwd=source,
        env=os.environ | {"FASTERCACHE_BUILD": "0"},
        check=True,
        capture_output=True,
    )
    return source, out


def test_an_editable_install_is_one_path_entry(builds):
    """Setuptools' finder comes after the path, where the folder of a clone is found first."""
    source, out = builds
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        code = [name for name in files.namelist() if ".dist-info/" not in name]
        assert len(code) == 1 and code[0].endswith(".pth")
        files.extractall(out / "site")
    find = (
        f"import site, sys; site.addsitedir({str(out / 'site')!r}); sys.path.insert(0, '');"
        "import importlib.util; print(importlib.util.find_spec('fastercache').origin)"
    )
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", find], cwd=source.parent, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()) == source / "fastercache" / "__init__.py"


def test_a_source_distribution_has_what_a_build_needs_and_no_tests_without_their_helpers(builds):
    (archive,) = builds[1].glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {"/".join(name.split("/")[1:]) for name in files.getnames()}
    assert not [name for name in names if "tests/" in name]
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "triton_kernels").glob("*.py")}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*.*") if path.parent.name != "tests"}
    weights = {str(path.relative_to(ROOT)) for path in (ROOT / "fastercache/shapes/pipeline").glob("*/*")}
    assert (
        kernels | {f"fastercache/{name}" for name in kernels} | code | weights | {"fastercache/py.typed", "LICENSE"}
        <= names
    )
