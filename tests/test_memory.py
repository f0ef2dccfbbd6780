"""The cache's formats and its budget: what is promised before a run is what is allocated, and what cannot be is
refused."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from models import MODELS, OTHERS, TWO_CALLS, arguments, call, cogvideox, latte
from torch._subclasses.fake_tensor import FakeTensorMode

import fastercache
from fastercache import CacheError, RunError, Schedule, Step, ops, policies
from fastercache.cache import layout
from fastercache.cache import room as room_module
from fastercache.cache.budget import FORMATS, CacheBudget
from fastercache.cache.cache import CachePlan
from fastercache.cache.formats import format_of
from fastercache.cache.ring import RingSpec
from fastercache.models.registry import family_of

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
    """At a width that fills its blocks the packed formats take the bytes that packed.py promises, and one tap takes
    half again."""
    shape = (6, 10, 256)
    sizes = {name: format_of(name).bytes(RingSpec(0, ("cond",), 2, shape, torch.bfloat16)) for name in FORMATS}
    lines = 6 * 10

    def aligned(size):
        return -(-size // 256) * 256

    assert sizes == {
        "model": 2 * lines * 512,
        "int8": aligned(lines * (256 + 256 + 16)),
        "int8-int4": aligned(lines * (256 + 128 + 16)),
    }
    assert format_of("int8").bytes(RingSpec(0, ("cond",), 1, shape, torch.bfloat16)) == aligned(lines * (256 + 16))


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
    with pytest.raises(
        CacheError, match=rf"max_cache_bytes=1,000 .*model: {lossless.cache_bytes:,} bytes.*int8-int4: "
    ):
        sample(model)
    with fastercache.disabled(model):
        assert torch.equal(sample(model), before)


@has_packed
def test_formats_are_tried_best_first():
    plans = {
        name: CachePlan(
            (RingSpec(0, ("cond",), 2, (6, 10, 256), torch.bfloat16),), name, 1, 0, (), 0, (), False, torch.float32
        )
        for name in FORMATS
    }
    for limit, expected in ((None, "model"), *((plan.bytes, name) for name, plan in plans.items())):
        chosen, note, _ = CacheBudget(max_bytes=limit).choose(plans.__getitem__, CPU)
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


@pytest.mark.parametrize(
    "wrong", [{"cache_format": "fp8"}, {"max_cache_bytes": -1}, {"max_cache_bytes": 1.5e9}, {"max_cache_bytes": True}]
)
def test_bad_options_leave_the_model_alone(wrong):
    model = latte()
    name, value = next(iter(wrong.items()))
    with pytest.raises(CacheError, match=f"{name} is {value!r}"):
        fastercache.compile(model, steps=STEPS, cfg="none", **wrong)
    fastercache.compile(model, steps=STEPS, cfg="none")


def storages(model) -> int:
    """Bytes that the caches of a compiled model hold now."""
    scope = model._fastercache_engine.scopes.current
    return 0 if scope is None or scope.run is None or scope.run._cache is None else scope.run._cache.bytes


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
    for slots, lines, line_bytes in ((1, 1, 1), (2, 3, 100), (4, 7, 4096), (3, 1, 257)):
        mine, theirs = layout._RingLayout(slots, lines, line_bytes), extension.RingLayout(slots, lines, line_bytes)
        assert (mine.bytes, mine.slot_stride_bytes) == (theirs.bytes, theirs.slot_stride_bytes)


# ---- the limit that the device sets ----------------------------------------------------------------------------------


def given(monkeypatch, free, total=100_000, freely=0.0):
    """Say what every device has free, and count how often the activations are counted."""
    counts = []
    count = room_module.activation_bytes
    monkeypatch.setattr(room_module, "SMALL", 0)
    monkeypatch.setattr(room_module, "FREELY", freely)  # these models' caches are small beside their activations
    monkeypatch.setattr(room_module, "memory_of", lambda device: (free, total))
    monkeypatch.setattr(
        room_module, "activation_bytes", lambda *arguments: counts.append(count(*arguments)) or counts[-1]
    )
    return counts


def test_a_small_run_is_not_counted(monkeypatch):
    counts = given(monkeypatch, free=10**9, freely=room_module.FREELY)
    _, summary = cached(latte(torch.float32))
    assert summary.cache_format == "model" and not counts and "in the model's dtype, lossless" in str(summary)


@has_packed
@pytest.mark.parametrize("backend", [None, "eager"])
def test_without_a_limit_the_best_format_that_the_device_has_room_for_is_taken(monkeypatch, backend):
    given(monkeypatch, free=10**9)
    _, lossless = cached(latte(torch.float32))
    activations = room_module.activation_bytes(latte(torch.float32), arguments(latte(torch.float32), 4))
    margin = 5_000
    given(monkeypatch, free=lossless.cache_bytes + activations + margin)
    _, fits = cached(latte(torch.float32), backend=backend)
    assert fits.cache_format == "model" and not fits.notes
    counts = given(monkeypatch, free=lossless.cache_bytes + activations + margin - 1)
    model = latte(torch.float32)
    _, packed = cached(model, backend=backend)
    assert packed.cache_format == "int8" and packed.cache_bytes < lossless.cache_bytes
    assert re.search(
        rf"caches are kept in int8, to fit .* a step takes .*model: {lossless.cache_bytes:,} bytes", str(packed)
    )
    sample(model)
    assert counts == [activations]  # once for each shape


def test_where_nothing_fits_the_run_is_refused_before_its_first_step(monkeypatch):
    _, lossless = cached(latte(torch.float32))
    given(monkeypatch, free=1000)
    model = latte(torch.float32)
    fastercache.compile(model, steps=STEPS, cfg="uncond-first")
    ran = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(
        CacheError, match=rf"no cache fits the 0\.00 GB left on cpu .*model: {lossless.cache_bytes:,} bytes.*offload"
    ):
        sample(model)
    assert len(ran) <= 1  # the count's, on shapes
    fastercache.restore(model)
    _, trusted = cached(model, max_cache_bytes=lossless.cache_bytes)
    assert trusted.cache_format == "model"  # a limit of one's own is not questioned


@has_packed
def test_a_fixed_format_that_does_not_fit_names_those_that_would(monkeypatch):
    model = latte(torch.float32)
    _, lossless = cached(model)
    fastercache.restore(model)
    fastercache.compile(
        model, steps=STEPS, cfg="uncond-first", cache_format="model", max_cache_bytes=lossless.cache_bytes - 1
    )
    with pytest.raises(CacheError, match=r"model: .* bytes, over the limit; int8: .* bytes would fit"):
        sample(model)


def test_what_cannot_be_counted_leaves_a_quarter_and_says_so(monkeypatch):
    _, lossless = cached(latte(torch.float32))

    def raising(*arguments):
        raise ValueError("reads its inputs")

    given(monkeypatch, free=2 * lossless.cache_bytes, total=4 * lossless.cache_bytes)
    monkeypatch.setattr(room_module, "activation_bytes", raising)
    model = latte(torch.float32)
    fastercache.compile(model, steps=STEPS, cfg="uncond-first", cache_format="model")
    with pytest.raises(CacheError, match=r"a quarter of all, as it cannot be counted \(ValueError: reads its inputs\)"):
        sample(model)


def test_the_plans_that_are_kept_hold_no_tensor_of_a_call():
    model = fastercache.compile(cogvideox(), "paper", steps=6, cfg="uncond-first")
    inputs = arguments(model, 2)
    for _ in range(6):
        model(**inputs)
    text = weakref.ref(inputs["encoder_hidden_states"])
    del inputs
    gc.collect()
    assert text() is None


@pytest.mark.parametrize("family", ["hunyuan", "hunyuan15", "wan"])
def test_activations_counted_on_shapes_are_those_of_a_step(family):
    """Within 10 % of what the operations of a real call hold at most."""
    model = (OTHERS | TWO_CALLS)[family](torch.float32)
    real = room_module._LiveBytes()
    with real:
        model(**call(model, 4))
    counted = room_module.activation_bytes(model, family_of(model).countable(call(model, 4)))
    assert abs(counted - real.most) <= 0.1 * real.most


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_main_memory_respects_control_groups(tmp_path):
    assert room_module.host_memory(tmp_path) is None
    write(tmp_path / "proc/meminfo", "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 800 kB\n")
    assert room_module.host_memory(tmp_path) == (800 * 1024, 1000 * 1024)
    write(tmp_path / "proc/self/cgroup", "0::/job/step\n")
    groups = tmp_path / "sys/fs/cgroup"
    write(groups / "job/step/memory.max", "max\n")
    write(groups / "job/step/memory.current", "5\n")
    write(groups / "job/memory.max", "100000\n")  # the limit is the parent's
    write(groups / "job/memory.current", "60000\n")
    write(groups / "job/memory.stat", "anon 1\ninactive_file 10000\n")
    assert room_module.host_memory(tmp_path) == (50000, 100000)
    write(tmp_path / "proc/self/cgroup", "4:memory:/elsewhere\n")  # version 1, seen from inside a container
    write(groups / "memory/memory.limit_in_bytes", "70000")
    write(groups / "memory/memory.usage_in_bytes", "30000")
    assert room_module.host_memory(tmp_path) == (40000, 70000)
    write(groups / "memory/memory.limit_in_bytes", str(2**63 - 4096))
    assert room_module.host_memory(tmp_path) == (800 * 1024, 1000 * 1024)


class Accelerator:
    """What torch says of a device's memory: 10 GB of 80 free, 6 reserved, of which 2 hold tensors."""

    share = 1.0
    mem_get_info = staticmethod(lambda device: (10**10, 8 * 10**10))
    memory_reserved = staticmethod(lambda device: 6 * 10**9)
    memory_allocated = staticmethod(lambda device: 2 * 10**9)

    @classmethod
    def get_per_process_memory_fraction(cls, device):
        return cls.share


def test_memory_of_a_gpu_counts_what_torch_has_reserved(monkeypatch):
    monkeypatch.setattr(torch, "cuda", Accelerator)
    device = torch.device("cuda", 0)
    assert room_module.memory_of(device) == (14 * 10**9, 8 * 10**10)
    monkeypatch.setattr(Accelerator, "share", 0.1)
    assert room_module.memory_of(device)[0] == 6 * 10**9


# ---- several devices -------------------------------------------------------------------------------------------------


def test_a_model_on_several_devices_is_refused_as_a_run_begins():
    model = latte()
    fastercache.compile(model, steps=STEPS, cfg="uncond-first")
    model.hf_device_map = {"pos_embed": 0, "transformer_blocks.0": 0, "transformer_blocks.1": 1, "proj_out": "cpu"}
    with pytest.raises(RunError, match=r"spread over 2 devices \(device 0, device 1\)"):
        sample(model)
    model.hf_device_map = {"pos_embed": 0, "transformer_blocks": "cpu"}  # offloaded, and run on one
    sample(model)
    with FakeTensorMode():  # devices that are not there
        for place, layer in enumerate((model.transformer_blocks[0], model.proj_out)):
            layer.there = torch.nn.Parameter(torch.empty(1, device=f"cuda:{place}"))
    model.hf_device_map = None
    with pytest.raises(RunError, match=r"spread over 2 devices \(cuda:0, cuda:1\)"):
        sample(model)
