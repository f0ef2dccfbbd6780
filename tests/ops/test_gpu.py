"""The ops on a GPU, as users call them, against float64 on the CPU: `pytest tests/ops/test_gpu.py`."""

import itertools
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first CUDA call; tests run with deterministic algorithms

import numpy as np
import pytest
import torch

from fastercache import ops
from fastercache.ops import PACKED_DTYPES, PackedRow

from .helpers import IMPLEMENTATIONS, LAYOUTS, assert_close, generator, make_row, nan, nan_ring, randn
from .test_cfg import low_band, plane, spectrum
from .test_packed import codes_and_scales, decoded
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
    assert all(chosen["cuda"] in ("CUDA C++", "Triton") for chosen in ops.implementations().values()), ops.fallback_reasons()


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_push_writes_its_slot_and_nothing_else(dtype, layout):
    for seed, (shape, narrow) in enumerate(itertools.product(SHAPES, (False, True))):
        ring, x = on_gpu(nan_ring(SLOTS, shape, dtype, narrow)), randn(shape, dtype, generator(seed), layout)
        ops.ring_push(ring, on_gpu(x), make_row(push=seed % SLOTS).cuda())
        assert torch.equal(ring[seed % SLOTS].cpu(), x), shape
        assert (~whole(ring).isnan()).sum() == x.numel(), shape


@each_dtype
@pytest.mark.parametrize("taps", range(5))
def test_blend(dtype, taps):
    for seed, (shape, narrow) in enumerate(itertools.product(SHAPES, (False, True))):
        ring, slots = filled_ring(taps, shape, dtype, narrow, generator(seed))
        out = ops.ring_blend(on_gpu(ring), make_row(COEFFICIENTS[:taps], slots).cuda())
        assert_close(out.cpu(), *exact_blend(ring, slots))


@each_dtype
@pytest.mark.parametrize("float32_gate", [False, True])
def test_blend_add(dtype, float32_gate):
    for seed, (shape, kept) in enumerate(itertools.product(SHAPES, ("all", "last", "first", "none"))):
        rng = generator(seed)
        ring, slots = filled_ring(2, shape, dtype, False, rng)
        keep = {"all": slice(None), "last": slice(len(shape) - 1, None), "first": slice(0, 1), "none": slice(0, 0)}[kept]
        gate_shape = [1] * len(shape)
        gate_shape[keep] = shape[keep]
        gate = randn(gate_shape, torch.float32 if float32_gate else dtype, rng, LAYOUTS[seed % len(LAYOUTS)])
        base = nan([2 * shape[0], *shape[1:]], dtype)
        x = base[::2] if len(shape) > 1 else base[: shape[0]]  # every second row of a larger tensor
        x.copy_(randn(shape, dtype, rng))
        blend, magnitude = exact_blend(ring, slots)
        exact, magnitude = x.double() + gate.double() * blend, x.double().abs() + gate.double().abs() * magnitude
        mine = on_gpu(x)
        ops.ring_blend_add(mine, on_gpu(gate), on_gpu(ring), make_row(COEFFICIENTS[:2], slots).cuda())
        assert_close(mine.cpu(), exact, magnitude)
        assert (~whole(mine).isnan()).sum() == x.numel(), shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_pytorch(dtype):
    """Of every 16-bit value times a few factors: to nearest, ties to even, into subnormals and to infinity."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale in (1.0, 1.0 / 3.0, 1.0 + 2.0**-9, 3.7):
        row = make_row([scale], [0])
        expected = (values.float() * row[0]).to(dtype)
        out = ops.ring_blend(values[None].cuda(), row.cuda()).cpu()
        assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.nan_to_num(), expected.nan_to_num()), scale


@each_packed_dtype
@each_format
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_push(dtype, bits, layout):
    """A push writes what the reference does; a value half-way between two codes may take either.

    A difference is known to the rounding of the outputs, which are up to about 5, in float32.
    """
    for seed, shape in enumerate(PACKED_SHAPES):
        expected = torch.full((*shape[:-1], PackedRow(shape[-1], bits).bytes), 255, dtype=torch.uint8)  # the scales are NaN
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
            assert np.abs(codes - expected_codes).max() <= 1 and (codes != expected_codes).sum() <= 1 + 0.02 * codes.size, shape


@each_packed_dtype
@each_format
def test_packed_blend(dtype, bits):
    for seed, shape in enumerate(PACKED_SHAPES):
        rng = generator(seed)
        ring = torch.zeros((*shape[:-1], PackedRow(shape[-1], bits).bytes), dtype=torch.uint8)
        for _ in range(2):
            REFERENCE.packed_push(ring, randn(shape, dtype, rng), bits)
        row = make_row([1.4, -0.4] if bits else [1.4])
        first, second = row[0].double(), row[1].double() if bits else 0.0
        parts = decoded(ring, shape[-1], bits)
        terms = [(first + second) * parts[0]] + ([-second * parts[1]] if bits else [])
        exact, magnitude = sum(terms).reshape(shape), sum(term.abs() for term in terms).reshape(shape)
        assert_close(ops.packed_blend(ring.cuda(), row.cuda(), nan(shape, dtype).cuda(), bits).cpu(), exact, magnitude)

        x, gate = randn(shape, dtype, rng), randn([1] * (len(shape) - 1) + shape[-1:], torch.float32, rng)
        mine = x.cuda()
        ops.packed_blend_add(mine, gate.cuda(), ring.cuda(), row.cuda(), bits)
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
def test_reconstruct_and_guide(dtype, cond_half):
    for seed, (shape, layout) in enumerate(itertools.product(SHAPES, LAYOUTS)):
        rng = generator(seed)
        cond, low, high = randn(shape, dtype, rng, layout), *(randn(shape, ops.map_dtype(dtype), rng) for _ in range(2))
        row, scale = make_row(low=1.2, high=0.7), torch.tensor([7.5])
        terms = [cond.double(), row[ops.Row.LOW].double() * low.double(), row[ops.Row.HIGH].double() * high.double()]
        exact, magnitude = sum(terms), sum(term.abs() for term in terms)

        out, source = nan([2 * shape[0], *shape[1:]], dtype).cuda(), on_gpu(cond)
        if layout == "half":  # already in its place
            out.chunk(2)[cond_half].copy_(source)
            source = out.chunk(2)[cond_half]
        ops.cfg_reconstruct(out, source, low.cuda(), high.cuda(), row.cuda(), cond_half)
        halves = out.cpu().chunk(2)
        assert torch.equal(halves[cond_half], cond), shape
        assert_close(halves[1 - cond_half], exact, magnitude)

        guided = ops.cfg_guide(on_gpu(cond), low.cuda(), high.cuda(), row.cuda(), scale.cuda())
        assert_close(guided.cpu(), cond.double() + (1 - 7.5) * (exact - cond.double()), 7.5 * magnitude)


def test_every_op_once():
    """All ops at odd sizes, small enough for compute-sanitizer; inputs come from the host, so that every byte read has been written."""
    rng, row = generator(0), make_row([1.4, -0.4], [2, 1], push=0, low=1.2, high=1.0)
    ring, x, gate = (randn(shape, torch.bfloat16, rng) for shape in ([3, 2, 37, 129], [2, 37, 129], [2, 1, 129]))
    packed = {bits: torch.zeros((2, 37, PackedRow(129, bits).bytes), dtype=torch.uint8) for bits in (4, 8)}
    cond, uncond = (randn([3, 2, 45, 37], torch.bfloat16, rng) for _ in range(2))
    maps = [randn([3, 2, 45, 37], torch.float32, rng) for _ in range(2)]

    def results(ring, x, gate, row, packed, cond, uncond, low, high, scale):
        found = [torch.empty_like(x) for _ in packed]
        for (bits, bytes_), out in zip(packed.items(), found, strict=True):
            for _ in range(2):
                ops.packed_push(bytes_, x, bits)
            ops.packed_blend(bytes_, row, out, bits)
            ops.packed_blend_add(x.clone(), gate, bytes_, row, bits)
        ops.ring_push(ring, x, row)
        both = cond.repeat(2, 1, 1, 1)
        ops.cfg_reconstruct(both, cond, low, high, row, 0)
        found += [ring, both, ops.ring_blend(ring, row), ops.cfg_guide(cond, low, high, row, scale)]
        ops.ring_blend_add(x, gate, ring, row)
        ops.cfg_split(low, high, uncond, cond, 7)
        return [one.cpu() for one in (*found, x, low, high)]

    given = (ring, x, gate, row, packed, cond, uncond, *maps, torch.tensor([7.5]))
    gpu = [{bits: one.cuda() for bits, one in value.items()} if isinstance(value, dict) else value.cuda() for value in given]
    for mine, theirs in zip(results(*gpu), results(*given), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_more_elements_than_32_bits_count():
    """Slots that begin beyond element 2**31, and a tensor whose last element lies there."""
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free GPU memory")
    elements = 2**30 + 2**29 + 5
    ring = torch.zeros(3, elements, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(2 * elements, dtype=torch.bfloat16, device="cuda")[1::2]
    ops.ring_push(ring, x, make_row(push=2).cuda())
    assert torch.equal(ring[2], x) and not ring[:2].any()
    assert torch.equal(ops.ring_blend(ring, make_row([1.0], [2]).cuda()), x)
    target = torch.zeros(elements, dtype=torch.bfloat16, device="cuda")
    ops.ring_blend_add(target, torch.ones(1, device="cuda"), ring, make_row([2.0], [2]).cuda())
    assert torch.equal(target, 2 * x)


def test_a_cuda_graph_follows_its_row():
    """One recorded graph serves every step: slots, coefficients and weights come from the row at replay."""
    rng = generator(0)
    ring, x, gate = (randn(shape, torch.bfloat16, rng).cuda() for shape in ([3, 2, 40, 64], [2, 40, 64], [1, 1, 64]))
    packed = torch.zeros((2, 40, PackedRow(64, 8).bytes), dtype=torch.uint8, device="cuda")
    uncond, cond = (randn([2, 4, 30, 40], torch.bfloat16, rng).cuda() for _ in range(2))
    low, high, both = torch.zeros(2, 4, 30, 40, device="cuda"), torch.zeros(2, 4, 30, 40, device="cuda"), cond.repeat(2, 1, 1, 1)
    row, out, packed_out, y = make_row().cuda(), torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    ops.prepare_cfg_split(30, 40, 6, torch.bfloat16, "cuda")

    def step():
        ops.ring_push(ring, x, row)
        ops.ring_blend(ring, row, out=out)
        y.copy_(x)
        ops.ring_blend_add(y, gate, ring, row)
        ops.packed_push(packed, x, 8)
        ops.packed_blend(packed, row, packed_out, 8)
        ops.cfg_split(low, high, uncond, cond, 6)
        ops.cfg_reconstruct(both, cond, low, high, row, 1)

    def replayed(new: torch.Tensor) -> list[torch.Tensor]:
        row.copy_(new)
        graph.replay()
        return [one.clone() for one in (ring, out, y, packed, packed_out, low, high, both)]

    def called(new: torch.Tensor) -> list[torch.Tensor]:
        row.copy_(new)
        step()
        return [one.clone() for one in (ring, out, y, packed, packed_out, low, high, both)]

    row.copy_(make_row([1.0], [0], push=0))
    with torch.cuda.stream(torch.cuda.Stream()):  # compiles
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for slots, push, weight in (([0, 1], 0, 1.2), ([2, 0], 2, 0.8), ([1, 2], 1, 1.0)):
        new = make_row([1.5, -0.5], slots, push=push, low=weight, high=2 - weight)
        kept = ring.clone(), packed.clone()
        by_graph = replayed(new)
        ring.copy_(kept[0])
        packed.copy_(kept[1])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(by_graph, called(new), strict=True))


def test_ops_run_on_the_current_stream():
    """On a stream that is busy, each op waits for what was queued before it there."""
    x, ring, row = torch.zeros(1 << 20, device="cuda"), torch.zeros(3, 1 << 20, device="cuda"), make_row([2.0], [1], push=1).cuda()
    packed = torch.zeros(1, PackedRow(1 << 20, 0).bytes, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        ops.ring_push(ring, x, row)
        out = ops.ring_blend(ring, row)
        ops.packed_push(packed, out[None], 0)
        back = ops.packed_blend(packed, row, torch.empty(1, 1 << 20, device="cuda"), 0)
    stream.synchronize()
    assert (out == 6).all() and (back - 12).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["x", "row"])
def test_tensors_of_another_device_are_refused(name):
    given = {"ring": torch.zeros(2, 8, device="cuda"), "x": torch.zeros(8, device="cuda"), "row": make_row().cuda()}
    with pytest.raises(ValueError, match=f"{name} is on cpu, expected cuda:0"):
        ops.ring_push(**(given | {name: given[name].cpu()}))
