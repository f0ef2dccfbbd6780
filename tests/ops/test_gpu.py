"""The ops on a GPU, as users call them, against float64 on the CPU: `pytest tests/ops/test_gpu.py`."""

import itertools
import os

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # read with the first CUDA call; tests run with deterministic algorithms

import numpy as np
import pytest
import torch

from fastercache import ops
from fastercache.ops import PACKED_DTYPES, PackedLine

from .helpers import IMPLEMENTATIONS, LAYOUTS, assert_close, generator, make_coefficients, nan, nan_ring, randn
from .test_cfg import low_band, plane, spectrum
from .test_packed import codes_and_scales, decoded
from .test_prediction import exact_prediction
from .test_ring import COEFFICIENTS, SLOTS, exact_blend, filled_ring

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif("triton" in IMPLEMENTATIONS, reason="Triton interprets its kernels; set TRITON_INTERPRET=0"),
]
each_dtype = pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
each_packed_dtype = pytest.mark.parametrize("dtype", PACKED_DTYPES, ids=str)
each_format = pytest.mark.parametrize("bits", [0, 4, 8])

SHAPES = ([1], [7], [4099], [3, 5, 13], [2, 16, 128], [2, 1025, 64], [2, 3, 50, 8])
PACKED_SHAPES = ([1, 1], [2, 7], [3, 5, 31], [2, 17, 128], [2, 3, 129], [1, 40, 192], [2, 33, 260], [1, 9, 1920])
PLANES = [(60, 90), (64, 64), (60, 106), (45, 80), (31, 37), (1, 6), (128, 128), (130, 20)]
REFERENCE = IMPLEMENTATIONS["reference"]


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """The tensor with its strides and offset, in a copy of its whole storage."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.cuda().as_strided(x.shape, x.stride(), x.storage_offset())


def whole(x: torch.Tensor) -> torch.Tensor:
    """All elements of a tensor's storage, on the CPU."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage()).cpu()


def test_the_kernels_are_compiled():
    assert all(chosen["cuda"] in ("CUDA C++", "Triton") for chosen in ops.implementations().values()), (
        ops.fallback_reasons()
    )


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_push_writes_its_slot_and_nothing_else(dtype, layout):
    for seed, (shape, narrow) in enumerate(itertools.product(SHAPES, (False, True))):
        ring, x = on_gpu(nan_ring(SLOTS, shape, dtype, narrow)), randn(shape, dtype, generator(seed), layout)
        ops.ring_push(ring, on_gpu(x), make_coefficients(push=seed % SLOTS).cuda())
        assert torch.equal(ring[seed % SLOTS].cpu(), x), shape
        assert (~whole(ring).isnan()).sum() == x.numel(), shape


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_push_residual_writes_its_slot_and_nothing_else(dtype, layout):
    for seed, (shape, narrow) in enumerate(itertools.product(SHAPES, (False, True))):
        ring, rng = on_gpu(nan_ring(SLOTS, shape, dtype, narrow)), generator(seed)
        x, entry = randn(shape, dtype, rng, layout), randn(shape, dtype, rng, LAYOUTS[seed % len(LAYOUTS)])
        ops.ring_push_residual(ring, on_gpu(x), on_gpu(entry), make_coefficients(push=seed % SLOTS).cuda())
        assert torch.equal(ring[seed % SLOTS].cpu(), x - entry), shape
        assert (~whole(ring).isnan()).sum() == x.numel(), shape


@each_dtype
@pytest.mark.parametrize("with_fresh", [False, True])
def test_prediction_blend(dtype, with_fresh):
    for seed, (shape, layout) in enumerate(itertools.product(SHAPES, LAYOUTS)):
        rng, taps = generator(seed), seed % 5
        ring, slots = filled_ring(taps, shape, dtype, False, rng)
        newest, now = randn(shape, dtype, rng), randn(shape, dtype, rng, layout)
        fresh = randn(shape, dtype, rng, LAYOUTS[(seed + 2) % len(LAYOUTS)]) if with_fresh else None
        coefficients = make_coefficients(
            COEFFICIENTS[:taps], slots, now=0.35, newest=0.0 if seed % 3 == 0 else -0.3, fresh=0.9
        )
        if seed % 3 == 0:
            newest.fill_(torch.nan)
        out = nan(shape, dtype).cuda()
        ops.prediction_blend(
            out, on_gpu(ring), newest.cuda(), on_gpu(now), coefficients.cuda(), on_gpu(fresh) if with_fresh else None
        )
        assert_close(out.cpu(), *exact_prediction(ring, slots, coefficients, newest, now, fresh))


@each_dtype
@pytest.mark.parametrize("taps", range(5))
def test_blend(dtype, taps):
    for seed, (shape, narrow) in enumerate(itertools.product(SHAPES, (False, True))):
        ring, slots = filled_ring(taps, shape, dtype, narrow, generator(seed))
        out = ops.ring_blend(on_gpu(ring), make_coefficients(COEFFICIENTS[:taps], slots).cuda())
        assert_close(out.cpu(), *exact_blend(ring, slots))


@each_dtype
@pytest.mark.parametrize("float32_gate", [False, True])
def test_blend_add(dtype, float32_gate):
    for seed, (shape, kept) in enumerate(itertools.product(SHAPES, ("all", "last", "first", "none"))):
        rng = generator(seed)
        ring, slots = filled_ring(2, shape, dtype, False, rng)
        keep = {"all": slice(None), "last": slice(len(shape) - 1, None), "first": slice(0, 1), "none": slice(0, 0)}[
            kept
        ]
        gate_shape = [1] * len(shape)
        gate_shape[keep] = shape[keep]
        gate = randn(gate_shape, torch.float32 if float32_gate else dtype, rng, LAYOUTS[seed % len(LAYOUTS)])
        base = nan([2 * shape[0], *shape[1:]], dtype)
        x = base[::2] if len(shape) > 1 else base[: shape[0]]  # every second part of a larger tensor
        x.copy_(randn(shape, dtype, rng))
        blend, magnitude = exact_blend(ring, slots)
        exact, magnitude = x.double() + gate.double() * blend, x.double().abs() + gate.double().abs() * magnitude
        mine = on_gpu(x)
        ops.ring_blend_add(mine, on_gpu(gate), on_gpu(ring), make_coefficients(COEFFICIENTS[:2], slots).cuda())
        assert_close(mine.cpu(), exact, magnitude)
        assert (~whole(mine).isnan()).sum() == x.numel(), shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_pytorch(dtype):
    """Of every 16-bit value times a few factors: to nearest, ties to even, into subnormals and to infinity."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale in (1.0, 1.0 / 3.0, 1.0 + 2.0**-9, 3.7):
        coefficients = make_coefficients([scale], [0])
        expected = (values.float() * coefficients[0]).to(dtype)
        out = ops.ring_blend(values[None].cuda(), coefficients.cuda()).cpu()
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.nan_to_num(), expected.nan_to_num()), (
            scale
        )


@each_packed_dtype
@each_format
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_push(dtype, bits, layout):
    """A push writes what the reference does; a value half-way between two codes may take either.

    A difference is known to the rounding of the outputs, which are up to about 5, in float32.
    """
    for seed, shape in enumerate(PACKED_SHAPES):
        expected = torch.full(
            (*shape[:-1], PackedLine(shape[-1], bits).bytes), 255, dtype=torch.uint8
        )  # the scales are NaN
        mine = expected.cuda()
        older, newest = (randn(shape, dtype, generator(100 * seed + push), layout) for push in range(2))
        ops.packed_push(mine, on_gpu(older), bits)
        REFERENCE.packed_push(expected, older, bits)
        before = codes_and_scales(mine.cpu(), shape[-1], bits)[0], codes_and_scales(expected, shape[-1], bits)[0]
        mine = expected.cuda()  # the difference is taken to codes, which must then be the same
        ops.packed_push(mine, on_gpu(newest), bits)
        REFERENCE.packed_push(expected, newest, bits)
        after = zip(*(codes_and_scales(ring, shape[-1], bits) for ring in (mine.cpu(), expected)), strict=True)
        for (codes, scales), (expected_codes, expected_scales) in (before, *after):
            assert np.allclose(scales, expected_scales, rtol=1e-6, atol=5 * torch.finfo(torch.float32).eps), shape
            assert (
                np.abs(codes - expected_codes).max() <= 1 and (codes != expected_codes).sum() <= 1 + 0.02 * codes.size
            ), shape


@each_packed_dtype
@each_format
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_push_residual(dtype, bits, layout):
    """The bytes of a push of the difference in float32, which no format rounds."""
    for seed, shape in enumerate(PACKED_SHAPES):
        mine, theirs = (
            torch.zeros((*shape[:-1], PackedLine(shape[-1], bits).bytes), dtype=torch.uint8).cuda() for _ in range(2)
        )
        for push in range(2):
            rng = generator(100 * seed + push)
            x, entry = randn(shape, dtype, rng, layout), randn(shape, dtype, rng, LAYOUTS[seed % len(LAYOUTS)])
            ops.packed_push_residual(mine, on_gpu(x), on_gpu(entry), bits)
            ops.packed_push(theirs, (x.float() - entry.float()).cuda(), bits)
        assert torch.equal(mine, theirs), shape


@each_packed_dtype
@each_format
def test_packed_blend(dtype, bits):
    for seed, shape in enumerate(PACKED_SHAPES):
        rng = generator(seed)
        ring = torch.zeros((*shape[:-1], PackedLine(shape[-1], bits).bytes), dtype=torch.uint8)
        for _ in range(2):
            REFERENCE.packed_push(ring, randn(shape, dtype, rng), bits)
        coefficients = make_coefficients([1.4, -0.4] if bits else [1.4])
        first, second = coefficients[0].double(), coefficients[1].double() if bits else 0.0
        parts = decoded(ring, shape[-1], bits)
        terms = [(first + second) * parts[0]] + ([-second * parts[1]] if bits else [])
        exact, magnitude = sum(terms).reshape(shape), sum(term.abs() for term in terms).reshape(shape)
        assert_close(
            ops.packed_blend(ring.cuda(), coefficients.cuda(), nan(shape, dtype).cuda(), bits).cpu(), exact, magnitude
        )

        x, gate = randn(shape, dtype, rng), randn([1] * (len(shape) - 1) + shape[-1:], torch.float32, rng)
        mine = x.cuda()
        ops.packed_blend_add(mine, gate.cuda(), ring.cuda(), coefficients.cuda(), bits)
        gate = gate.double()
        assert_close(mine.cpu(), x.double() + gate * exact, x.double().abs() + gate.abs() * magnitude)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("height,width", PLANES)
def test_split(dtype, height, width):
    rng, shape, radius = generator(height), [2, 3, height, width], min(height, width) // 5
    uncond, cond = randn(shape, dtype, rng, "permuted"), randn(shape, dtype, rng, "frames")
    low, high = (nan(shape, ops.map_dtype(dtype)).cuda() for _ in range(2))
    ops.cfg_split(low, high, on_gpu(uncond), on_gpu(cond), radius)
    difference = uncond.double() - cond.double()
    exact = plane(spectrum(difference) * low_band(height, width, radius)).real
    magnitude = difference.square().sum((-2, -1), keepdim=True).sqrt().expand(shape)
    assert_close(low.cpu(), exact, magnitude)
    assert_close(high.cpu(), difference - exact, magnitude)


@each_dtype
@pytest.mark.parametrize("cond_half", [0, 1])
def test_reconstruct(dtype, cond_half):
    for seed, (shape, layout) in enumerate(itertools.product(SHAPES, LAYOUTS)):
        rng = generator(seed)
        cond, low, high = randn(shape, dtype, rng, layout), *(randn(shape, ops.map_dtype(dtype), rng) for _ in range(2))
        previous = randn(shape, ops.map_dtype(dtype), rng) if seed % 2 else None
        coefficients = make_coefficients(low=1.2, high=0.7, previous=-0.4)
        third = None if previous is None else previous.cuda()
        terms = [
            cond.double(),
            coefficients[ops.Coefficient.LOW].double() * low.double(),
            coefficients[ops.Coefficient.HIGH].double() * high.double(),
        ]
        if previous is not None:
            terms.append(coefficients[ops.Coefficient.PREVIOUS].double() * previous.double())
        exact, magnitude = sum(terms), sum(term.abs() for term in terms)

        out, source = nan([2 * shape[0], *shape[1:]], dtype).cuda(), on_gpu(cond)
        if layout == "half":  # already in its place
            out.chunk(2)[cond_half].copy_(source)
            source = out.chunk(2)[cond_half]
        ops.cfg_reconstruct(out, source, low.cuda(), high.cuda(), coefficients.cuda(), cond_half, third)
        halves = out.cpu().chunk(2)
        assert torch.equal(halves[cond_half], cond), shape
        assert_close(halves[1 - cond_half], exact, magnitude)


def test_every_op_once():
    """All ops at odd sizes, small enough for compute-sanitizer; inputs come from the host, so that every byte read has
    been written."""
    rng, coefficients = (
        generator(0),
        make_coefficients(
            [1.4, -0.4], [2, 1], push=0, low=1.2, high=1.0, now=0.4, newest=-0.3, previous=-0.5, fresh=0.9
        ),
    )
    ring, x, gate = (randn(shape, torch.bfloat16, rng) for shape in ([3, 2, 37, 129], [2, 37, 129], [2, 1, 129]))
    packed = {bits: torch.zeros((2, 37, PackedLine(129, bits).bytes), dtype=torch.uint8) for bits in (4, 8)}
    cond, uncond = (randn([3, 2, 45, 37], torch.bfloat16, rng) for _ in range(2))
    maps = [randn([3, 2, 45, 37], torch.float32, rng) for _ in range(2)]

    def results(ring, x, gate, coefficients, packed, cond, uncond, low, high):
        found = [torch.empty_like(x) for _ in packed]
        for (bits, bytes_), out in zip(packed.items(), found, strict=True):
            for _ in range(2):
                ops.packed_push(bytes_, x, bits)
            ops.packed_push_residual(bytes_, x, gate.expand_as(x), bits)
            ops.packed_blend(bytes_, coefficients, out, bits)
            ops.packed_blend_add(x.clone(), gate, bytes_, coefficients, bits)
        ops.ring_push(ring, x, coefficients)
        residual, prediction, corrected = ring.clone(), torch.empty_like(x), x.clone()
        ops.ring_push_residual(residual, x, gate.expand_as(x), coefficients)
        ops.prediction_blend(prediction, ring, x, gate.expand_as(x), coefficients)
        ops.prediction_blend(corrected, ring, x, x, coefficients, corrected)
        both, three = cond.repeat(2, 1, 1, 1), cond.repeat(2, 1, 1, 1)
        ops.cfg_reconstruct(both, cond, low, high, coefficients, 0)
        ops.cfg_reconstruct(three, cond, low, high, coefficients, 0, high)
        found += [ring, both, ops.ring_blend(ring, coefficients), residual, prediction, corrected, three]
        ops.ring_blend_add(x, gate, ring, coefficients)
        ops.cfg_split(low, high, uncond, cond, 7)
        return [one.cpu() for one in (*found, x, low, high)]

    given = (ring, x, gate, coefficients, packed, cond, uncond, *maps)
    gpu = [
        {bits: one.cuda() for bits, one in value.items()} if isinstance(value, dict) else value.cuda()
        for value in given
    ]
    for mine, theirs in zip(results(*gpu), results(*given), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_more_elements_than_32_bits_count():
    """Slots that begin beyond element 2**31, and a tensor whose last element lies there."""
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free GPU memory")
    elements = 2**30 + 2**29 + 5
    ring = torch.zeros(3, elements, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(2 * elements, dtype=torch.bfloat16, device="cuda")[1::2]
    ops.ring_push(ring, x, make_coefficients(push=2).cuda())
    assert torch.equal(ring[2], x) and not ring[:2].any()
    assert torch.equal(ops.ring_blend(ring, make_coefficients([1.0], [2]).cuda()), x)
    ops.ring_push_residual(ring, x, ring[2], make_coefficients(push=0).cuda())
    assert not ring[0].any()
    target = torch.zeros(elements, dtype=torch.bfloat16, device="cuda")
    ops.ring_blend_add(target, torch.ones(1, device="cuda"), ring, make_coefficients([2.0], [2]).cuda())
    assert torch.equal(target, 2 * x)


def test_a_cuda_graph_follows_its_coefficients():
    """One recorded graph serves every step: slots, coefficients and weights come from the coefficients at replay."""
    rng = generator(0)
    ring, x, gate = (randn(shape, torch.bfloat16, rng).cuda() for shape in ([3, 2, 40, 64], [2, 40, 64], [1, 1, 64]))
    packed = torch.zeros((2, 40, PackedLine(64, 8).bytes), dtype=torch.uint8, device="cuda")
    uncond, cond = (randn([2, 4, 30, 40], torch.bfloat16, rng).cuda() for _ in range(2))
    low, high, both = (
        torch.zeros(2, 4, 30, 40, device="cuda"),
        torch.zeros(2, 4, 30, 40, device="cuda"),
        cond.repeat(2, 1, 1, 1),
    )
    coefficients, out, packed_out, y = (
        make_coefficients().cuda(),
        torch.empty_like(x),
        torch.empty_like(x),
        torch.empty_like(x),
    )
    previous, residuals, prediction = torch.randn_like(low), torch.zeros_like(ring), torch.empty_like(x)
    packed_residuals = torch.zeros((2, 40, PackedLine(64, 4).bytes), dtype=torch.uint8, device="cuda")
    ops.prepare_cfg_split(30, 40, 6, torch.bfloat16, "cuda")

    def step():
        ops.ring_push(ring, x, coefficients)
        ops.ring_blend(ring, coefficients, out=out)
        y.copy_(x)
        ops.ring_blend_add(y, gate, ring, coefficients)
        ops.packed_push(packed, x, 8)
        ops.packed_blend(packed, coefficients, packed_out, 8)
        ops.cfg_split(low, high, uncond, cond, 6)
        ops.cfg_reconstruct(both, cond, low, high, coefficients, 1, previous)
        ops.ring_push_residual(residuals, x, gate.expand_as(x), coefficients)
        ops.packed_push_residual(packed_residuals, x, gate.expand_as(x), 4)
        ops.prediction_blend(prediction, ring, out, x, coefficients, y)

    def results() -> list[torch.Tensor]:
        found = (ring, out, y, packed, packed_out, low, high, both, residuals, packed_residuals, prediction)
        return [one.clone() for one in found]

    def replayed(new: torch.Tensor) -> list[torch.Tensor]:
        coefficients.copy_(new)
        graph.replay()
        return results()

    def called(new: torch.Tensor) -> list[torch.Tensor]:
        coefficients.copy_(new)
        step()
        return results()

    coefficients.copy_(make_coefficients([1.0], [0], push=0, now=0.0, newest=0.0, previous=0.0, fresh=0.0))
    with torch.cuda.stream(torch.cuda.Stream()):  # compiles
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for slots, push, weight in (([0, 1], 0, 1.2), ([2, 0], 2, 0.8), ([1, 2], 1, 1.0)):
        others = {"now": 0.4, "newest": weight - 1, "previous": 1 - weight, "fresh": 0.9}
        new = make_coefficients([1.5, -0.5], slots, push=push, low=weight, high=2 - weight, **others)
        kept = ring.clone(), packed.clone(), residuals.clone(), packed_residuals.clone()
        by_graph = replayed(new)
        for changed, one in zip((ring, packed, residuals, packed_residuals), kept, strict=True):
            changed.copy_(one)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(by_graph, called(new), strict=True))


def test_ops_run_on_the_current_stream():
    """On a stream that is busy, each op waits for what was queued before it there."""
    x, ring, coefficients = (
        torch.zeros(1 << 20, device="cuda"),
        torch.zeros(3, 1 << 20, device="cuda"),
        make_coefficients([2.0], [1], push=1).cuda(),
    )
    packed = torch.zeros(1, PackedLine(1 << 20, 0).bytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        ops.ring_push(ring, x, coefficients)
        out = ops.ring_blend(ring, coefficients)
        ops.packed_push(packed, out[None], 0)
        back = ops.packed_blend(packed, coefficients, torch.empty(1, 1 << 20, device="cuda"), 0)
    stream.synchronize()
    assert (out == 6).all() and (back - 12).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["x", "coefficients"])
def test_tensors_of_another_device_are_refused(name):
    given = {
        "ring": torch.zeros(2, 8, device="cuda"),
        "x": torch.zeros(8, device="cuda"),
        "coefficients": make_coefficients().cuda(),
    }
    with pytest.raises(ValueError, match=f"{name} is on cpu, expected cuda:0"):
        ops.ring_push(**(given | {name: given[name].cpu()}))
