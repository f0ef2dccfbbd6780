"""Microbenchmarks of the five ops against the plain PyTorch that does the same: `pytest bench --benchmark-only`.

Every timing follows a check against a float64 formula. The calls of a round rotate among sets of buffers that together exceed the last
level of cache twice over, so each call finds its inputs in memory. `extra_info` holds the bytes that the op must move (one byte model
for all forms of an op, so that their GB/s compare) and GB/s (1e9 bytes) at the median.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastercache import ops
from fastercache.triton_kernels import cfg_reconstruct, ring_blend, ring_push

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SMALL, BIG = 16 * 2**20, 256 * 2**20
"""Bytes of one site's output."""
WIDTH = 1024
"""Elements of its last dimension."""
W, LOW, HIGH = 0.4, 1.2, 1.0
"""Coefficients: w of Eq. 5, w1 and w2 of Eq. 9 and 10."""
CFG_SHAPE = (13, 16, 60, 90)
"""CogVideoX's latent: frames, channels, height, width."""
RADIUS = min(CFG_SHAPE[-2:]) // 5
MOST_SETS = 64

Tensors = tuple[torch.Tensor, ...]


def cache_bytes(device: str) -> int:
    """Size of the last-level cache; 64 MiB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    kib = [int(found[1]) for size in sizes if (found := re.fullmatch(r"(\d+)K", size))]
    return max(kib, default=64 * 1024) * 1024


def make_row(device: str) -> torch.Tensor:
    """Two taps, the newest in slot 1; a push writes slot 2."""
    row = torch.zeros(ops.ROW_SIZE)
    row[ops.Row.COEFFICIENT : ops.Row.COEFFICIENT + 2] = torch.tensor([1 + W, -W])
    row[ops.Row.READ_SLOT] = 1
    row[ops.Row.WRITE_SLOT], row[ops.Row.TAPS] = 2, 2
    row[ops.Row.LOW], row[ops.Row.HIGH] = LOW, HIGH
    return row.to(device)


@dataclass(frozen=True)
class Case:
    """An op to time.

    buffers: makes one set of tensors. forms: name -> what is timed, on a set. expected: the result in float64, from a set before the call.
    result: the same from what a form returned and the set after the call. moved: bytes of one call.
    """

    buffers: Callable[[], Tensors]
    forms: dict[str, Callable[..., object]]
    expected: Callable[..., torch.Tensor]
    result: Callable[..., torch.Tensor]
    moved: int
    tolerance: float


def ring_case(op: str, dtype: torch.dtype, device: str, size: int) -> Case:
    shape = (size // dtype.itemsize // WIDTH, WIDTH)
    elements, row = math.prod(shape), make_row(device)

    def buffers() -> Tensors:
        ring, x = torch.randn((3, *shape), dtype=dtype, device=device), torch.randn(shape, dtype=dtype, device=device)
        return ring, x, torch.full((1, WIDTH), 0.01, dtype=dtype, device=device), torch.empty_like(x)

    def blended(ring: torch.Tensor) -> torch.Tensor:
        return (1 + W) * ring[1].double() - W * ring[0].double()

    # A few roundings of values up to about 8, whose sum may be small.
    tolerance = 16 * torch.finfo(dtype).eps
    if op == "ring_push":
        return Case(
            buffers,
            {"fastercache": lambda ring, x, gate, out: ops.ring_push(ring, x, row), "copy_": lambda ring, x, gate, out: ring[2].copy_(x)},
            lambda ring, x, gate, out: x.double(),
            lambda returned, ring, x, gate, out: ring[2],
            ring_push.bytes_moved(elements, dtype.itemsize),
            0.0,
        )
    if op == "ring_blend":
        return Case(
            buffers,
            {
                "fastercache": lambda ring, x, gate, out: ops.ring_blend(ring, row),
                "lerp-out": lambda ring, x, gate, out: torch.lerp(ring[1], ring[0], -W, out=out),
                "expression": lambda ring, x, gate, out: (1 + W) * ring[1] - W * ring[0],
            },
            lambda ring, x, gate, out: blended(ring),
            lambda returned, ring, x, gate, out: returned,
            ring_blend.bytes_moved(elements, dtype.itemsize, 2),
            tolerance,
        )
    return Case(
        buffers,
        {
            "fastercache": lambda ring, x, gate, out: ops.ring_blend_add(x, gate, ring, row),
            "lerp-out-addcmul_": lambda ring, x, gate, out: x.addcmul_(gate, torch.lerp(ring[1], ring[0], -W, out=out)),
        },
        lambda ring, x, gate, out: x.double() + gate.double() * blended(ring),
        lambda returned, ring, x, gate, out: x,
        ring_blend.bytes_moved(elements, dtype.itemsize, 2, WIDTH * dtype.itemsize),
        tolerance,
    )


def disc(device: str) -> torch.Tensor:
    """Which of the unshifted frequencies `fft2` gives lie in the low band, in exact integers."""
    y, x = (torch.minimum(torch.arange(n, device=device), n - torch.arange(n, device=device)) for n in CFG_SHAPE[-2:])
    return y[:, None] ** 2 + x**2 <= RADIUS**2


def cfg_case(op: str, device: str) -> Case:
    """CFG-Cache in float32, against the paper's formulation with Fourier transforms on every step."""
    row, low_band, elements = make_row(device), disc(device), math.prod(CFG_SHAPE)

    def project(x: torch.Tensor) -> torch.Tensor:
        return torch.fft.ifft2(torch.fft.fft2(x.double()) * low_band).real

    if op == "cfg_split":

        def split_buffers() -> Tensors:
            uncond, cond = (torch.randn(CFG_SHAPE, device=device) for _ in range(2))
            return uncond, cond, torch.empty_like(uncond), torch.empty_like(uncond)

        def fft_split(uncond, cond, low, high) -> Tensors:
            spectrum_u, spectrum_c = torch.fft.fft2(uncond), torch.fft.fft2(cond)
            return spectrum_u * low_band - spectrum_c * low_band, spectrum_u * ~low_band - spectrum_c * ~low_band

        def maps(returned, uncond, cond, low, high) -> torch.Tensor:
            return torch.stack([torch.fft.ifft2(one).real for one in returned] if returned is not None else [low, high])

        def expected_maps(uncond, cond, low, high) -> torch.Tensor:
            difference = uncond.double() - cond.double()
            return torch.stack([project(difference), difference - project(difference)])

        def split(uncond, cond, low, high) -> None:
            ops.cfg_split(low, high, uncond, cond, RADIUS)

        return Case(split_buffers, {"fastercache": split, "fft": fft_split}, expected_maps, maps, 4 * 4 * elements, 1e-4)

    def buffers() -> Tensors:
        cond, difference = (torch.randn(CFG_SHAPE, device=device) for _ in range(2))
        low = project(difference).float()
        high = difference - low
        return cond, low, high, torch.fft.fft2(low), torch.fft.fft2(high), torch.empty((2, *CFG_SHAPE), device=device)

    def fft_rebuild(cond, low, high, low_spectrum, high_spectrum, out) -> None:
        spectrum = torch.fft.fft2(cond)
        rebuilt = spectrum * low_band + LOW * low_spectrum + spectrum * ~low_band + HIGH * high_spectrum
        out[0] = torch.fft.ifft2(rebuilt).real
        out[1] = cond

    def eager_rebuild(cond, low, high, low_spectrum, high_spectrum, out) -> None:
        torch.add(cond, low, alpha=LOW, out=out[0])
        out[0].add_(high, alpha=HIGH)
        out[1].copy_(cond)

    def rebuild(cond, low, high, low_spectrum, high_spectrum, out) -> None:
        ops.cfg_reconstruct(out, cond[None], low[None], high[None], row, 1)

    return Case(
        buffers,
        {"fastercache": rebuild, "add_": eager_rebuild, "fft": fft_rebuild},
        lambda cond, low, high, *_: torch.stack([cond.double() + LOW * low.double() + HIGH * high.double(), cond.double()]),
        lambda returned, *tensors: tensors[-1],
        cfg_reconstruct.bytes_moved(elements, 4),
        1e-4,
    )


RING_FORMS = {
    "ring_push": ("fastercache", "copy_"),
    "ring_blend": ("fastercache", "lerp-out", "expression"),
    "ring_blend_add": ("fastercache", "lerp-out-addcmul_"),
}
CFG_FORMS = {"cfg_split": ("fastercache", "fft"), "cfg_reconstruct": ("fastercache", "add_", "fft")}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def check_and_time(benchmark, case: Case, op: str, form: str, device: str, rounds: int) -> None:
    """Time a form of an op, after its result on one set of buffers was found right."""
    run = case.forms[form]
    tensors = case.buffers()
    expected = case.expected(*tensors)
    returned = run(*tensors)
    torch.testing.assert_close(case.result(returned, *tensors).double(), expected, rtol=case.tolerance, atol=case.tolerance)

    count = min(math.ceil(2 * cache_bytes(device) / case.moved) + 1, MOST_SETS)
    sets = [tensors] + [case.buffers() for _ in range(count - 1)]
    turns = itertools.cycle(range(count))

    def call() -> None:
        number = next(turns)
        run(*sets[number])
        if device == "cuda" and number == count - 1:  # once a round: its cost is shared by all calls of the round
            torch.cuda.synchronize()

    benchmark.group = f"{op} {device} {'x'.join(map(str, tensors[0].shape))} {tensors[0].dtype}".replace("torch.", "")
    benchmark.pedantic(call, rounds=rounds, iterations=count, warmup_rounds=1)
    benchmark.extra_info.update(
        bytes_moved=case.moved,
        buffer_sets=count,
        threads=torch.get_num_threads(),
        implementation=ops.implementations()[op][device] if form == "fastercache" else "PyTorch",
        torch=torch.__version__,
    )
    if benchmark.stats is not None:  # None under --benchmark-disable
        benchmark.extra_info["GB/s"] = round(case.moved / benchmark.stats.stats.median / 1e9, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "form"), [(op, form) for op, forms in RING_FORMS.items() for form in forms])
def test_ring(benchmark, request: pytest.FixtureRequest, op: str, form: str, dtype: str, device: str) -> None:
    size = BIG if request.config.getoption("--big") else SMALL
    check_and_time(benchmark, ring_case(op, DTYPES[dtype], device, size), op, form, device, rounds=15)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "form"), [(op, form) for op, forms in CFG_FORMS.items() for form in forms])
def test_cfg(benchmark, op: str, form: str, device: str) -> None:
    check_and_time(benchmark, cfg_case(op, device), op, form, device, rounds=5)
