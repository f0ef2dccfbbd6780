"""A family, a policy and a cache format from files outside the package (`tests/extensions/`), with nothing patched."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from extensions.my_model import MyDenoiser
from typer.testing import CliRunner

import fastercache
from fastercache import CacheError, ScheduleError, Step, UnsupportedModelError, cli, policies
from fastercache.cache import formats
from fastercache.models import registry

EXTENSIONS = Path(__file__).parent / "extensions"
STEPS = 8


@pytest.fixture(autouse=True)
def my_own():
    """The three files are imported, as a user would, and forgotten after the test: other tests count what is known."""
    families, named, kept = list(registry.FAMILIES), dict(policies.BY_NAME), dict(formats._BY_NAME)
    yield {name: importlib.import_module(f"extensions.my_{name}") for name in ("family", "policy", "format")}
    for name in ("family", "policy", "format"):
        del sys.modules[f"extensions.my_{name}"]
    registry.FAMILIES[:] = families
    for registered, before in ((policies.BY_NAME, named), (formats._BY_NAME, kept)):
        registered.clear()
        registered.update(before)


def model(cls=MyDenoiser):
    torch.manual_seed(0)
    return cls().double().eval().requires_grad_(False)


def sample(call, rows=4):
    """An Euler sampler; `call` gives the prediction of a batch of latents, texts and times."""
    generator = torch.Generator().manual_seed(1)
    latents, text = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((rows, 2, 2, 4, 6), (rows, 3, 16))
    )
    found = []
    for step in range(STEPS):
        found.append(call(latents, text, torch.full((rows,), 1000.0 - 100 * step, dtype=torch.float64)))
        latents = latents - 0.1 * found[-1]
    return torch.stack(found)


def sample_compiled(policy, cfg="uncond-first", **options):
    compiled = fastercache.compile(model(), policy, steps=STEPS, cfg=cfg, **options)
    return sample(compiled), fastercache.summary(compiled)


def by_hand(kind, computed):
    """The own model's forward with the newest result of every layer's part, of every layer, or of all of them
    repeated.
    """
    own, kept, step = model(), {}, iter(range(STEPS))

    def reusing(path, given, fresh):
        if kind != path.split(".")[0]:
            return fresh()
        if given:
            kept[path] = fresh()
        return kept[path]

    def call(latents, text, time):
        given = computed[next(step)]
        start = own.enter(latents.flatten(2).transpose(1, 2)) + time[:, None, None] / 1000

        def layers(tokens):
            for number, layer in enumerate(own.layers):
                before = tokens

                def inside(tokens=tokens, layer=layer, number=number):
                    after = tokens + reusing(
                        f"mix.{number}", given, lambda: layer.mix(tokens, torch.cat([text, tokens], 1))
                    )
                    return after + layer.feed(after) - tokens

                tokens = before + reusing(f"block.{number}", given, inside)
            return tokens

        tokens = start + reusing("stack", given, lambda: layers(start) - start)
        return own.leave(tokens).transpose(1, 2).unflatten(2, latents.shape[2:])

    return sample(call)


@pytest.mark.parametrize(("kind", "site"), [("mix", "attention"), ("block", "block"), ("stack", "stack")])
@pytest.mark.parametrize("cfg", ["uncond-first", "none"])
def test_a_family_of_ones_own_model_has_every_kind_of_site(kind, site, cfg):
    computed = [True, True, False, True, False, False, True, False]
    steps = tuple(Step() if full else Step("both", (site,), (1.0,)) for full in computed)
    actual, summary = sample_compiled(fastercache.Schedule(steps), cfg)
    assert summary.family == "my own" and {"attention": "joint"}.get(site, site) in {
        row.kind for row in summary.sites if row.blended
    }
    torch.testing.assert_close(actual, by_hand(kind, computed), rtol=1e-11, atol=1e-11)


def test_a_family_of_ones_own_model_has_guidance_and_compiled_phases():
    eager, summary = sample_compiled("paper")
    assert {(row.branch, row.kind): row.skipped for row in summary.sites}["uncond", "joint"] == 4
    compiled, summary = sample_compiled("paper", backend="eager")
    torch.testing.assert_close(compiled, eager, rtol=1e-11, atol=1e-11)
    untouched = sample(model())
    assert torch.equal(sample_compiled("none")[0], untouched) and not torch.equal(eager, untouched)


def test_a_derived_class_may_have_a_family_of_its_own(my_own):
    class MyLargerDenoiser(MyDenoiser):
        pass

    assert registry.family_of(model(MyLargerDenoiser)).name == "my own"  # by its base
    own = type("Own", (my_own["family"].MyFamily,), {"name": "larger", "model_classes": ("MyLargerDenoiser",)})
    fastercache.register_family(own())
    assert registry.family_of(model(MyLargerDenoiser)).name == "larger" and registry.family_of(model()).name == "my own"


def test_a_policy_of_ones_own_goes_by_name_everywhere(my_own, tmp_path):
    every_other = my_own["policy"].every_other
    own, step, kept = model(), iter(range(1, STEPS + 1)), []

    def call(latents, text, time):
        if next(step) in (5, 7):
            return 2 * kept[-1] - kept[-2]
        kept.append(own(latents, text, time))
        return kept[-1]

    expected = sample(call)
    for policy in ("every-other", every_other, partial(every_other, after=4)):
        actual, summary = sample_compiled(policy)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert summary.schedule == "every-other"
    shown = CliRunner().invoke(cli.app, ["inspect", "every-other", "--steps", str(STEPS)])
    assert shown.exit_code == 0 and "every-other, 8 steps" in shown.output and "sum of 2 predictions" in shown.output
    assert policies.get("every-other")(STEPS, True).chart().split()[1] == "####.#.#"


def test_a_format_of_ones_own_is_used_where_it_is_named():
    lossless, before = sample_compiled("paper")
    actual, summary = sample_compiled("paper", cache_format="bfloat16")
    assert summary.cache_format == "bfloat16" and "in bfloat16" in str(summary) and not summary.notes
    maps = sample_compiled("cfg-only")[1].cache_bytes
    assert summary.cache_bytes == summary.cache_bytes_planned == maps + (before.cache_bytes - maps) // 4  # of float64
    assert 0 < (actual - lossless).abs().max() < 0.02
    compiled, _ = sample_compiled("paper", cache_format="bfloat16", backend="eager")
    torch.testing.assert_close(compiled, actual, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("site", ["block", "stack"])
def test_a_format_of_ones_own_keeps_residuals(site):
    policy = partial(policies.fora, sites=(site,), interval=2)
    lossless, _ = sample_compiled(policy)
    actual, _ = sample_compiled(policy, cache_format="bfloat16")
    assert 0 < (actual - lossless).abs().max() < 0.02


def test_a_format_of_ones_own_is_held_to_the_budget_and_never_chosen_by_itself():
    _, own = sample_compiled("paper", cache_format="bfloat16")
    _, fits = sample_compiled("paper", cache_format="bfloat16", max_cache_bytes=own.cache_bytes)
    assert fits.cache_bytes == own.cache_bytes
    with pytest.raises(
        CacheError, match=f"no cache fits max_cache_bytes={own.cache_bytes - 1:,} .bfloat16: {own.cache_bytes:,} bytes"
    ):
        sample_compiled("paper", cache_format="bfloat16", max_cache_bytes=own.cache_bytes - 1)
    with pytest.raises(CacheError, match="no cache fits") as refused:
        sample_compiled(
            "paper", max_cache_bytes=own.cache_bytes
        )  # float64 in the model's own dtype does not fit, nor can it be packed
    assert "bfloat16:" not in str(refused.value)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (None, "None is not a Family; pass an instance"),
        (fastercache.Family, "is not a Family; pass an instance of a subclass"),
        ({"name": "other"}, "has name 'other' and model_classes None"),
        ({"name": "other", "model_classes": "Other"}, "model_classes 'Other'; give a name, and a tuple"),
        ({"model_classes": ("Other",)}, "has name None"),
        (
            {"name": "other", "model_classes": ("Other",), "layout": "both"},
            "has layout 'both'; it must be one of 'uncond-first'",
        ),
        ({"name": "Latte", "model_classes": ("Other",)}, "a family named 'Latte' is known already"),
        (
            {"name": "other", "model_classes": ("LatteT2V",)},
            "LatteT2V belongs to the family Latte already; derive a class",
        ),
        ({"name": "other", "model_classes": ("MyDenoiser",)}, "MyDenoiser belongs to the family my own already"),
    ],
)
def test_a_family_that_cannot_be_registered_is_refused(family, message):
    if isinstance(family, dict):
        family = type("Other", (fastercache.Family,), family | {"parts": lambda self, model: []})()
    with pytest.raises(UnsupportedModelError, match=message):
        fastercache.register_family(family)


@pytest.mark.parametrize(
    ("name", "policy", "message"),
    [
        ("paper", policies.none, "a policy named 'paper' is known already"),
        ("latte/paper", policies.none, "known already"),
        ("every-other", policies.none, "known already"),
        ("magcache", policies.none, "known already"),
        ("mine.json", policies.none, "must be text that does not end in .json"),
        ("", policies.none, "name is ''"),
        (3, policies.none, "name is 3"),
        ("mine", 3, "policy 'mine' cannot be called as policy.steps, guidance."),
        ("mine", lambda steps: None, "policy 'mine' cannot be called as policy.steps, guidance.: too many"),
        ("mine", policies.magcache, "cannot be called .*'ratios'; functools.partial"),
    ],
)
def test_a_policy_that_cannot_be_registered_is_refused(name, policy, message):
    with pytest.raises(ScheduleError, match=message):
        fastercache.register_policy(name, policy)


@pytest.mark.parametrize("name", [None, "", 3, "model", "int8", "bfloat16"])
def test_a_format_that_cannot_be_registered_is_refused(my_own, name):
    with pytest.raises(CacheError, match="is not a CacheFormat; pass an instance"):
        fastercache.register_cache_format(my_own["format"].BFloat16)
    other = my_own["format"].BFloat16()
    other.name = name
    with pytest.raises(
        CacheError, match=f"a cache format's name is {name!r}; it must be text that is not one of 'model'"
    ):
        fastercache.register_cache_format(other)


def test_what_is_not_registered_is_unknown(my_own):
    del formats._BY_NAME["bfloat16"], policies.BY_NAME["every-other"]
    registry.FAMILIES.pop()
    with pytest.raises(UnsupportedModelError, match="MyDenoiser is of no known model family"):
        sample_compiled("none")
    with pytest.raises(ScheduleError, match="unknown policy 'every-other'"):
        policies.get("every-other")
    with pytest.raises(CacheError, match="cache_format is 'bfloat16'; it must be one of 'model', 'int8', 'int8-int4'"):
        fastercache.compile(model(), cache_format="bfloat16")


def test_each_of_them_is_under_40_lines():
    assert all(len(path.read_text().splitlines()) < 40 for path in EXTENSIONS.glob("my_*.py"))
