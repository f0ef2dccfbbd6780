"""Sites as intervals: blocks, the stack, cross-attentions and whole predictions reused, on every family, against the
simulator."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from longer import LONG, longer
from models import MODELS, OTHERS, TWO_CALLS, arguments, call, cogvideox, latents_of, ready
from released import AsymmDiTJoint, DiffusionTransformer, mochi_calls, sat_call
from simulator import Simulator, site_modules
from test_generic import cogview4, skyreels
from test_generic import inputs_of as generic_inputs
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastercache
from bench.graphs import DeviceReads
from fastercache import Prediction, Schedule, ScheduleError, Step, UnsupportedModelError, ops
from fastercache.models.registry import family_of

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")
has_packed = pytest.mark.skipif(
    ops.packed_missing(torch.device("cpu")) is not None, reason="packed caches need the C++ library"
)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ---- models, and runs of them ----------------------------------------------------------------------------------------


def asymm_mochi(dtype=torch.float64):
    torch.manual_seed(0)
    return ready(AsymmDiTJoint(), dtype)


def sat_cogvideox(dtype=torch.float64):
    torch.manual_seed(0)
    model = ready(DiffusionTransformer(), dtype)
    model.dtype = dtype
    return model


def image_to_video(dtype=torch.float64):
    """CogVideoX whose latents have the condition's channels behind them, which it does not predict."""
    torch.manual_seed(0)
    config = dict(cogvideox().config) | {"in_channels": 4}
    return ready(type(cogvideox())(**config), dtype)


FAMILIES = MODELS | OTHERS | TWO_CALLS | {"asymm_mochi": asymm_mochi, "sat_cogvideox": sat_cogvideox}
SMALL = {name: build(torch.float32) for name, build in FAMILIES.items()}
WITH_CROSS = [name for name, model in SMALL.items() if any(kind == "cross" for kind, _ in site_modules(model).values())]
IDLING = [name for name, model in SMALL.items() if family_of(model).idle_with and name != "latte_t2v"]
"""Its family leaves upstream's Latte out."""
SKIPPING = {
    "block": (
        Step(),
        Step(),
        Step("both", ("block[1:]",), (1.5, -0.5)),
        Step("both", ("block",), (1.0,)),
        Step(),
        Step("cond"),
        Step("cond", ("block[:1]", "attention[1:]"), (1.0,)),
    ),
    "stack": (
        Step(),
        Step(),
        Step("both", ("stack",), (1.5, -0.5)),
        Step(),
        Step("cond"),
        Step("cond", ("stack",), (1.0,)),
        Step(),
    ),
    "cross": (
        Step(),
        Step(),
        Step("both", ("cross",), (1.5, -0.5)),
        Step("cond"),
        Step("cond", ("cross[1:]", "mlp"), (1.0,)),
    ),
}


def layout_of(model):
    return family_of(model).layout


def inputs_of(model, rows=None, seed=0):
    """Of a call, or for guidance in two calls of each of them: the unconditional and the conditional one, with the same
    latents."""
    rows = rows or (1 if layout_of(model) in ("none", "cond-then-uncond", "uncond-then-cond") else 2)
    name = type(model).__name__
    if name == "AsymmDiTJoint":
        calls = mochi_calls(rows)
        dtype = next(model.parameters()).dtype
        return [_to(one, dtype) for one in (calls.uncond, calls.cond)]
    if name == "DiffusionTransformer":
        return _to(sat_call(rows), model.dtype)
    if name in ("LatteTransformer3DModel", "CogVideoXTransformer3DModel"):
        inputs = arguments(model, rows, seed)
        if model.config.in_channels == 4:
            inputs["hidden_states"] = torch.cat([inputs["hidden_states"], inputs["hidden_states"].flip(3)], 2)
        return inputs
    if "-then-" in layout_of(model):
        uncond, cond = call(model, rows, seed + 1), call(model, rows, seed + 2)
        return [uncond | {name: cond[name] for name in ("hidden_states", "timestep")}, cond]
    return call(model, rows, seed)


def _to(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return [_to(one, dtype) for one in value]
    return {key: _to(one, dtype) for key, one in value.items()} if isinstance(value, dict) else value


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def next_latents(latents, prediction):
    """A step of a sampler: of the channels that latents and prediction both have."""
    moved, prediction = (
        latents.clone(),
        prediction if prediction.dim() == latents.dim() else prediction.reshape(latents.shape),
    )
    common = tuple(slice(0, min(sizes)) for sizes in zip(latents.shape, prediction.shape, strict=True))
    moved[common] -= 0.1 * prediction[common]
    return moved


def sample(denoise, inputs, steps):
    """A closed loop: every prediction of a run. `denoise` takes a call's arguments, or both calls' (unconditional,
    conditional)."""
    outputs = []
    for _ in range(steps):
        if isinstance(inputs, list):
            e_u, e_c = denoise(*inputs)
            outputs.append(torch.cat([e_u, e_c]))
            name = latents_of(inputs[0])
            latents = next_latents(inputs[0][name], e_u + 3.0 * (e_c - e_u))
            inputs = [one | {name: latents} for one in inputs]
        else:
            outputs.append(denoise(inputs))
            name = latents_of(inputs)
            inputs = inputs | {name: next_latents(inputs[name], outputs[-1])}
    return torch.stack(outputs)


def calls_of(model, order):
    """As a pipeline of that order calls the model."""

    def pair(uncond, cond):
        if order == "cond-then-uncond":
            e_c = first(model(**cond))
            return first(model(**uncond)), e_c
        e_u = first(model(**uncond))
        return e_u, first(model(**cond))

    return pair if "-then-" in order else lambda inputs: first(model(**inputs))


def run(build, schedule, order=None, inputs=None, **options):
    """The predictions of a run by the package, and its model."""
    model = build() if callable(build) and not isinstance(build, torch.nn.Module) else build
    order = order or layout_of(model)
    fastercache.compile(model, schedule, steps=len(schedule), cfg=order, **options)
    return sample(calls_of(model, order), inputs or inputs_of(model), len(schedule)), model


def simulated(build, schedule, order=None, inputs=None):
    model = build()
    order = order or layout_of(model)
    simulator = Simulator(model, schedule if order != "none" else schedule.without_guidance(), order)
    inputs = inputs or inputs_of(model)
    return sample(simulator.pair if isinstance(inputs, list) else simulator, inputs, len(schedule))


def close(actual, expected, tolerance=1e-10):
    assert torch.isfinite(expected).all()
    assert float((actual - expected).norm() / expected.norm()) < tolerance


# ---- every family ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, kind", [(name, kind) for name in FAMILIES for kind in SKIPPING if kind != "cross" or name in WITH_CROSS]
)
def test_reuse_equals_the_simulator(name, kind):
    schedule, dtype = (
        Schedule(SKIPPING[kind], kind),
        torch.float32 if name == "stdit3" else torch.float64,
    )  # it predicts float32

    def build():
        return FAMILIES[name](dtype)

    actual, model = run(build, schedule)
    close(actual, simulated(build, schedule), 1e-5 if dtype == torch.float32 else 1e-10)
    summary = fastercache.summary(model)
    assert summary.cache_bytes == summary.cache_bytes_planned > 0
    assert kind != "stack" or summary.flops.ratio > 1  # counting takes longer than the run
    assert kind in {row.kind.partition("[")[0] for row in summary.sites if row.blended}
    assert {"ring_push_residual", "ring_blend_add"} & set(summary.implementations) or kind == "cross"


@pytest.mark.parametrize("order", ["cond-first", "none"])
def test_reuse_in_another_layout(order):
    schedule = Schedule(SKIPPING["block"])
    close(run(MODELS["latte"], schedule, order)[0], simulated(MODELS["latte"], schedule, order))


@pytest.mark.parametrize("kind", ["block", "stack"])
def test_reuse_with_the_unconditional_call_first(kind):
    schedule, order = Schedule(SKIPPING[kind]), "uncond-then-cond"
    close(run(TWO_CALLS["wan"], schedule, order)[0], simulated(TWO_CALLS["wan"], schedule, order))


@has_packed
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format, error", [("int8", 0.02), ("int8-int4", 0.1)])
def test_packed_reuse_is_near_the_lossless_one(name, format, error):
    """The tolerance is a share of the predictions; a block's and the stack's residuals are both stored."""
    both = Step(), Step(), Step("both", ("block",), (1.5, -0.5)), Step(), Step("cond", ("stack",), (1.0,))

    def build():
        return FAMILIES[name](torch.float32)

    lossless, _ = run(build, Schedule(both))
    packed, model = run(build, Schedule(both), cache_format=format)
    summary = fastercache.summary(model)
    assert summary.cache_format == format and summary.cache_bytes == summary.cache_bytes_planned
    assert {"packed_push_residual", "packed_blend_add"} <= set(summary.implementations)
    assert 0 < float((packed - lossless).abs().mean()) <= error * float(lossless.abs().mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_that_only_store_are_bit_identical(name):
    """Gates at every block change nothing until something is reused; neither does a schedule that reuses nothing."""

    def build():
        return FAMILIES[name](torch.float32)

    untouched = build()
    order = layout_of(untouched)
    expected = sample(calls_of(untouched, order), inputs_of(untouched), 3)
    stored = run(build, Schedule((Step(), Step(), Step(), Step("both", ("stack",), (1.0,)))))[0]
    blocks = run(build, Schedule((Step(), Step(), Step(), Step("both", ("block",), (1.0,)))))[0]
    nothing = run(build, Schedule((Step(),) * 3))[0]
    assert all(torch.equal(one[:3], expected) for one in (stored, blocks, nothing))


def test_a_stack_keeps_one_tensor_a_branch_tap_and_live_stream():
    model = cogvideox()
    actual = fastercache.summary(run(model, Schedule(SKIPPING["stack"]))[1]).cache_bytes
    tokens, channels, rows = 3 * 5 * 3, 16, 2
    maps = 2 * (rows // 2) * 3 * 2 * 10 * 6 * 8
    assert actual == 2 * aligned(rows * tokens * channels * 8) + maps


def aligned(size):
    return -(-size // 256) * 256


# ---- nested reuse ----------------------------------------------------------------------------------------------------

REUSES = [
    (),
    (),
    ("block",),
    ("joint",),
    ("mlp",),
    ("joint", "mlp"),
    ("stack",),
    ("block[1:]",),
    ("block[1:]", "joint[:1]"),
    ("block[:1]", "mlp[1:]"),
]
TAPS = [(1.0,), (1.5, -0.5), (0.7,)]


@st.composite
def schedules(draw):
    """Any schedule that the plan accepts: a step that it would not is one that computes everything."""
    steps = [Step(), Step()]
    for _ in range(draw(st.integers(3, 6))):
        reuse, taps = draw(st.sampled_from(REUSES)), draw(st.sampled_from(TAPS))
        step = Step(draw(st.sampled_from(("both", "cond", "none"))))
        step = step if not step.runs or not reuse else replace(step, reuse=reuse, taps=taps)
        try:
            fastercache.schedule.plan.make_plan(Schedule((*steps, step)), True, TREE)
        except ScheduleError:
            step = Step()
        steps.append(step)
    return Schedule(tuple(steps))


TREE = tuple(site.node for site in family_of(cogvideox()).sites(cogvideox()))


def action_by_hand(step, kind, layer):
    """What an attention, MLP, block or the stack does at a step, for two layers."""

    def named(selector, kind):
        match = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", selector)
        return match[1] == kind and int(match[2] or 0) <= layer < int(match[3] or 9)

    around = {"joint": ("block", "stack"), "mlp": ("block", "stack"), "block": ("stack",), "stack": ()}[kind]
    if not step.runs or any(named(selector, outer) for selector in step.reuse for outer in around):
        return "idle"
    return "blend" if any(named(selector, kind) for selector in step.reuse) else "compute"


@settings(max_examples=30 if LONG else 4, deadline=None, derandomize=not LONG)
@given(schedules())
def test_nested_reuse_has_the_right_history_operations_and_bytes(schedule):
    """Attentions and the blocks around them reused at different steps, on CogVideoX with two layers."""
    with torch.no_grad():
        actual, model = run(cogvideox, schedule)
        close(actual, simulated(cogvideox, schedule))
    summary, rows, text, video, width = fastercache.summary(model), 1, 5, 3 * 5 * 3, 16
    tokens = text + video
    inside = {
        "joint": rows * (4 * 2 * tokens * width**2 + 2 * 2 * tokens**2 * width),
        "mlp": rows * 2 * 2 * tokens * width * 4 * width,
    }
    inside["block"] = sum(inside.values()) + rows * 2 * 2 * 8 * 6 * width  # and the two modulations of a block
    inside["stack"] = 2 * inside["block"]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        cogvideox()(**arguments(model, 1))
    whole, cached, kept = counter.get_total_flops(), 0, 0
    sites = [("stack", 0), *((kind, layer) for kind in ("block", "joint", "mlp") for layer in range(2))]
    running = [{"both": 2, "cond": 1, "none": 0}[step.branches] for step in schedule.steps]
    for step, branches in zip(schedule.steps, running, strict=True):
        saved = sum(inside[kind] for kind, layer in sites if action_by_hand(step, kind, layer) == "blend")
        cached += branches * (whole - saved)
    for kind, layer in sites:
        actions = [action_by_hand(step, kind, layer) for step in schedule.steps]
        blends = [
            (len(step.taps), n)
            for step, n, action in zip(schedule.steps, running, actions, strict=True)
            if action == "blend"
        ]
        if blends:
            slots, branches = (max(column) for column in zip(*blends, strict=True))
            shapes = {"mlp": [tokens], "stack": [video]}.get(kind, [video, text])
            kept += sum(slots * aligned(branches * count * width * 8) for count in shapes)
    latents = 3 * 2 * 10 * 6 * 8
    kept += 2 * latents * ("cond" in {step.branches for step in schedule.steps}) + 2 * latents * (0 in running)
    assert (summary.flops.cached, summary.flops.uncached) == (cached, 2 * whole * len(schedule))
    assert summary.cache_bytes == summary.cache_bytes_planned == kept
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(cogvideox, schedule)
    assert counter.get_total_flops() == cached


# ---- what eager steps leave out --------------------------------------------------------------------------------------

BLENDING = Schedule(
    (Step(), Step(), Step("both", ("attention", "cross", "mlp"), (1.5, -0.5)), Step("both", ("mlp",), (1.0,)), Step())
)


@pytest.mark.parametrize("name", IDLING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_only_a_blended_part_reads_see_one_token(name, dtype, monkeypatch):
    """And nothing that comes out changes by a bit."""
    schedule = BLENDING
    if name not in WITH_CROSS:
        schedule = Schedule(
            tuple(replace(step, reuse=tuple(one for one in step.reuse if one != "cross")) for step in schedule.steps)
        )

    def build():
        return FAMILIES[name](dtype)

    model, seen = build(), []
    family = family_of(model)
    norms = {
        id(one): one
        for site in family.sites(model)
        if site.kind not in ("block", "stack")
        for one in family.idling(model, site)
    }
    for norm in norms.values():
        norm.register_forward_hook(lambda _, args, output: seen.append(first(output).shape[1]))
    actual = run(model, schedule)[0]
    assert norms and 0 < seen.count(1) < len(seen)
    fastercache.restore(model)
    assert not any("forward" in vars(norm) for norm in norms.values())
    monkeypatch.setattr(type(family), "idling", lambda *_: [])
    assert torch.equal(actual, run(build, schedule)[0])


# ---- steps that run nothing ------------------------------------------------------------------------------------------

NONE = Schedule(
    (
        Step(),
        Step(),
        Step("none"),
        Step("cond", previous=0.3, low=0.7),
        Step("none", prediction=Prediction((1.5, -0.5), 0.1, -0.1)),
        Step(prediction=Prediction((0.1,), 0.05, -0.05, 0.9)),
        Step("none", prediction=Prediction((2.0, -1.5, 0.5), 0.1, -0.1)),
    )
)
PREDICTING = {
    "latte": MODELS["latte"],
    "image_to_video": image_to_video,
    "ltx": OTHERS["ltx"],
    "hunyuan": OTHERS["hunyuan"],
} | TWO_CALLS


def count_modules(model, seen):
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))


@pytest.mark.parametrize(
    "name, order",
    [(name, None) for name in PREDICTING]
    + [("wan", "uncond-then-cond"), ("vchitect", "cond-then-uncond"), ("latte", "cond-first"), ("latte", "none")],
)
def test_a_step_that_runs_nothing_calls_no_part_of_the_model(name, order):
    """More channels than the latents (Latte), fewer (image to video), packed tokens (LTX), rows of frames
    (Vchitect)."""
    build = PREDICTING[name]
    model, seen, steps = build(), [], []
    count_modules(model, seen)
    order = order or layout_of(model)
    fastercache.compile(model, NONE, steps=len(NONE), cfg=order)
    denoise = calls_of(model, order)

    def counted(*inputs):
        seen.clear()
        output = denoise(*inputs)
        steps.append(len(seen))
        return output

    inputs = inputs_of(model) if order != "none" or name == "hunyuan" else inputs_of(model, 1)
    actual = sample(counted, inputs, len(NONE))
    assert [count == 0 for count in steps] == [step.branches == "none" for step in NONE.steps]
    close(actual, simulated(build, NONE, order, inputs))
    summary = fastercache.summary(model)
    assert summary.cache_bytes == summary.cache_bytes_planned > 0
    assert "prediction_blend" in summary.implementations


COMPILED = {
    "none": NONE,
    "none-and-stack": Schedule(
        (Step(), Step(), Step("none"), Step("both", ("stack",), (1.5, -0.5)), Step("none"), Step("cond"))
    ),
    "block": Schedule(SKIPPING["block"]),
    "stack": Schedule(SKIPPING["stack"]),
}


@pytest.mark.parametrize(
    "name, case, regional",
    [
        ("wan", "none", False),
        ("latte", "none-and-stack", True),
        ("cogvideox", "block", False),
        ("latte", "block", True),
        ("wan", "stack", True),
        longer("latte", "none", False),
        longer("cogvideox", "stack", False),
        longer("cogvideox", "block", True),
    ],
)
def test_compiled_reuse_is_one_graph_a_phase(name, case, regional):
    """A full graph each, so without a break; as many as phases that call the model, and none is compiled again or read
    back."""
    schedule, build = COMPILED[case], FAMILIES[name]
    torch._dynamo.reset()
    counter = CompileCounter()
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual, model = run(build, schedule, backend=counter, regional=regional)
        graphs = counter.frame_count
        again = sample(calls_of(model, layout_of(model)), inputs_of(model), len(schedule))
    with DeviceReads() as mode:  # in eager mode: torch compiles nothing under it
        run(build, schedule)
    close(actual, simulated(build, schedule))
    assert torch.equal(again, actual) and mode.reads == 0 and counter.frame_count == graphs
    if not regional:
        assert graphs == len(model._fastercache_engine.gated.graphs) == expected_graphs(model, schedule)
    torch._dynamo.reset()


def expected_graphs(model, schedule):
    two_calls = isinstance(inputs_of(model), list)
    stored = {(step.branches, step.reuse, step.runs) for step in schedule.steps if step.runs}
    if two_calls:  # the conditional call of a full step and that of a conditional one are the same graph
        return len(
            {(branch, reuse) for branches, reuse, _ in stored for branch in ("both", "cond")[branches == "cond" :]}
        )
    return len(stored)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reuse, message",
    [
        (("block", "joint"), r"step 2 reuses the joint of layer 0 inside the block of layer 0.*leave 'joint' out"),
        (("stack", "block[1:]"), r"step 2 reuses the block of layer 1 inside the stack.*leave 'block\[1:\]' out"),
        (("stack", "mlp"), r"step 2 reuses the mlp of layer 0 inside the stack.*leave 'mlp' out"),
        (("attention", "joint"), r"step 2: 'attention' and 'joint' both name the joint site of layer 0; leave one out"),
    ],
)
def test_overlapping_sites_are_refused_by_name(reuse, message):
    model = cogvideox()
    fastercache.compile(model, Schedule((Step(), Step("both", reuse, (1.0,)))), steps=2, cfg="uncond-first")
    with pytest.raises(ScheduleError, match=message):
        model(**arguments(model, 2))


# ---- models of no known family ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [skyreels, cogview4])
@pytest.mark.parametrize("kind", ["block", "stack"])
def test_blocks_of_a_model_of_no_known_family(build, kind):
    """One stream, and two that forward returns by name."""
    schedule, model = Schedule(SKIPPING[kind]), build()
    assert family_of(model).name == "generic"
    inputs = generic_inputs(model, 2)
    close(run(model, schedule, "uncond-first", inputs)[0], simulated(build, schedule, "uncond-first", inputs), 1e-5)


class TurningBlock(torch.nn.Module):
    """Gives its tokens with a text in front, as a block that packs two streams in one."""

    def __init__(self, grows):
        super().__init__()
        self.attn, self.grows = Attention(query_dim=8, heads=2, dim_head=4), grows

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.attn(hidden_states)
        if self.grows:
            hidden_states = torch.cat([hidden_states[:, :2], hidden_states], 1)
        return hidden_states


class UnnamedBlock(TurningBlock):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * 1.0


class Growing(ModelMixin, ConfigMixin):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, hidden_states):
        h = hidden_states
        for block in self.blocks:
            h = block(h)
        return (h[:, -hidden_states.shape[1] :],)


@pytest.mark.parametrize(("selector", "site"), [("block[1:]", "block of layer 1"), ("stack", "stack")])
def test_a_residual_whose_entry_and_exit_differ_in_shape_is_refused(selector, site):
    """As the run begins, and by its layer; the blocks before it can be reused."""
    torch.manual_seed(0)
    model = Growing(TurningBlock(False), TurningBlock(True)).requires_grad_(False)
    fastercache.compile(model, Schedule((Step(), Step("both", (selector,), (1.0,)))), steps=2, cfg="none")
    message = rf"step 2 reuses the {site} of Growing.*\[2, 6, 8\] and gives \[2, 8, 8\].*leave '{site.split()[0]}' out"
    with pytest.raises(UnsupportedModelError, match=message):
        model(hidden_states=torch.randn(2, 6, 8))
    fastercache.restore(model)
    fastercache.compile(model, Schedule((Step(), Step("both", ("block[:1]",), (1.0,)))), steps=2, cfg="none")
    same = torch.randn(2, 6, 8)
    torch.testing.assert_close(model(hidden_states=same)[0], model(hidden_states=same)[0])
    assert fastercache.summary(model).skipped_anything


def test_blocks_that_return_no_names_are_no_sites():
    model = Growing(UnnamedBlock(False), UnnamedBlock(False)).requires_grad_(False)
    fastercache.compile(model, Schedule((Step(), Step("both", ("block",), (1.0,)))), steps=2, cfg="none")
    with pytest.raises(ScheduleError, match=r"step 2 reuses 'block', but .* has no such site; it has joint"):
        model(hidden_states=torch.randn(2, 6, 8))
