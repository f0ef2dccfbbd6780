"""Builds the extensions; everything else about the package is in pyproject.toml.

`fastercache/_ops*.so` holds the CPU ops and `fastercache/_ops_cuda*.so` the CUDA ones (torch's stable ABI, loaded with
torch.ops.load_library), `fastercache._layout` is a pybind11 module. None is needed: what cannot be built is left out
with a message, and the package runs on Triton and PyTorch.

FASTERCACHE_BUILD=0 builds nothing; FASTERCACHE_BUILD=require turns anything that cannot be built into an error.
FASTERCACHE_CUDA=1 compiles the CUDA ops for a torch without CUDA too, FASTERCACHE_CUDA=0 for none. CUDA_HOME says where
nvcc is.
"""

import glob
import os
import subprocess
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("FASTERCACHE_BUILD", "auto")
if MODE not in ("auto", "0", "require"):
    raise SystemExit(
        f"FASTERCACHE_BUILD is {MODE!r}; it must be 0 (build nothing), require (fail where something does not build) "
        "or auto"
    )
TORCH_TARGET_VERSION = "0x020b000000000000"  # torch 2.11, the oldest supported
# T4, A100, H100, B200, RTX 50. sm_86 and sm_89 run the code of sm_80, and theirs is as long to 0.4 %.
ARCHITECTURES = ("75", "80", "90", "100", "120")
PTX_UP_TO = (
    100  # the driver makes code for any later device from the last PTX up to this one: sm_110 could not use that of 120
)
# -fno-trapping-math: nobody reads the floating-point exception flags, and keeping them stops GCC from vectorising
# float16's conversions.
UNIX_FLAGS = ["-O3", "-std=c++20", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
FLAGS = ["/O2", "/std:c++20"] if sys.platform == "win32" else UNIX_FLAGS


def missing(what: str, error: BaseException) -> None:
    """Says once what is left out and why, or stops the build where it is required."""
    message = (
        f"fastercache: {what} not built ({type(error).__name__}: {error}); the package "
        "works without, on Triton or PyTorch"
    )
    if MODE == "require":
        raise SystemExit(f"{message}, but FASTERCACHE_BUILD=require")
    print(f"warning: {message}. FASTERCACHE_BUILD=0 skips the build.", file=sys.stderr)


def ops_extension() -> tuple[Extension, type[build_ext]]:
    from torch.utils.cpp_extension import (  # its BuildExtension uses ninja where it is installed
        BuildExtension,
        CppExtension,
    )

    extension = CppExtension(
        "fastercache._ops",
        ["csrc/bindings/ops.cpp"],
        depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*/*.h")),
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("TORCH_STABLE_ONLY", None)],
        extra_compile_args=FLAGS,
        py_limited_api=True,
        optional=MODE != "require",
    )
    return extension, BuildExtension


def cuda_extension() -> Extension | None:
    """The CUDA ops; None where there is no CUDA to call them."""
    import torch
    from torch.utils import cpp_extension

    wanted = os.environ.get("FASTERCACHE_CUDA", "1" if torch.version.cuda else "0")
    if wanted == "0":
        return None
    # torch looks for CUDA_HOME only when it has CUDA itself.
    home = cpp_extension.CUDA_HOME = cpp_extension.CUDA_HOME or os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.path.join(home, "bin", "nvcc")
    if not os.path.exists(nvcc):
        raise FileNotFoundError(f"there is no {nvcc}; set CUDA_HOME to a CUDA toolkit")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = [a for a in ARCHITECTURES if f"compute_{a}" in known]  # CUDA before 12.8 does not know 100
    generate = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
    ptx = max(int(a) for a in targets if int(a) <= PTX_UP_TO)
    generate.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    # -fmad=false: a fused product and sum is not what the CPU computes, and would round some codes to a neighbour.
    return cpp_extension.CppExtension(
        "fastercache._ops_cuda",
        ["csrc/bindings/cuda.cpp", *sorted(glob.glob("csrc/cuda/*.cu"))],
        depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*/*.h")),
        include_dirs=cpp_extension.include_paths("cuda"),
        library_dirs=cpp_extension.library_paths("cuda"),
        libraries=["cudart", *(["torch_cuda"] if torch.version.cuda else [])],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("TORCH_STABLE_ONLY", None), ("USE_CUDA", None)],
        extra_compile_args={"cxx": FLAGS, "nvcc": ["-O3", "-std=c++20", "-lineinfo", "-fmad=false", *generate]},
        py_limited_api=True,
        optional=MODE != "require",
    )


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
        extension = cuda_extension()
        found += [extension] if extension else []
    except Exception as error:
        missing("the CUDA ops", error)
    try:
        found.append(layout_extension())
    except Exception as error:
        missing("fastercache._layout", error)

    class BuildOrSkip(base):
        def build_extensions(self) -> None:
            """Each by itself: torch checks the versions of CUDA and the host compiler for all together, and refuses
            all."""
            found = self.extensions
            for extension in found:
                before = dict(vars(self.compiler))
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except Exception as error:
                    missing(extension.name, error)
                vars(self.compiler).clear()  # torch wraps its methods
                vars(self.compiler).update(before)
            self.extensions = found

        def build_extension(self, ext: Extension) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                missing(ext.name, error)

    return found, BuildOrSkip


ext_modules, command = extensions()
setup(
    packages=find_packages(
        include=["fastercache", "fastercache.*"]
    ),  # fastercache/triton_kernels is a link to the folder at the top
    # Spelled out, so that an editable install is one path entry: with setuptools' finder, `import fastercache` from the
    # folder above a clone finds the clone.
    package_dir={"": "."},
    ext_modules=ext_modules,
    cmdclass={"build_ext": command},
)
