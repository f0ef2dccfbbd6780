"""Builds the two extensions; everything else about the package is in pyproject.toml.

`fastercache/_ops*.so` holds the CPU ops (torch's stable ABI, loaded with torch.ops.load_library), `fastercache._layout` is a pybind11
module. Neither is needed: what cannot be built is left out with a message, and the package runs on PyTorch alone.

FASTERCACHE_BUILD=0 builds nothing; FASTERCACHE_BUILD=require turns anything that cannot be built into an error.
"""

import glob
import os
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("FASTERCACHE_BUILD", "auto")
TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11, the oldest supported
FLAGS = ["/O2", "/std:c++20"] if sys.platform == "win32" else ["-O3", "-std=c++20", "-fvisibility=hidden", "-g0"]


def missing(what: str, error: BaseException) -> None:
    """Says once what is left out and why, or stops the build where it is required."""
    message = f"fastercache: {what} not built ({type(error).__name__}: {error}); the package works without, on PyTorch alone"
    if MODE == "require":
        raise SystemExit(f"{message}, but FASTERCACHE_BUILD=require")
    print(f"warning: {message}. FASTERCACHE_BUILD=0 skips the build.", file=sys.stderr)


def ops_extension() -> tuple[Extension, type[build_ext]]:
    from torch.utils.cpp_extension import BuildExtension, CppExtension  # its BuildExtension uses ninja where it is installed

    extension = CppExtension(
        "fastercache._ops",
        ["csrc/bindings/ops.cpp"],
        depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/kernels/*.h")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("TORCH_STABLE_ONLY", None)],
        extra_compile_args=FLAGS,
        py_limited_api=True,
        optional=MODE != "require",
    )
    return extension, BuildExtension


def layout_extension() -> Extension:
    import pybind11

    return Extension(
        "fastercache._layout",
        ["csrc/bindings/layout.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=FLAGS,
        language="c++",
        optional=MODE != "require",
    )


def extensions() -> tuple[list[Extension], type[build_ext]]:
    """What can be built here, and the command that builds it without ever failing the install."""
    found: list[Extension] = []
    base: type[build_ext] = build_ext
    if MODE == "0":
        return found, base
    try:
        extension, base = ops_extension()
        found.append(extension)
    except Exception as error:
        missing("the C++ ops", error)
    try:
        found.append(layout_extension())
    except Exception as error:
        missing("fastercache._layout", error)

    class BuildOrSkip(base):
        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                missing("the extensions", error)

        def build_extension(self, ext: Extension) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                missing(ext.name, error)

    return found, BuildOrSkip


ext_modules, command = extensions()
setup(
    packages=[*find_packages(include=["fastercache", "fastercache.*"]), "fastercache.triton_kernels"],
    package_dir={"fastercache.triton_kernels": "triton_kernels"},
    ext_modules=ext_modules,
    cmdclass={"build_ext": command},
)
