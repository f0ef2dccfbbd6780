"""Each published method as a policy, run by the engine, against the same method in a few lines: plain hooks on a model,
and a loop.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from models import MODELS, arguments

import fastercache
from fastercache import ScheduleError, policies
from fastercache.schedule.policies.given import FORMS

STEPS = 14
TIMES = [1000 * (1 - i / STEPS) for i in range(STEPS)]
KINDS = {
    "latte": {
        "spatial": lambda name: name.startswith("transformer_blocks") and name.endswith("attn1"),
        "temporal": lambda name: name.startswith("temporal") and name.endswith("attn1"),
        "cross": lambda name: name.endswith("attn2"),
        "mlp": lambda name: name.endswith(".ff"),
    },
    "cogvideox": {"joint": lambda name: name.endswith("attn1"), "mlp": lambda name: name.endswith(".ff")},
}
ATTENTION_AND_MLP = {"latte": ("spatial", "temporal", "mlp"), "cogvideox": ("joint", "mlp")}


def sample(call, model, rows=2, steps=STEPS):
    """A plain Euler sampler; `call` gets the arguments of each call of the denoiser."""
    inputs, found = arguments(model, rows), []
    for i in range(steps):
        inputs = inputs | {"timestep": torch.full((rows,), TIMES[i])}
        found.append(call(inputs))
        latents, change = inputs["hidden_states"], found[-1]
        if change.shape != latents.shape:  # Latte learns a variance besides
            change = change[:, : latents.shape[1]]
        inputs = inputs | {"hidden_states": latents - 0.1 * change}
    return torch.stack(found)


def by_engine(name, policy, rows=2, cfg="none"):
    """Sample with a policy on the compiled model."""
    model = fastercache.compile(MODELS[name](), policy, steps=STEPS, cfg=cfg)
    return sample(lambda inputs: model(**inputs)[0], model, rows)


def modules_of(model, name, kinds):
    return {path: module for path, module in model.named_modules() if any(KINDS[name][kind](path) for kind in kinds)}


def mapped(function, *outputs):
    """A function of tensors on outputs that may be tuples of them."""
    return tuple(map(function, *outputs)) if isinstance(outputs[0], tuple) else function(*outputs)


def by_hand(name, hooks, rows=2):
    """Sample with `hooks(model, step)` on the modules it gives: `{module: function of its output}`, called at every
    step from 0.
    """
    model = MODELS[name]()
    step = iter(range(STEPS))

    def call(inputs):
        changes = hooks(model, next(step)).items()
        handles = [
            module.register_forward_hook(lambda _, __, out, change=change: change(out)) for module, change in changes
        ]
        found = model(**inputs)[0]
        for handle in handles:
            handle.remove()
        return found

    return sample(call, model, rows)


def repeated(name, computed):
    """Hooks that repeat the newest output of each kind's modules at the steps where `computed(kind, step)` is false."""
    newest = {}

    def hooks(model, step):
        def change(kind, path, out):
            if computed(kind, step):
                newest[path] = out
            return newest[path]

        return {
            module: partial(change, kind, path)
            for kind in KINDS[name]
            for path, module in modules_of(model, name, (kind,)).items()
            if computed(kind, step) is not None
        }

    return hooks


class Stack:
    """The residual of all blocks of CogVideoX, from a hook before the first block to one after the last."""

    def __init__(self, model):
        self.residual, self.reuse, self.entry = None, False, None
        model.transformer_blocks[0].register_forward_pre_hook(self.enter, with_kwargs=True)
        model.transformer_blocks[-1].register_forward_hook(self.leave)

    def enter(self, _, args, kwargs):
        self.entry = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    def leave(self, _, __, out):
        if not self.reuse:
            self.before, self.residual = self.residual, out[0] - self.entry
        return (self.entry + self.residual, out[1])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("interval", [2, 3])
def test_fora(name, interval):
    """The authors' loop counts its steps down to 0, and computes the first one and those that the interval divides."""
    counter = list(reversed(range(STEPS)))

    def computed(kind, step):
        if kind in ATTENTION_AND_MLP[name]:
            return counter[step] == STEPS - 1 or counter[step] % interval == 0
        return None

    expected = by_hand(name, repeated(name, computed))
    torch.testing.assert_close(
        by_engine(name, partial(policies.fora, interval=interval)), expected, rtol=1e-12, atol=1e-12
    )


def test_fora_of_both_branches_in_one_batch():
    def computed(kind, step):
        return step == 0 or (STEPS - 1 - step) % 3 == 0

    expected = by_hand("cogvideox", repeated("cogvideox", computed), rows=4)
    torch.testing.assert_close(
        by_engine("cogvideox", policies.fora, 4, "uncond-first"), expected, rtol=1e-12, atol=1e-12
    )


def test_block_reuse():
    """What each block adds to its streams is repeated."""
    added = {}

    def hooks(model, step):
        def change(index, entries, out):
            if step == 0 or (STEPS - 1 - step) % 3 == 0:
                added[index] = [exit - entry for exit, entry in zip(out, entries, strict=True)]
            return tuple(entry + one for entry, one in zip(entries, added[index], strict=True))

        entries = {}

        def remember(block, args, kwargs):
            entries[block] = (
                (kwargs["hidden_states"], kwargs["encoder_hidden_states"]) if "hidden_states" in kwargs else args[:2]
            )

        for block in model.transformer_blocks:
            if step == 0:
                block.register_forward_pre_hook(remember, with_kwargs=True)
                block.entries = entries
        return {
            block: lambda out, index=index, block=block: change(index, block.entries[block], out)
            for index, block in enumerate(model.transformer_blocks)
        }

    expected = by_hand("cogvideox", hooks)
    torch.testing.assert_close(
        by_engine("cogvideox", partial(policies.fora, sites=("block",))), expected, rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("given_times", [False, True])
def test_pab(given_times):
    """Pyramid Attention Broadcast, as the authors count: every call adds one, and an output is repeated strictly inside
    the thresholds.
    """
    intervals, (high, low) = {"spatial": 2, "temporal": 3, "cross": 5}, (930, 300)
    times = [1000 * (1 - i / STEPS) ** 2 for i in range(STEPS)] if given_times else TIMES

    def computed(kind, step):
        return None if kind == "mlp" else not (low < times[step] < high and step % intervals[kind] != 0)

    expected = by_hand("latte", repeated("latte", computed))
    policy = partial(
        policies.pab, intervals=intervals, earliest=high, latest=low, timesteps=times if given_times else None
    )
    torch.testing.assert_close(by_engine("latte", policy), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylorseer(name, order):
    """Factors of a Taylor series, renewed on full steps: each is the change of the one below it over the distance of
    the last two.
    """
    first, interval = 3, 4
    full, counter = [], 0
    for step in range(STEPS):
        if step < first or counter == interval - 1:
            full.append(step)
            counter = 0
        else:
            counter += 1
    factors = {}

    def hooks(model, step):
        def change(path, out):
            if step in full:
                new, old = [out], factors.get(path, [])
                for lower in range(order):
                    if lower >= len(old) or step <= first - 2:
                        break
                    gap = step - full[full.index(step) - 1]
                    new.append(mapped(lambda a, b, gap=gap: (a - b) / gap, new[lower], old[lower]))
                factors[path] = new
                return out
            distance = step - max(number for number in full if number < step)
            total = factors[path][0]
            for power, factor in enumerate(factors[path][1:], 1):
                scale = distance**power / math.factorial(power)
                total = mapped(lambda a, b, scale=scale: a + scale * b, total, factor)
            return total

        return {
            module: partial(change, path) for path, module in modules_of(model, name, ATTENTION_AND_MLP[name]).items()
        }

    expected = by_hand(name, hooks)
    actual = by_engine(name, partial(policies.taylorseer, interval=interval, order=order, first=first))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def stack_by_hand(decide, rows=2):
    """Sample CogVideoX with the stack's residual reused where `decide(model, step)` says so, after what it saw of the
    step.
    """
    model = MODELS["cogvideox"]()
    stack, step = Stack(model), iter(range(STEPS))

    def call(inputs):
        stack.reuse = decide(model, next(step), inputs)
        return model(**inputs)[0]

    return sample(call, model, rows)


def test_magcache():
    """Ratios of the residuals' magnitudes from an uncached run; then MagCache as it decides, step by step."""
    ratios, residuals = [1.0], []
    model = MODELS["cogvideox"]()
    stack = Stack(model)

    def calibrate(inputs):
        found = model(**inputs)[0]
        residuals.append(stack.residual)
        return found

    sample(calibrate, model)
    for before, after in itertools.pairwise(residuals):
        ratios.append((after.norm(dim=-1) / before.norm(dim=-1)).mean().item())

    state = {"ratio": 1.0, "error": 0.0, "steps": 0}
    skips = []

    def decide(model, step, inputs):
        if step < int(STEPS * 0.2):
            return False
        state["ratio"] *= ratios[step]
        state["steps"] += 1
        state["error"] += abs(1 - state["ratio"])
        if state["error"] < 0.1 and state["steps"] <= 3:
            skips.append(step)
            return True
        state.update(ratio=1.0, error=0.0, steps=0)
        return False

    expected = stack_by_hand(decide)
    actual = by_engine("cogvideox", partial(policies.magcache, ratios=ratios, threshold=0.1, most_skipped=3))
    assert 2 < len(skips) < STEPS - 4
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_teacache():
    """Changes of the time embedding, which no prompt changes; then TeaCache as it decides, with the embedding of each
    step at hand.
    """

    def embedding(model, inputs):
        return model.time_embedding(model.time_proj(inputs["timestep"]).to(torch.float64))

    def rescaled(change):
        return 3 * change**2 + 0.5 * change

    changes, seen = [0.0], []
    model = MODELS["cogvideox"]()

    def measure(inputs):
        seen.append(embedding(model, inputs))
        return model(**inputs)[0]

    sample(measure, model)
    for before, after in itertools.pairwise(seen):
        changes.append(rescaled(((after - before).abs().mean() / before.abs().mean()).item()))
    threshold = 2.5 * sum(changes) / STEPS
    state = {"sum": 0.0, "before": None}
    skips = []

    def decide(model, step, inputs):
        now, before = embedding(model, inputs), state["before"]
        state["before"] = now
        if step in (0, STEPS - 1):
            state["sum"] = 0.0
            return False
        state["sum"] += rescaled(((now - before).abs().mean() / before.abs().mean()).item())
        if state["sum"] < threshold:
            skips.append(step)
            return True
        state["sum"] = 0.0
        return False

    expected = stack_by_hand(decide)
    actual = by_engine("cogvideox", partial(policies.teacache, changes=changes, threshold=threshold))
    assert 2 < len(skips) < STEPS - 4
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


COMPUTED = (1, 2, 4, 7, 8, 12, 14)


def test_given_steps_with_the_residual_of_the_stack():
    expected = stack_by_hand(lambda model, step, inputs: step + 1 not in COMPUTED, rows=4)
    actual = by_engine("cogvideox", partial(policies.given, computed=COMPUTED), 4, "cond-first")
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reuse", ["change", "hold"])
def test_given_steps_that_run_nothing(reuse):
    """EasyCache's form: the prediction less the latents it was made from is kept, and the latents of now are added."""
    model = MODELS["cogvideox"]()
    step, calls, kept = iter(range(STEPS)), [], {}

    def call(inputs):
        latents = inputs["hidden_states"]
        if next(step) + 1 in COMPUTED:
            calls.append(1)
            found = model(**inputs)[0]
            kept["offset"] = found - (latents if reuse == "change" else 0)
        return kept["offset"] + (latents if reuse == "change" else 0)

    expected = sample(call, model)
    actual = by_engine("cogvideox", partial(policies.given, computed=COMPUTED, reuse=reuse))
    assert len(calls) == len(COMPUTED)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert set(FORMS) == {"stack", "change", "hold"}


@pytest.mark.parametrize(("interval", "first"), [(2, 2), (3, 1), (4, 5)])
def test_uniform(interval, first):
    model, number, kept = MODELS["cogvideox"](), itertools.count(1), {}

    def call(inputs):
        i = next(number)
        if i <= first or (i - first) % interval == 0:
            kept["prediction"] = model(**inputs)[0]
        return kept["prediction"]

    expected = sample(call, model)
    actual = by_engine("cogvideox", partial(policies.uniform, interval=interval, first=first))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("fora", {"interval": 0}, "interval is 0; it must be a whole number of at least 1"),
        ("uniform", {"first": 0}, "first is 0; it must be a whole number of at least 1"),
        ("fora", {"sites": "mlp"}, r"sites is 'mlp'; pass selectors of sites, as in \('mlp',\)"),
        ("fora", {"sites": ()}, r"sites is \(\); pass selectors"),
        ("fora", {"sites": ("atention",)}, "unknown site 'atention'"),
        ("pab", {"intervals": 3}, "intervals is 3; pass a kind of site and its interval"),
        ("pab", {"intervals": {}}, r"intervals is \(\); pass selectors"),
        ("pab", {"intervals": {"spatial": 2.5}}, r"intervals\['spatial'\] is 2.5; it must be a whole number"),
        ("pab", {"intervals": {"spacial": 1}}, "unknown site 'spacial'"),
        ("pab", {"earliest": "930"}, "earliest is '930'; it must be a finite number of at least 0 and of at most 1000"),
        ("pab", {"latest": float("nan")}, "latest is nan"),
        ("pab", {"earliest": 100, "latest": 850}, "earliest is 100 and latest 850; .* pass earliest > latest"),
        ("pab", {"timesteps": [1.0, 2.0]}, "timesteps has 2 values for 10 steps"),
        ("taylorseer", {"order": 3}, "order is 3; it must be 0, 1 or 2"),
        ("taylorseer", {"order": True}, "order is True"),
        ("taylorseer", {"first": 0}, "first is 0"),
        ("taylorseer", {"interval": 1.5}, "interval is 1.5"),
        ("magcache", {"ratios": 0.9}, "ratios is 0.9; pass a list of 10 numbers, one for each step"),
        ("magcache", {"ratios": [1.0] * 9}, "ratios has 9 values for 10 steps; .* interpolate"),
        (
            "magcache",
            {"ratios": [1.0] * 9 + [float("nan")]},
            r"ratios\[9\] is nan; it must be a finite number of at least 0",
        ),
        ("magcache", {"ratios": [1.0] * 9 + [-0.5]}, r"ratios\[9\] is -0.5"),
        ("magcache", {"ratios": [1.0] * 9 + ["1"]}, r"ratios\[9\] is '1'"),
        ("magcache", {"ratios": [1.0] * 10, "threshold": -1}, "threshold is -1"),
        ("magcache", {"ratios": [1.0] * 10, "most_skipped": 0}, "most_skipped is 0"),
        ("magcache", {"ratios": [1.0] * 10, "retention": 1.5}, "retention is 1.5; .* of at least 0 and of at most 1"),
        ("teacache", {"changes": [0.1] * 11}, "changes has 11 values for 10 steps"),
        ("teacache", {"changes": [0.1] * 9 + [10**400]}, r"changes\[9\] is 1000.*finite"),
        ("teacache", {"changes": [0.1] * 10, "threshold": None}, "threshold is None"),
        ("given", {"computed": (1, 11)}, "computed names step 11, and the run has steps 1 to 10"),
        ("given", {"computed": (1, [2])}, r"computed names step \[2\]"),
        ("given", {"computed": (True,)}, "computed names step True"),
        ("given", {"computed": 5}, "computed is 5; pass the numbers of the steps that run"),
        ("given", {"computed": (2, 3)}, "computed leaves out step 1.*add it"),
        (
            "given",
            {"computed": (1,), "reuse": "residual"},
            "reuse is 'residual'; it must be one of 'stack', 'change', 'hold'",
        ),
        ("given", {"computed": (1,), "reuse": ["stack"]}, "reuse is .'stack'."),
        ("released", {"rule": "latte"}, "rule is 'latte'; pass one of fastercache.schedule.presets.RELEASED"),
        ("paper", {"low_gain": "0.2"}, "low_gain is '0.2'"),
        ("paper", {"site": ["attention"]}, "unknown site"),
        ("none", {"steps": 0}, "steps is 0"),
        ("fora", {"steps": 2.0}, "steps is 2.0"),
    ],
)
def test_bad_arguments_of_a_policy_are_named(name, wrong, message):
    policy = getattr(policies, name)
    with pytest.raises(ScheduleError, match=message):
        policy(**{"steps": 10} | wrong)


@pytest.mark.parametrize("name", ["magcache", "teacache", "given", "released"])
def test_a_policy_that_needs_an_argument_says_so_where_it_is_named(name):
    with pytest.raises(
        ScheduleError, match=rf"policy '{name}' needs .*functools.partial\(fastercache.policies.{name}, "
    ):
        policies.get(name)


def test_a_policy_whose_other_arguments_are_missing_is_refused_before_a_run():
    with pytest.raises(
        ScheduleError, match=r"policy magcache cannot be called as .*'ratios'; functools.partial gives it"
    ):
        fastercache.compile(MODELS["cogvideox"](), policies.magcache, steps=STEPS, cfg="none")
    with pytest.raises(ScheduleError, match="policy <lambda> returned a int for 120 steps"):
        fastercache.compile(MODELS["cogvideox"](), lambda steps, guidance: 3, steps=STEPS, cfg="none")
