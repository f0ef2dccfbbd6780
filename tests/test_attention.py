"""diffusers' attention backends under the engine: the one that is set is the one that runs, compiled or not, and "auto"
picks by its times.

An installed FlashAttention is played by functions in diffusers' own registry, under its name.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from longer import longer
from models import MODELS, OTHERS, TWO_CALLS, arguments, call, cogvideox, hunyuan, ltx, wan
from test_cli import error_of
from test_video_pipelines import sample as sample_pipeline
from test_video_pipelines import wan_experts
from torch._dynamo.testing import CompileCounter

import fastercache
from fastercache import CompileError
from fastercache.models.registry import family_of

STEPS = 12
FLASH, MATH, NATIVE, SAGE = map(dispatch.AttentionBackendName, ("flash", "_native_math", "native", "sage"))
registry = dispatch._AttentionBackendRegistry
native = registry._backends[NATIVE]


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test, any recompilation an error, and diffusers' default as it was: `set_attention_backend`
    changes that, too."""
    torch._dynamo.reset()
    active = registry._active_backend
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        yield
    registry.set_active_backend(active)
    torch._dynamo.reset()


@pytest.fixture
def install(monkeypatch):
    """`install(name, function)`: the backend is there, and calls the function."""

    def install(backend, function):
        monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN", True)
        monkeypatch.setattr(dispatch, "_CAN_USE_SAGE_ATTN", True)
        monkeypatch.setitem(registry._backends, backend, function)
        monkeypatch.setitem(registry._supported_arg_names, backend, registry._supported_arg_names[NATIVE])
        monkeypatch.setitem(registry._constraints, backend, [])

    return install


@pytest.fixture
def only(monkeypatch):
    """`only(names)`: "auto" has these to choose from."""
    return lambda *names: monkeypatch.setattr(fastercache.host.attention, "EXACT", names)


@pytest.fixture
def halved(install):
    """A `flash` whose results show wherever it ran."""
    install(FLASH, lambda **arguments: 0.5 * native(**arguments))


def repeated(times):
    def attend(**arguments):
        output = native(**arguments)
        for _ in range(times - 1):
            output = output + 0 * native(**arguments)
        return output

    return attend


def run(model, inputs=None, steps=STEPS):
    """The predictions of one run on the same inputs."""
    inputs = call(model, 4) if inputs is None else inputs
    return torch.stack([model(**inputs)[0] for _ in range(steps)])


def cached(model, **options):
    return fastercache.compile(model, "paper", steps=STEPS, cfg="uncond-first", **options)


def set_directly(model, backend):
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_attention_backend"):
            module.processor._attention_backend = backend
    return model


def state(model):
    """All that a backend could be left in: what is set on the processors, and diffusers' default."""
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    return [vars(processor).get("_attention_backend", "not set") for processor in processors], registry._active_backend


def attention_note(model):
    (note,) = [note for note in fastercache.summary(model).notes if note.startswith("attention: ")]
    return note


def graphs_of(model):
    return len(model._fastercache_engine.gated.graphs)


# ---- a backend by name -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "by, compiled",
    [
        ("option", {}),
        ("user", {}),
        ("option", {"regional": True}),
        ("user", {"regional": False}),
        longer("option", {"regional": False}),
        longer("user", {"regional": True}),
    ],
)
def test_the_backend_that_is_set_runs_in_every_phase(halved, compiled, by):
    ordinary, expected = run(cached(ltx())), run(cached(set_directly(ltx(), FLASH)))
    counter, model = CompileCounter(), ltx()
    options = compiled and compiled | {"backend": counter}
    if by == "user":
        model.set_attention_backend("flash")
    before = state(model)
    cached(model, **options, **({"attention_backend": "flash"} if by == "option" else {}))
    assert registry._active_backend == before[1]
    for _ in range(2):
        found = run(model)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(found, ordinary, strict=True))
    if compiled:
        assert counter.frame_count == graphs_of(model) == 3
    fastercache.restore(model)
    assert state(model) == before


@pytest.mark.parametrize("name", ["_native_math", "flex"])
def test_torchs_own_backends_compile(name):
    """`flex` as its own reference: eager, it is compiled by torch behind the scenes."""
    inputs = call(wan(torch.float32), 4)
    expected = run(cached(wan(torch.float32)), inputs)
    counter = CompileCounter()
    model = cached(wan(torch.float32), backend=counter, attention_backend=name)
    for _ in range(2):
        torch.testing.assert_close(run(model, inputs), expected)
    assert counter.frame_count == graphs_of(model) == 3


def test_both_experts_of_a_pipeline(halved):
    pipe, inputs = wan_experts(1)
    models = pipe.transformer, pipe.transformer_2
    before, ordinary = [state(model) for model in models], sample_pipeline(pipe, inputs)
    fastercache.compile(pipe, "none", attention_backend="flash")
    assert [model._fastercache_engine.host.attention.backends for model in models] == [("flash",)] * 2
    assert not torch.equal(sample_pipeline(pipe, inputs), ordinary)
    fastercache.restore(pipe)
    assert [state(model) for model in models] == before
    assert torch.equal(sample_pipeline(pipe, inputs), ordinary)


def test_restore_leaves_what_was_set_since():
    model = cached(ltx(), attention_backend="_native_math")
    set_directly(model, NATIVE)
    fastercache.restore(model)
    assert set(state(model)[0]) == {NATIVE}
    # And gives back what was set before.
    fastercache.restore(cached(model, attention_backend="_native_math"))
    assert set(state(model)[0]) == {NATIVE}


@pytest.mark.parametrize("family", MODELS | OTHERS | TWO_CALLS)
def test_which_models_have_a_choice(family):
    make = (MODELS | OTHERS | TWO_CALLS)[family]
    model = make()
    before = state(model)
    if hasattr(sys.modules[type(model).__module__], "dispatch_attention_fn"):  # which asks for a backend
        fastercache.compile(model, attention_backend="_native_math")
        assert model._fastercache_engine.host.attention.backends == ("_native_math",)
        return
    with pytest.raises(CompileError, match=r"attention_backend='_native_math': .* has one attention backend only"):
        fastercache.compile(model, attention_backend="_native_math")
    assert state(model) == before and not hasattr(model, "_fastercache_engine") and "forward" not in vars(model)
    inputs = arguments(model, 4) if family in MODELS else call(model, 4)
    order = family_of(model).layout
    fastercache.compile(model, "none", steps=1, cfg=order, attention_backend="auto")
    run(model, inputs, steps=2)
    assert "nothing to choose" in attention_note(model) and state(model) == before


@pytest.mark.parametrize(
    "name, message",
    [
        ("fast", "'fast': diffusers has no such backend; available here: .*native"),
        ("flash", r"'flash': .*install `flash-attn>=.*`; available here: .*native"),
        ("sage", r"'sage': .*install `sageattention>=.*`; available here: .*native"),
    ],
)
def test_what_is_not_there_is_refused(name, message, monkeypatch):
    monkeypatch.setattr(dispatch, "_CAN_USE_FLASH_ATTN", False)
    monkeypatch.setattr(dispatch, "_CAN_USE_SAGE_ATTN", False)
    model = ltx()
    set_directly(model, MATH)
    before = state(model)
    with pytest.raises(CompileError, match=message):
        cached(model, attention_backend=name)
    assert state(model) == before and not hasattr(model, "_fastercache_engine") and "forward" not in vars(model)
    cached(model, attention_backend="native")


@pytest.mark.parametrize(
    "by, compiled",
    [
        ("option", {}),
        ("user", {}),
        ("option", {"backend": "eager"}),
        ("user", {"backend": "eager", "regional": True}),
        longer("option", {"backend": "eager", "regional": True}),
        longer("user", {"backend": "eager"}),
    ],
)
def test_a_backend_that_does_not_take_the_models_calls_is_refused_by_name(compiled, by):
    """LTX-Video gives its cross-attention a mask, which flash kernels do not know."""
    model = ltx(torch.float32)
    if by == "user":
        set_directly(model, dispatch.AttentionBackendName._NATIVE_FLASH)
    cached(model, **compiled, **({"attention_backend": "_native_flash"} if by == "option" else {}))
    with pytest.raises(
        CompileError, match="does not run on the attention backend '_native_flash': `attn_mask` is not supported"
    ):
        run(model)
    set_directly(model, NATIVE)
    assert torch.isfinite(run(model)).all()


def test_other_errors_keep_their_types():
    model = cached(ltx(), attention_backend="_native_math")
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        run(model, call(model, 4) | {"encoder_hidden_states": torch.zeros(4, 5, 7, dtype=torch.float64)})
    assert not isinstance(caught.value, CompileError)


def test_a_model_without_diffusers_needs_none():
    script = """
import sys
sys.modules["diffusers"] = None
import torch, fastercache
from bench.architectures import STDiT3
model = STDiT3(
    hidden_size=16, depth=2, num_heads=2, in_channels=2, caption_channels=12, model_max_length=5
).eval().requires_grad_(False)
inputs = dict(x=torch.randn(2, 2, 3, 7, 8), timestep=torch.full((2,), 500.0), y=torch.randn(2, 1, 5, 12),
              mask=torch.ones(1, 5, dtype=int), x_mask=torch.ones(2, 3, dtype=bool),
              fps=torch.tensor([24.0]), height=torch.tensor([56.0]), width=torch.tensor([64.0]))
fastercache.compile(model, steps=1, cfg="uncond-first", attention_backend="auto")
with torch.no_grad():
    model(**inputs)
print(fastercache.summary(model).flops.ratio, fastercache.summary(model).notes)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "nothing to choose" in done.stdout, done.stderr


# ---- a change after the graphs were made -----------------------------------------------------------------------------


@pytest.mark.parametrize("regional", [longer(False), True])
def test_another_backend_gets_graphs_of_its_own(halved, regional):
    ordinary, expected = run(cached(ltx())), run(cached(set_directly(ltx(), FLASH)))
    counter = CompileCounter()
    model = cached(ltx(), backend=counter, regional=regional)
    torch.testing.assert_close(run(model), ordinary, rtol=1e-10, atol=1e-12)
    with dispatch.attention_backend("flash"):
        torch.testing.assert_close(run(model), expected, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 6
    registry.set_active_backend(FLASH)  # as DIFFUSERS_ATTN_BACKEND does
    torch.testing.assert_close(run(model), expected, rtol=1e-10, atol=1e-12)
    registry.set_active_backend(NATIVE)
    torch.testing.assert_close(run(model), ordinary, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == graphs_of(model) == 6


def test_set_attention_backend_after_compiling(halved):
    ordinary, expected = run(cached(ltx())), run(cached(set_directly(ltx(), FLASH)))
    counter = CompileCounter()
    model = cached(ltx(), backend=counter, attention_backend="native")
    torch.testing.assert_close(run(model), ordinary, rtol=1e-10, atol=1e-12)
    model.set_attention_backend("flash")
    torch.testing.assert_close(run(model), expected, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == graphs_of(model) == 6
    # One layer only.
    model.transformer_blocks[0].attn1.processor._attention_backend = NATIVE
    mixed = set_directly(ltx(), FLASH)
    mixed.transformer_blocks[0].attn1.processor._attention_backend = NATIVE
    torch.testing.assert_close(run(model), run(cached(mixed)), rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 9


@torch._dynamo.config.patch(error_on_recompile=False)
def test_a_change_in_the_middle_of_a_run_is_seen(halved):
    """By the guards of Dynamo, which compiles again: the engine looks at the start of a run only."""

    def halfway(model):
        inputs = call(model, 4)
        before = [model(**inputs)[0] for _ in range(STEPS // 2)]
        set_directly(model, FLASH)
        return torch.stack(before + [model(**inputs)[0] for _ in range(STEPS // 2)])

    torch.testing.assert_close(
        halfway(cached(ltx(), backend="eager", regional=True)), halfway(cached(ltx())), rtol=1e-10, atol=1e-12
    )


# ---- "auto" ----------------------------------------------------------------------------------------------------------


def waiting(seconds, attend=native):
    def wait(**arguments):
        time.sleep(seconds)
        return attend(**arguments)

    return wait


def test_auto_takes_the_fastest_and_times_once(install, only):
    install(NATIVE, waiting(0.003))
    install(MATH, waiting(0.006))
    counted = []
    install(FLASH, lambda **arguments: counted.append(1) or native(**arguments))
    only("native", "_native_math", "flash")
    model = ltx(torch.float32)
    before = state(model)
    cached(model, attention_backend="auto")
    assert state(model) == before
    inputs = call(model, 4)
    run(model, inputs)
    note = attention_note(model)
    assert note.startswith("attention: flash (auto: flash ")
    # Two layers, with two attentions each, that wait.
    shown = {name: float(time) for name, time in (word.split()[:2] for word in note.partition("auto: ")[2].split(", "))}
    assert 12 <= shown["native"] < shown["_native_math"] >= 24  # sleeps: never shorter, on a busy machine longer
    assert set(state(model)[0]) == {FLASH} and registry._active_backend == before[1]
    counted.clear()
    run(model, inputs)
    computed = sum(row.computed for row in fastercache.summary(model).sites if row.branch == "cond")
    assert len(counted) <= 4 * STEPS and computed > 0  # four attentions a step, less what was blended
    fastercache.restore(model)
    assert state(model) == before


@pytest.mark.parametrize("regional", [longer(False), True])
def test_auto_picks_before_the_phases_are_compiled(install, only, regional):
    inputs = call(wan(torch.float32), 4)
    expected = run(cached(wan(torch.float32)), inputs)
    install(NATIVE, repeated(40))
    install(FLASH, native)
    only("native", "flash")
    counter = CompileCounter()
    model = cached(wan(torch.float32), backend=counter, regional=regional, attention_backend="auto")
    fastercache.warmup(model, progress=False, **inputs)
    assert model._fastercache_engine.host.attention.backends == ("flash",)
    alone = counter.frame_count - graphs_of(model)
    assert graphs_of(model) == 3 and alone == 2 * 2  # self- and cross-attention by each of the two
    for _ in range(2):
        torch.testing.assert_close(run(model, inputs), expected)
    assert graphs_of(model) == 3 and counter.frame_count == 3 + alone
    assert attention_note(model).startswith("attention: flash (auto: flash ")


def off_by_a_little(**arguments):
    return 1.05 * native(**arguments)


def blind_to_masks(**arguments):
    return native(**arguments | {"attn_mask": None})


def gives_nan(**arguments):
    return native(**arguments) * float("nan")


def broken(**arguments):
    raise ValueError("head size 8 is not a multiple of 16. More about it")


@pytest.mark.parametrize(
    "flash, reason",
    [
        (off_by_a_little, "differs from the exact result by"),
        (blind_to_masks, "differs from the exact result by"),
        (gives_nan, "differs from the exact result by nan"),
        (broken, "head size 8 is not a multiple of 16)"),
    ],
)
@pytest.mark.parametrize("compiler", [None, "eager"])
def test_auto_leaves_out_what_is_wrong_or_fails(flash, reason, compiler, install, only):
    install(NATIVE, repeated(2))
    install(FLASH, flash)
    only("native", "flash")
    model = cached(ltx(torch.bfloat16), backend=compiler, attention_backend="auto")
    run(model)
    note = attention_note(model)
    assert note.startswith("attention: native (auto: native ") and f"; not flash: {reason}" in note
    assert model._fastercache_engine.host.attention.backends == ("native",)


def test_auto_never_takes_a_quantized_one(install):
    install(NATIVE, repeated(40))
    quantized = []
    install(SAGE, lambda **arguments: quantized.append(1) or native(**arguments))
    model = cached(ltx(torch.float32), attention_backend="auto")
    run(model)
    assert not quantized and "sage" not in attention_note(model)
    cached(ltx(torch.float32), attention_backend="sage")


@pytest.mark.parametrize("make", [ltx, hunyuan, wan])
def test_auto_on_what_this_machine_has(make):
    """Whatever it picks, the video is the same, and so is torch's random state."""
    model, order = make(torch.float32), "none" if make is hunyuan else "uncond-first"
    inputs = call(model, 4)
    expected = run(fastercache.compile(make(torch.float32), steps=STEPS, cfg=order), inputs)
    fastercache.compile(model, steps=STEPS, cfg=order, attention_backend="auto")
    random = torch.get_rng_state()
    torch.testing.assert_close(run(model, inputs), expected)
    assert torch.equal(torch.get_rng_state(), random)
    note = attention_note(model)
    assert "native " in note and "_native_math " in note and "flex" not in note
    picked = note.split()[1]
    assert model._fastercache_engine.host.attention.backends == (picked,)
    again = run(model, inputs)
    assert attention_note(model) == note and torch.isfinite(again).all()


def test_auto_that_cannot_time_says_so(install, only, monkeypatch):
    only("native", "_native_math")
    model = ltx(torch.float32)
    set_directly(model, MATH)
    before = state(model)
    monkeypatch.setattr(fastercache.host.attention, "MOST_SCORES", 0)
    run(cached(model, attention_backend="auto"))
    assert "; not _native_math: would hold 0.0 GB of scores" in attention_note(model)
    fastercache.restore(model)
    assert state(model) == before
    install(NATIVE, lambda **arguments: native(**arguments) if arguments["query"].shape[1] > 16 else broken())
    run(cached(model, attention_backend="auto"))
    assert "_native_math (auto: not timed, head size 8" in attention_note(model)
    assert state(model) == before


def test_the_count_of_operations_does_not_depend_on_the_backend(install):
    expected = cached(ltx(torch.float32))
    run(expected)
    install(FLASH, lambda query, **_: query.clone())
    model = cached(ltx(torch.float32), attention_backend="flash")
    run(model)
    assert vars(fastercache.summary(model).flops) == vars(fastercache.summary(expected).flops)
    assert model._fastercache_engine.host.attention.backends == ("flash",)


def test_command_line():
    message = error_of("sample", "shapes", "--prompt", "a red circle moving right", "--attention-backend", "flash")
    assert "attention_backend='flash': LatteTransformer3DModel has one attention backend only" in message


def test_a_name_in_another_form():
    model = cached(ltx(), attention_backend=MATH)
    assert model._fastercache_engine.host.attention.backends == ("_native_math",)
    with pytest.raises(CompileError, match="one attention backend only"):
        fastercache.compile(cogvideox(), attention_backend=MATH)
