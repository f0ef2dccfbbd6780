"""Prediction blend, each implementation against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastercache.ops import DTYPES, Coefficient

from .helpers import (
    IMPLEMENTATIONS,
    assert_close,
    dtypes,
    few,
    generator,
    layouts,
    make_coefficients,
    nan,
    randn,
    seeds,
    shapes,
)
from .test_ring import COEFFICIENTS, exact_blend, filled_ring

each_implementation = pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
dispatched = IMPLEMENTATIONS[next(name for name in IMPLEMENTATIONS if name.startswith("dispatched"))]
NOW, NEWEST, FRESH = 0.35, -0.3, 0.9


def exact_prediction(ring, slots, coefficients, newest, now, fresh=None):
    """The sum in float64 and that of its terms' absolute values, of the terms whose coefficient is not 0."""
    total, magnitude = exact_blend(ring, slots)
    for field, value in ((Coefficient.NOW, now), (Coefficient.NEWEST, newest), (Coefficient.FRESH, fresh)):
        if value is not None and coefficients[field] != 0:
            term = coefficients[field].double() * value.double()
            total, magnitude = total + term, magnitude + term.abs()
    return total, magnitude


@each_implementation
@few
@given(
    shape=shapes,
    dtype=dtypes,
    narrow=st.booleans(),
    taps=st.integers(0, 4),
    now_layout=layouts,
    fresh_layout=st.none() | layouts,
    seed=seeds,
)
def test_prediction_blend(ops, shape, dtype, narrow, taps, now_layout, fresh_layout, seed):
    rng = generator(seed)
    ring, slots = filled_ring(taps, shape, dtype, narrow, rng)
    newest, now = randn(shape, dtype, rng), randn(shape, dtype, rng, now_layout)
    fresh = None if fresh_layout is None else randn(shape, dtype, rng, fresh_layout)
    coefficients = make_coefficients(
        COEFFICIENTS[:taps], slots, now=NOW, newest=NEWEST, fresh=torch.nan if fresh is None else FRESH
    )
    out = nan(shape, dtype)
    ops.prediction_blend(out, ring, newest, now, coefficients, fresh)
    assert_close(out, *exact_prediction(ring, slots, coefficients, newest, now, fresh))


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unused", ["now", "newest", "fresh", "tap"])
def test_a_tensor_whose_coefficient_is_0_may_hold_anything(ops, dtype, unused):
    rng, shape = generator(0), [3, 401]
    ring, slots = filled_ring(2, shape, dtype, False, rng)
    given = {name: randn(shape, dtype, rng) for name in ("newest", "now", "fresh")}
    weights = {"now": NOW, "newest": NEWEST, "fresh": FRESH}
    taps = list(COEFFICIENTS[:2])
    if unused == "tap":
        taps[1], ring[slots[1]] = 0.0, torch.nan
        slots_used = slots[:1]
    else:
        weights[unused], slots_used = 0.0, slots
        given[unused].fill_(torch.nan)
    coefficients, out = make_coefficients(taps, slots, **weights), nan(shape, dtype)
    ops.prediction_blend(out, ring, given["newest"], given["now"], coefficients, given["fresh"])
    assert_close(out, *exact_prediction(ring, slots_used, coefficients, **given))


@each_implementation
def test_nothing_in_use_is_zero(ops):
    out = nan([2, 5], torch.float32)
    ops.prediction_blend(
        out, nan([2, 2, 5], torch.float32), out.clone(), out.clone(), make_coefficients(now=0.0, newest=0.0), None
    )
    assert not out.any()


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fresh_prediction_is_corrected_in_place(ops, dtype):
    rng, shape = generator(0), [2, 3, 700]
    ring, slots = filled_ring(2, shape, dtype, False, rng)
    newest, now, fresh = (randn(shape, dtype, rng) for _ in range(3))
    coefficients, out = (
        make_coefficients(COEFFICIENTS[:2], slots, now=NOW, newest=NEWEST, fresh=FRESH),
        nan(shape, dtype),
    )
    ops.prediction_blend(out, ring, newest, now, coefficients, fresh)
    ops.prediction_blend(fresh, ring, newest, now, coefficients, fresh)
    assert torch.equal(fresh, out)


@each_implementation
def test_broadcast_latents(ops):
    """`now` of one prompt for both branches: a batch dimension of stride 0."""
    rng, shape = generator(0), [2, 4, 50]
    ring, slots = filled_ring(1, shape, torch.bfloat16, False, rng)
    newest, now = randn(shape, torch.bfloat16, rng), randn([1, 4, 50], torch.bfloat16, rng).expand(shape)
    coefficients, out = make_coefficients([1.0], slots, now=NOW, newest=NEWEST), nan(shape, torch.bfloat16)
    ops.prediction_blend(out, ring, newest, now, coefficients)
    exact = exact_prediction(ring, [], coefficients, newest, now)
    tap = ring[slots[0]].double()
    assert_close(out, exact[0] + tap, exact[1] + tap.abs())


@each_implementation
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_empty(ops, shape):
    empty = torch.zeros(shape)
    ops.prediction_blend(
        empty.clone(), torch.zeros(2, *shape), empty, empty, make_coefficients([1.0], [0], now=1.0, newest=1.0), empty
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_predictions_are_stored_past_the_caches_and_are_the_same(dtype):
    """From 4 MiB on the C++ kernel uses other stores, and several threads."""
    elements = 2**21 + 70_001
    rng = generator(0)
    ring, (newest, now, fresh) = randn([2, elements], dtype, rng), randn([3, elements], dtype, rng)
    coefficients = make_coefficients(COEFFICIENTS[:2], [1, 0], now=NOW, newest=NEWEST, fresh=FRESH)
    whole = nan([elements + 8], dtype)
    out = whole[5 : 5 + elements]
    dispatched.prediction_blend(out, ring, newest, now, coefficients, fresh)
    parts = torch.arange(elements).split(2**18)
    small = nan([elements], dtype)
    for part in parts:
        piece = slice(int(part[0]), int(part[-1]) + 1)
        dispatched.prediction_blend(
            small[piece], ring[:, piece].contiguous(), newest[piece], now[piece], coefficients, fresh[piece]
        )
    assert torch.equal(out, small) and whole[:5].isnan().all() and whole[5 + elements :].isnan().all()
    dispatched.prediction_blend(fresh, ring, newest, now, coefficients, fresh)
    assert torch.equal(fresh, small)
