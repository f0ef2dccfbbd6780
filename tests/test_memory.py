"""The cache's formats and its budget: what is promised before a run is what is allocated, and what cannot be is refused."""

from __future__ import annotations

import pytest
import torch
from models import MODELS, arguments, cogvideox, latte

import fastercache
from fastercache import CacheError, RunError, Schedule, Step, layout, ops, policies
from fastercache.memory import FORMATS, CacheBudget, CachePlan, RingPlan

CPU = torch.device("cpu")
has_packed = pytest.mark.skipif(ops.packed_missing(CPU) is not None, reason="packed caches need the C++ library")
STEPS = 12


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def sample(model, rows=4):
    inputs = arguments(model, rows)
    return torch.stack([model(**inputs)[0] for _ in range(STEPS)])


def cached(model, **options):
    """Predictions of a run and its summary."""
    fastercache.compile(model, options.pop("schedule", "paper"), steps=STEPS, cfg="uncond-first", **options)
    return sample(model), fastercache.summary(model)


@has_packed
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("policy", [policies.paper, policies.plain, policies.dynamic_only])
@pytest.mark.parametrize("format, error", [("int8", 0.02), ("int8-int4", 0.1)])
def test_a_packed_run_is_near_the_lossless_one(family, policy, format, error):
    """The tolerance is a share of what caching itself changes, so a cache that does nothing would not pass either."""
    uncached = sample(MODELS[family](torch.float32))
    lossless, _ = cached(MODELS[family](torch.float32), schedule=policy)
    packed, summary = cached(MODELS[family](torch.float32), schedule=policy, cache_format=format)
    assert summary.cache_format == format and summary.cache_bytes == summary.cache_bytes_planned
    assert set(summary.implementations) >= {"packed_push", "packed_blend"}
    scale = uncached.abs().mean()
    assert 0 < (packed - lossless).abs().mean() <= error * scale


@has_packed
def test_bytes_of_each_format():
    """At a width that fills its blocks the packed formats take the bytes that packed.py promises, and one tap takes half again."""
    shape = (6, 10, 256)
    sizes = {name: RingPlan(0, 0, ("cond",), 2, shape, torch.bfloat16, name).bytes for name in FORMATS}
    lines = 6 * 10

    def aligned(size):
        return -(-size // 256) * 256

    assert sizes == {
        "model": 2 * lines * 512,
        "int8": aligned(lines * (256 + 256 + 16)),
        "int8-int4": aligned(lines * (256 + 128 + 16)),
    }
    assert RingPlan(0, 0, ("cond",), 1, shape, torch.bfloat16, "int8").bytes == aligned(lines * (256 + 16))


@has_packed
def test_the_best_format_that_fits_is_taken_and_said():
    _, lossless = cached(latte(torch.float32))
    assert lossless.cache_format == "model" and not any("max_cache_bytes" in note for note in lossless.notes)
    _, at_the_limit = cached(latte(torch.float32), max_cache_bytes=lossless.cache_bytes)
    assert at_the_limit.cache_format == "model"
    _, below = cached(latte(torch.float32), max_cache_bytes=lossless.cache_bytes - 1)
    assert below.cache_format == "int8" and below.cache_bytes < lossless.cache_bytes
    assert f"max_cache_bytes={lossless.cache_bytes - 1:,}" in str(below)

    model = latte(torch.float32)
    before = sample(latte(torch.float32))
    fastercache.compile(model, steps=STEPS, cfg="uncond-first", max_cache_bytes=1000)
    with pytest.raises(CacheError, match=rf"max_cache_bytes=1,000 .*model: {lossless.cache_bytes:,} bytes.*int8-int4: "):
        sample(model)
    with fastercache.disabled(model):
        assert torch.equal(sample(model), before)


@has_packed
def test_formats_are_tried_best_first():
    plans = {
        name: CachePlan((RingPlan(0, 0, ("cond",), 2, (6, 10, 256), torch.bfloat16, name),), None, torch.float32, name) for name in FORMATS
    }
    for limit, expected in ((None, "model"), *((plan.bytes, name) for name, plan in plans.items())):
        chosen, note = CacheBudget(max_bytes=limit).choose(plans.__getitem__, CPU)
        assert chosen.format == expected and (note is None) == (expected == "model")
    with pytest.raises(CacheError, match=f"int8-int4: {plans['int8-int4'].bytes:,} bytes, over the limit"):
        CacheBudget(max_bytes=plans["int8-int4"].bytes - 1).choose(plans.__getitem__, CPU)


def test_a_limit_holds_for_a_fixed_format_too():
    model = latte(torch.float32)
    fastercache.compile(model, steps=STEPS, cfg="uncond-first", cache_format="model", max_cache_bytes=1000)
    with pytest.raises(CacheError, match=r"model: .* bytes, over the limit"):
        sample(model)


def test_what_a_packed_format_cannot_hold():
    model = cogvideox()
    fastercache.compile(model, steps=STEPS, cfg="uncond-first", cache_format="int8")
    with pytest.raises(CacheError, match=r"the model is torch\.float64|packed"):
        sample(model)
    three_taps = Schedule((*(Step() for _ in range(STEPS - 1)), Step("both", ("attention",), (3.0, -3.0, 1.0))))
    model = latte(torch.float32)
    fastercache.compile(model, three_taps, steps=STEPS, cfg="uncond-first", cache_format="int8")
    with pytest.raises(CacheError, match="holds 2 taps, and the schedule blends 3"):
        sample(model)


@pytest.mark.parametrize("wrong", [{"cache_format": "fp8"}, {"max_cache_bytes": -1}, {"max_cache_bytes": 1.5e9}])
def test_bad_options_leave_the_model_alone(wrong):
    model = latte()
    name, value = next(iter(wrong.items()))
    with pytest.raises(CacheError, match=f"{name} is {value!r}"):
        fastercache.compile(model, steps=STEPS, cfg="none", **wrong)
    fastercache.compile(model, steps=STEPS, cfg="none")


def storages(model) -> int:
    """Bytes that the caches of a compiled model hold now."""
    run = model._fastercache_engine._run
    return 0 if run is None or run.cache is None else run.cache.bytes


def test_caches_are_gone_after_the_last_step_and_after_release():
    model = latte()
    fastercache.compile(model)
    with fastercache.run(model, steps=STEPS, cfg="uncond-first"):
        inputs = arguments(model, 4)
        for _ in range(STEPS - 1):
            model(**inputs)
        assert storages(model) > 0
        with pytest.raises(RunError, match="a run is under way"):
            fastercache.release(model)
        model(**inputs)
        assert storages(model) == 0  # inside the run still: a pipeline decodes here
    fastercache.restore(model)

    fastercache.compile(model, steps=STEPS, cfg="uncond-first")
    for _ in range(5):
        model(**inputs)
    assert storages(model) > 0
    assert fastercache.release(model) is model and storages(model) == 0
    assert "released before its last step" in str(fastercache.summary(model))
    assert torch.equal(sample(model), sample(model))


def test_the_python_layout_is_that_of_the_extension():
    extension = pytest.importorskip("fastercache._layout", exc_type=ImportError)
    for slots, rows, row_bytes in ((1, 1, 1), (2, 3, 100), (4, 7, 4096), (3, 1, 257)):
        mine, theirs = layout._RingLayout(slots, rows, row_bytes), extension.RingLayout(slots, rows, row_bytes)
        assert (mine.bytes, mine.slot_stride_bytes) == (theirs.bytes, theirs.slot_stride_bytes)
