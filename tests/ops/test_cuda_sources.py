"""The CUDA sources without a GPU: what nvcc makes of them for each architecture, and what they do when they are run on
the CPU."""

import ctypes
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.cpp_extension import include_paths

from fastercache.ops import PACKED_DTYPES, PackedLine
from fastercache.triton_kernels import packed

from .helpers import dtypes, few, generator, layouts, make_coefficients, nan, nan_ring, randn, seeds, shapes

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [CSRC / "cuda" / "ring_push.cu", CSRC / "cuda" / "packed_push.cu"]
ARCHITECTURES = (75, 80, 90, 100, 120)
FILLED = {75: 64, 120: 40}
"""Registers of a thread with which 1024 and 1536 threads, all that a multiprocessor of these takes, still fit."""
SLOTS = 5
LAUNCH_FAILURE = 719


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def find_cuobjdump(nvcc: str) -> str | None:
    """The one beside nvcc, or the one that comes with Triton."""
    beside = shutil.which("cuobjdump", path=str(Path(nvcc).parent))
    try:
        from triton import knobs

        return beside or knobs.nvidia.cuobjdump.path
    except Exception:
        return beside


def run(*command: object, **options: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What nvcc makes of them


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[tuple[int, str], dict]:
    """`(architecture, name)` of each kernel, to its registers, its bytes of memory for them, and its memory
    instructions by number."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is neither on the PATH nor under CUDA_HOME")
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        pytest.skip("cuobjdump is neither beside nvcc nor with Triton")
    folder = tmp_path_factory.mktemp("cubin")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    run(nvcc, "-std=c++20", "-O3", "-fmad=false", "-Werror", "all-warnings", *targets, "-c", *SOURCES, cwd=folder)
    found: dict[tuple[int, str], dict] = {}
    for built in folder.glob("*.o"):
        usage = run("c++filt", input=run(cuobjdump, "--dump-resource-usage", built))
        for architecture, text in sections(usage):
            for name, registers, stack, local in re.findall(
                r"Function (.*):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text
            ):
                found[architecture, short(name)] = {"registers": int(registers), "memory": int(stack) + int(local)}
        for architecture, text in sections(run("c++filt", input=run(cuobjdump, "-sass", built))):
            for function in text.split("Function : ")[1:]:
                names = re.findall(r"\b((?:LDG|STG|LDL|STL)[\w.]*) ", function)
                instructions = Counter(name.removesuffix(".SYS") for name in names)  # as sm_75 spells it
                found[architecture, short(function.partition("\n")[0])]["instructions"] = instructions
    return found


def sections(text: str) -> list[tuple[int, str]]:
    parts = re.split(r"arch = sm_(\d+)", text)
    return [(int(architecture), part) for architecture, part in zip(parts[1::2], parts[2::2], strict=True)]


def short(name: str) -> str:
    """`packed_push_kernel<bfloat16, 8, true>` of the whole signature."""
    name = name.replace("fastercache::", "").replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\(.*|\([\w ]+\)", "", name).replace("unsigned int", "uint32").replace("unsigned short", "uint16")


# Registers, at most; 2048 threads of 32 fill a multiprocessor. Lower a bound when a kernel gets better; raise it only
# with a measurement.
REGISTERS = {
    r"ring_push_kernel<uint4, Contiguous>": 32,
    r"ring_push_kernel<\w+, Strided<uint32> >": 32,
    r"ring_push_kernel<\w+, Strided<long> >": 48,
    r"packed_push_kernel<\w+, 0, (true, \w+|false, false)>": 48,
    r"packed_push_kernel<\w+, 8, \w+, \w+>": 72,
    r"packed_push_kernel<\w+, 4, (true, \w+|false, false)>": 104,
    r"packed_push_kernel<\w+, 0, false, true>": 72,  # of two tensors with strides, which few are
    r"packed_push_kernel<\w+, 4, false, true>": 128,
}


def test_every_kernel_is_there(kernels):
    assert len(kernels) == len(ARCHITECTURES) * (9 + 3 * 3 * 2 * 2)
    assert {architecture for architecture, _ in kernels} == set(ARCHITECTURES)
    for pattern in REGISTERS:
        assert any(re.fullmatch(pattern, name) for _, name in kernels), pattern


def test_registers_suffice(kernels):
    """No kernel takes more registers than its bound, and none puts what it has no register for into memory."""
    for key, kernel in kernels.items():
        bound = next(bound for pattern, bound in REGISTERS.items() if re.fullmatch(pattern, key[1]))
        assert kernel["registers"] <= max(bound, FILLED.get(key[0], 0)), (key, kernel)
        assert kernel["memory"] == 0, (key, kernel)
        assert not any(name.startswith(("LDL", "STL")) for name in kernel["instructions"]), (key, kernel)


def test_a_copy_has_four_accesses_of_16_bytes_in_flight(kernels):
    wide = {key: kernel for key, kernel in kernels.items() if key[1].startswith("ring_push_kernel<uint4")}
    assert len(wide) == 3 * len(ARCHITECTURES)
    for key, kernel in wide.items():
        assert kernel["instructions"] == {"LDG.E.128": 4, "LDG.E": 1, "STG.E.128": 4}, (
            key,
            kernel,
        )  # LDG.E is the coefficients's slot


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bits", packed.BITS)
@pytest.mark.parametrize("element,size", [("float", 4), ("bfloat16", 2), ("float16", 2)])
def test_a_packed_push_moves_16_bytes_at_a_time(kernels, element, size, bits, residual):
    """Of codes always, and of x where it is aligned; what is left are the scales, which a block of 128 has once."""
    channels = 32 if bits == 4 else 16  # of a lane
    codes, differences = channels // 16, channels * bits // 8 // 16
    for architecture in ARCHITECTURES:
        name = f"packed_push_kernel<{element}, {bits}, "
        scales = 2 if bits else 1
        stores = {"STG.E.128": codes + differences, "STG.E": scales}
        read = (2 if residual else 1) * channels * size // 16
        loads = {"LDG.E.128": read + (codes if bits else 0)} | ({"LDG.E": 1} if bits else {})
        assert kernels[architecture, f"{name}true, {str(residual).lower()}>"]["instructions"] == loads | stores
        general = kernels[architecture, f"{name}false, {str(residual).lower()}>"]["instructions"]
        assert general["LDG.E.128"] == (codes if bits else 0) and stores.items() <= general.items()


def test_the_bindings_compile(tmp_path):
    """Against the headers of the installed torch, CPU-only or not, at the oldest version supported."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is neither on the PATH nor under CUDA_HOME")
    include = [f"-I{path}" for path in include_paths()]
    macros = ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    warnings = ["-Xcompiler", "-Wall,-Wno-unknown-pragmas,-Werror"]
    run(
        nvcc,
        "-std=c++20",
        *include,
        *macros,
        *warnings,
        "-c",
        CSRC / "bindings" / "cuda.cpp",
        "-o",
        tmp_path / "cuda.o",
    )


# What they do, on the CPU


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> ctypes.CDLL:
    """The launchers and kernels as they are, over `emulated_cuda/cuda_runtime.h` instead of CUDA's own."""
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    here = Path(__file__).with_name("emulated_cuda")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{here}"]
    run("c++", *flags, "-o", library, here / "exports.cpp", "-x", "c++", *SOURCES)
    return ctypes.CDLL(str(library))


def shape_of(x: torch.Tensor) -> list:
    longs = ctypes.c_int64 * x.dim()
    return [x.dim(), longs(*x.shape), longs(*x.stride())]


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def push(library: ctypes.CDLL, ring: torch.Tensor, x: torch.Tensor, slot: float) -> int:
    stride = ctypes.c_int64(ring.stride(0))
    coefficients = make_coefficients(push=slot)
    return library.emulated_ring_push(
        pointer(ring),
        ctypes.c_int64(len(ring)),
        stride,
        pointer(x),
        *shape_of(x),
        x.element_size(),
        pointer(coefficients),
    )


def packed_push(
    library: ctypes.CDLL, ring: torch.Tensor, x: torch.Tensor, entry: torch.Tensor | None, bits: int
) -> int:
    before = (None, None) if entry is None else (pointer(entry), shape_of(entry)[2])
    return library.emulated_packed_push(
        pointer(ring), pointer(x), *shape_of(x), *before, PACKED_DTYPES.index(x.dtype), bits
    )


def cpu_packed_push(
    library: ctypes.CDLL, ring: torch.Tensor, x: torch.Tensor, entry: torch.Tensor | None, bits: int
) -> None:
    x, entry = x.contiguous(), None if entry is None else entry.contiguous()
    channels = ctypes.c_int64(x.shape[-1])
    lines = ctypes.c_int64(x.numel() // x.shape[-1])
    before = None if entry is None else pointer(entry)
    library.cpu_packed_push(pointer(ring), pointer(x), before, lines, channels, PACKED_DTYPES.index(x.dtype), bits)


@few
@given(shape=shapes, dtype=dtypes, layout=layouts, narrow=st.booleans(), slot=st.integers(0, SLOTS - 1), seed=seeds)
def test_push(emulated, shape, dtype, layout, narrow, slot, seed):
    check_push(emulated, shape, dtype, layout, narrow, slot, seed)


# Of these the first is the contiguous case, 3 programs of 4 x 256 units long; the others are read in units of 16, 8, 4
# and 2 bytes.
@pytest.mark.parametrize("layout", ["contiguous", "frames", "pitched"])
@pytest.mark.parametrize("shape", [(2, 5, 4, 512), (2, 3, 5, 72), (2, 3, 5, 36), (2, 3, 5, 18), (3, 3, 7, 301)])
def test_push_of_every_width(emulated, shape, layout):
    check_push(emulated, shape, torch.bfloat16, layout, True, 3, 0)


def check_push(library, shape, dtype, layout, narrow, slot, seed):
    ring = nan_ring(SLOTS, shape, dtype, narrow)
    whole = ring._base if narrow else ring
    if layout == "pitched":  # rows of full width, at addresses that are multiples of one element alone
        x = randn([*shape[:-1], shape[-1] + 1], dtype, generator(seed))[..., :-1]
    else:
        x = randn(shape, dtype, generator(seed), layout)
    assert push(library, ring, x, slot) == 0
    assert torch.equal(ring[slot], x)
    assert (~whole.isnan()).sum() == x.numel()


@pytest.mark.parametrize("slot", [-1, SLOTS, 1e30, torch.nan])
def test_a_slot_outside_the_ring_traps_and_writes_nothing(emulated, slot):
    ring = nan((SLOTS, 3, 64), torch.float32)
    assert push(emulated, ring, torch.zeros(3, 64), slot) == LAUNCH_FAILURE
    assert ring.isnan().all()


def test_dimensions_that_do_not_fit_are_refused(emulated):
    x = torch.zeros([3] * 9)[(slice(None, None, 2),) * 9]
    ring = nan((2, *x.shape), x.dtype)
    assert push(emulated, ring, x, 0) == 1  # cudaErrorInvalidValue, which the binding turns into a sentence
    assert ring.isnan().all()


def meaning(channels: int, bits: int) -> torch.Tensor:
    """Which bytes of a packed coefficients are read by anyone: bool `[coefficients.bytes]`."""
    coefficients = PackedLine(channels, bits)
    parts = [
        (0, channels),
        (coefficients.difference, (channels * bits + 7) // 8),
        (coefficients.newest_scales, 4 * coefficients.blocks),
    ]
    parts += [(coefficients.difference_scales, 4 * coefficients.blocks)] if bits else []
    used = torch.zeros(coefficients.bytes, dtype=torch.bool)
    for begin, size in parts:
        used[begin : begin + size] = True
    return used


@few
@given(
    leading=st.sampled_from([(1,), (3,), (2, 3), (2, 2, 2)]),
    channels=st.sampled_from([1, 15, 16, 24, 33, 48, 112, 128, 130, 136, 144, 272]),
    bits=st.sampled_from(packed.BITS),
    dtype=st.sampled_from(PACKED_DTYPES),
    layout=layouts,
    entry_layout=st.none() | layouts,
    poison=st.sampled_from([None, torch.nan, torch.inf, -torch.inf]),
    seed=seeds,
)
def test_packed_push_writes_what_the_cpu_writes(
    emulated, leading, channels, bits, dtype, layout, entry_layout, poison, seed
):
    """Byte for byte, over two pushes into a ring with scales of 0.747, which is 63 in each byte; what lies beside it is
    left as it is.

    Of a residual, where there is a layout for `entry`.
    """
    shape, rng = [*leading, channels], generator(seed)
    coefficients = PackedLine(channels, bits)
    lines = torch.Size(leading).numel()
    guarded = torch.full((lines + 2, coefficients.bytes), 63, dtype=torch.uint8)
    ring = guarded[1:-1].view(*leading, coefficients.bytes)
    ring[..., :channels] = 0  # what fills up the codes must not pass for changes
    expected = ring.clone()
    used = meaning(channels, bits)
    scales = torch.arange(coefficients.bytes) >= coefficients.newest_scales
    for _ in range(2):
        x = randn(shape, dtype, rng, layout)
        if poison is not None:
            x[..., channels // 2] = poison
        entry = None if entry_layout is None else randn(shape, dtype, rng, entry_layout)
        assert packed_push(emulated, ring, x, entry, bits) == 0
        cpu_packed_push(emulated, expected, x, entry, bits)
        assert torch.equal(ring[..., used & ~scales], expected[..., used & ~scales])
        ours, theirs = (ring_[..., used & scales].contiguous().view(torch.float32) for ring_ in (ring, expected))
        assert torch.equal(ours.isnan(), theirs.isnan())  # a NaN has many bit patterns
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert (guarded[0] == 63).all() and (guarded[-1] == 63).all()
