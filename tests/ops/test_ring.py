"""Push, blend and blend-add, each implementation against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastercache.triton_kernels import ring_blend as ring_blend_module

from .helpers import (
    IMPLEMENTATIONS,
    assert_close,
    dtypes,
    few,
    generator,
    layouts,
    make_coefficients,
    nan,
    nan_ring,
    randn,
    seeds,
    shapes,
)

each_implementation = pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
SLOTS = 5
COEFFICIENTS = (1.75, -0.75, 0.3, -0.1)


def filled_ring(taps, shape, dtype, narrow, rng):
    """A ring whose taps lie in random slots, all else NaN; returns it with the slots."""
    ring = nan_ring(SLOTS, shape, dtype, narrow)
    slots = torch.randperm(SLOTS, generator=rng)[:taps].tolist()
    for slot in slots:
        ring[slot] = randn(shape, dtype, rng)
    return ring, slots


def exact_blend(ring, slots):
    """The blend in float64, and the sum of the absolute values of its terms."""
    coefficients = make_coefficients(COEFFICIENTS[: len(slots)])[: len(slots)].double()  # as float32 holds them
    terms = [c * ring[slot].double() for c, slot in zip(coefficients, slots, strict=True)]
    zero = torch.zeros(ring.shape[1:], dtype=torch.float64)
    return sum(terms, zero), sum((term.abs() for term in terms), zero)


@each_implementation
@few
@given(shape=shapes, dtype=dtypes, layout=layouts, narrow=st.booleans(), slot=st.integers(0, SLOTS - 1), seed=seeds)
def test_push_writes_its_slot_and_nothing_else(ops, shape, dtype, layout, narrow, slot, seed):
    ring = nan_ring(SLOTS, shape, dtype, narrow)
    whole = ring._base if narrow else ring
    x = randn(shape, dtype, generator(seed), layout)
    ops.ring_push(ring, x, make_coefficients(push=slot))
    assert torch.equal(ring[slot], x)
    assert (~whole.isnan()).sum() == x.numel()


@each_implementation
@few
@given(
    shape=shapes,
    dtype=dtypes,
    layout=layouts,
    entry_layout=layouts,
    narrow=st.booleans(),
    slot=st.integers(0, SLOTS - 1),
    seed=seeds,
)
def test_push_residual_writes_its_slot_and_nothing_else(ops, shape, dtype, layout, entry_layout, narrow, slot, seed):
    ring = nan_ring(SLOTS, shape, dtype, narrow)
    whole = ring._base if narrow else ring
    rng = generator(seed)
    x, entry = randn(shape, dtype, rng, layout), randn(shape, dtype, rng, entry_layout)
    ops.ring_push_residual(ring, x, entry, make_coefficients(push=slot))
    assert_close(ring[slot], x.double() - entry.double(), x.double().abs() + entry.double().abs(), operations=1)
    assert (~whole.isnan()).sum() == x.numel()


@each_implementation
def test_a_residual_of_one_tensor_is_zero_and_of_none_is_itself(ops):
    ring = nan_ring(2, [3, 40], torch.bfloat16, False)
    x = randn([3, 40], torch.bfloat16, generator(0))
    ops.ring_push_residual(ring, x, x, make_coefficients(push=0))
    ops.ring_push_residual(ring, x, torch.zeros(1, 1, dtype=torch.bfloat16).expand(3, 40), make_coefficients(push=1))
    assert not ring[0].any() and torch.equal(ring[1], x)


@each_implementation
@few
@given(shape=shapes, dtype=dtypes, narrow=st.booleans(), taps=st.integers(0, 4), seed=seeds)
def test_blend(ops, shape, dtype, narrow, taps, seed):
    ring, slots = filled_ring(taps, shape, dtype, narrow, generator(seed))
    out = ops.ring_blend(ring, make_coefficients(COEFFICIENTS[:taps], slots))
    assert out.dtype == dtype and list(out.shape) == shape and out.is_contiguous()
    assert_close(out, *exact_blend(ring, slots))


@each_implementation
@few
@given(
    shape=shapes,
    dtype=dtypes,
    narrow=st.booleans(),
    taps=st.integers(0, 4),
    kept=st.lists(st.booleans(), min_size=4, max_size=4),
    float32_gate=st.booleans(),
    gate_layout=layouts,
    split=st.booleans(),
    seed=seeds,
)
def test_blend_add(ops, shape, dtype, narrow, taps, kept, float32_gate, gate_layout, split, seed):
    rng = generator(seed)
    ring, slots = filled_ring(taps, shape, dtype, narrow, rng)
    gate_shape = [size if keep else 1 for size, keep in zip(shape, kept, strict=False)]
    gate = randn(gate_shape, torch.float32 if float32_gate else dtype, rng, gate_layout)
    if not any(kept):
        gate = gate.flatten()[:1]  # a scalar gate, with fewer dimensions
    x = randn(shape, dtype, rng)
    if split:  # every second part of a larger tensor: x need not be contiguous
        base = nan([2 * shape[0], *shape[1:]], dtype)
        base[::2] = x
        x = base[::2]
        if len(shape) == 1:
            x = x.contiguous()
    blend, magnitude = exact_blend(ring, slots)
    exact = x.double() + gate.double() * blend
    magnitude = x.double().abs() + gate.double().abs() * magnitude
    ops.ring_blend_add(x, gate, ring, make_coefficients(COEFFICIENTS[:taps], slots))
    assert_close(x, exact, magnitude)
    if split and len(shape) > 1:
        assert base[1::2].isnan().all()


@each_implementation
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives_a_plain_reuse(ops, dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = ops.ring_blend(values[None], make_coefficients([1.0], [0]))
    normal = values.abs() >= torch.finfo(dtype).smallest_normal  # Triton's interpreter flushes bfloat16 subnormals
    assert torch.equal(out.isnan(), values.isnan())
    assert torch.equal(out[normal], values[normal])


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_pytorch(dtype):
    """To nearest with ties to even, into subnormals and to infinity."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    coefficients = make_coefficients([1.0 / 3.0], [0])
    for scale in (1.0 / 3.0, 1.0 + 2.0**-9, 3.7):
        coefficients[0] = scale
        expected = (values.float() * coefficients[0]).to(dtype)
        for name, ops in IMPLEMENTATIONS.items():
            if name != "triton" or dtype == torch.float16:  # the interpreter flushes bfloat16 subnormals
                out = ops.ring_blend(values[None], coefficients)
                assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(
                    out.nan_to_num(), expected.nan_to_num()
                ), (name, scale)


@each_implementation
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_empty(ops, shape):
    ring = torch.zeros(2, *shape)
    ops.ring_push(ring, torch.zeros(shape), make_coefficients())
    ops.ring_blend_add(torch.zeros(shape), torch.ones(1), ring, make_coefficients([1.0], [0]))
    assert ops.ring_blend(ring, make_coefficients([1.0], [0])).shape == shape


@each_implementation
@pytest.mark.parametrize("elements", [1023, 1024, 70001])
def test_more_than_one_block_and_thread(ops, elements):
    """1024 elements are a Triton program's, 32768 a CPU thread's."""
    rng = generator(elements)
    ring, slots = filled_ring(2, [elements], torch.bfloat16, False, rng)
    assert_close(ops.ring_blend(ring, make_coefficients(COEFFICIENTS[:2], slots)), *exact_blend(ring, slots))
    x = randn([elements], torch.bfloat16, rng, "sliced")
    ops.ring_push(ring, x, make_coefficients(push=3))
    assert torch.equal(ring[3], x)


@pytest.mark.parametrize("missing", [0, 3])
def test_large_outputs_are_stored_past_the_caches_and_are_the_same(missing):
    """From 16 MiB on the C++ kernels use other stores, in runs that need not begin or end where a wide store may."""
    elements = 2**23 + 70_000 - missing
    ring = torch.randn(3, elements, generator=generator(0)).to(torch.bfloat16)
    coefficients, x = make_coefficients(COEFFICIENTS[:2], [1, 0], push=2), ring[0] * 2
    dispatched = IMPLEMENTATIONS[next(name for name in IMPLEMENTATIONS if name.startswith("dispatched"))]
    out = dispatched.ring_blend(ring, coefficients)
    whole = torch.full((elements + 8,), torch.nan, dtype=torch.bfloat16)
    unaligned = dispatched.ring_blend(ring, coefficients, out=whole[5 : 5 + elements])
    dispatched.ring_push(ring, x, coefficients)
    assert torch.equal(ring[2], x)
    entry = ring[1]
    dispatched.ring_push_residual(ring, x, entry, coefficients)
    assert torch.equal(ring[2], x - entry)
    small = torch.cat([dispatched.ring_blend(part.contiguous(), coefficients) for part in ring.split(2**20, dim=1)])
    assert torch.equal(out, small) and torch.equal(unaligned, small)
    assert whole[:5].isnan().all() and whole[5 + elements :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("slots, taps", [(1, 1), (2, 0), (2, 1), (2, 2), (5, 4)])
def test_the_plain_form_of_a_compiled_blend_is_the_op(dtype, slots, taps):
    """Within a residual update, traced as one graph without the op in it; slots that no tap names may hold NaN."""
    from fastercache import ops

    torch._dynamo.reset()
    rng = generator(slots + taps)
    ring = nan_ring(slots, [2, 5, 8], dtype, False)
    named = torch.randperm(slots, generator=rng)[:taps].tolist()
    for slot in named:
        ring[slot] = randn([2, 5, 8], dtype, rng)
    coefficients, gate = make_coefficients(COEFFICIENTS[:taps], named), randn([2, 1, 8], dtype, rng)
    calls = []

    def backend(graph, example):
        calls.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    def update(x, gate, ring, coefficients):
        return x + gate * ops.ring_blend(ring, coefficients)

    x = randn([2, 5, 8], dtype, rng)
    with ops.plain_blends():
        out = torch.compile(update, fullgraph=True, backend=backend)(x, gate, ring, coefficients)
    assert len(calls) == 1 and "ring_blend" not in calls[0]
    blend, magnitude = exact_blend(ring, named)
    rounded = torch.finfo(dtype).eps * 3 * gate.double().abs() * magnitude  # of the blend and the product
    error = (out.double() - (x.double() + gate.double() * blend)).abs()
    assert (
        error
        <= rounded + torch.finfo(dtype).eps * (x.double().abs() + (gate.double() * blend).abs()) + 1e-6 * magnitude
    ).all()
    assert_close(ring_blend_module.plain_ring_blend(ring, coefficients), blend, magnitude)


def test_the_op_is_what_compiled_blends_use_by_default():
    from fastercache import ops

    graphs = []

    def backend(graph, example):
        graphs.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compile(lambda ring, coefficients: ops.ring_blend(ring, coefficients) * 2, fullgraph=True, backend=backend)(
        torch.ones(2, 3), make_coefficients([1.0], [1])
    )
    assert "ring_blend" in graphs[0]


def test_the_fallback_reads_only_the_taps_in_use(monkeypatch):
    """The coefficients say on the host which; one read of four slots for every blend took 15 to 100 times as long as
    the plain form."""
    reads = []
    ring, out = torch.ones(5, 300, 1000, dtype=torch.bfloat16), torch.empty(300, 1000, dtype=torch.bfloat16)
    taps = ring_blend_module._taps_on_host
    monkeypatch.setattr(ring_blend_module, "_taps_on_host", lambda *given: reads.append(taps(*given)) or reads[-1])
    coefficients = make_coefficients([1.4, -0.4], [1, 0])
    IMPLEMENTATIONS["reference"].ring_blend(ring, coefficients)
    assert [len(one) for one in reads] == [2]
    with torch.profiler.profile() as profile:
        ring_blend_module.reference_ring_blend(out, ring, coefficients)
    assert (
        sum(event.count for event in profile.key_averages() if event.key in ("aten::copy_", "aten::lerp", "aten::mul"))
        <= 2
    )
