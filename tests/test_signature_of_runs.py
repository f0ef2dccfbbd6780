"""The signature of a run, and what is said as a run begins whose schedule was made for others."""

from __future__ import annotations

import gc
import warnings
import weakref
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from models import arguments, cogvideox, latte
from test_video_pipelines import sample as sample_wan
from test_video_pipelines import wan_experts

import fastercache
from fastercache import CompileError, FasterCacheWarning, Schedule, ScheduleError, Signature, Step
from fastercache.host import signature as host_signature
from fastercache.host.signature import signature_of
from fastercache.shapes import CALL, load

STEPS = 4
CALIBRATED = Schedule((Step(), Step("cond"), Step("none"), Step()), "calibrated")
WITH_SITES = Schedule((Step(), Step(), Step("both", ("attention",), (1.0,)), Step()), "with sites")


@pytest.fixture(scope="module")
def pipe():
    return load()


@pytest.fixture(autouse=True)
def as_it_was(pipe):
    yield
    with suppress(CompileError):  # which says that it is not compiled
        fastercache.restore(pipe)


def sample(pipe, **changes):
    generator = torch.Generator().manual_seed(0)
    options = CALL | {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "latent"} | changes
    return pipe("a red circle moving right", generator=generator, **options).frames


def signature(pipe, **changes) -> Signature:
    """Of the run that the pipeline has made last."""
    known = {"steps": STEPS, "shape": (3, 8, 16, 16), "dtype": torch.float32, "guided": True, "cache_format": "model"}
    return signature_of(pipe, pipe.transformer, {"guidance_scale": 4.0}, **known | changes)


@pytest.fixture
def made_for(pipe) -> Signature:
    sample(pipe)
    return signature(pipe)


def quietly(pipe, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(pipe, **changes)
    assert not any("was made for" in note for note in fastercache.summary(pipe).notes)


def test_a_signature_says_what_was_run(made_for):
    assert (made_for.model, made_for.scheduler) == ("LatteTransformer3DModel", "DDIMScheduler")
    assert made_for.sigmas == (999.0, 749.0, 499.0, 249.0) and made_for.shape == (3, 8, 16, 16)
    assert made_for.guidance == (4.0,) and made_for.adapters == () and made_for.dtype == "float32"
    assert all(len(text) == 16 for text in (made_for.config, made_for.weights, made_for.scheduler_config))


def test_a_run_of_the_same_kind_is_not_spoken_of(pipe, made_for):
    fastercache.compile(pipe, replace(WITH_SITES, made_for=made_for))
    quietly(pipe)


def test_what_is_doubtful_is_warned_of_once_and_noted_always(pipe, made_for):
    fastercache.compile(pipe, replace(CALIBRATED, made_for=made_for))
    words = "schedule 'calibrated' was made for other runs than this: its guidance is 6.5, not 4"
    with pytest.warns(FasterCacheWarning, match=rf"{words}; what was measured.*fastercache\.calibrate"):
        sample(pipe, guidance_scale=6.5)
    assert words in fastercache.summary(pipe).notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(pipe, guidance_scale=6.5)
    assert words in fastercache.summary(pipe).notes
    quietly(pipe)


def test_a_run_without_guidance_differs(pipe, made_for):
    fastercache.compile(pipe, replace(CALIBRATED, made_for=made_for))
    with pytest.warns(FasterCacheWarning, match="its guidance is 1, not 4"):
        sample(pipe, guidance_scale=1.0)


def test_another_scheduler_is_refused_before_the_first_step(pipe, made_for, monkeypatch):
    fastercache.compile(pipe, replace(CALIBRATED, made_for=made_for))
    other = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    monkeypatch.setattr(pipe, "scheduler", other)
    message = r"its scheduler is DPMSolverMultistepScheduler, not DDIMScheduler; make one .* fastercache\.calibrate"
    with pytest.raises(ScheduleError, match=message):
        sample(pipe)
    fastercache.restore(pipe)
    fastercache.compile(pipe)
    sample(pipe)


def test_another_step_count_is_refused_and_calibrate_named(pipe, made_for):
    fastercache.compile(pipe, replace(CALIBRATED, made_for=made_for))
    with pytest.raises(
        ScheduleError, match=r"has 4 steps.* run has 5; .*or make one for 5 steps with fastercache\.cal"
    ):
        sample(pipe, num_inference_steps=5)


def test_the_format_of_caches_matters_where_sites_are_reused(pipe, made_for):
    made_for = replace(made_for, cache_format="int8")
    fastercache.compile(pipe, replace(CALIBRATED, made_for=made_for))
    quietly(pipe)
    fastercache.restore(pipe)
    fastercache.compile(pipe, replace(WITH_SITES, made_for=made_for))
    with pytest.warns(FasterCacheWarning, match="its caches are stored as 'model', not 'int8'"):
        sample(pipe)


def test_a_schedule_that_does_not_say_what_it_was_made_for_costs_no_signature(pipe, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a signature was made")

    monkeypatch.setattr(host_signature, "_of_models", refuse)
    fastercache.compile(pipe, CALIBRATED)
    quietly(pipe)


def test_no_run_keeps_the_arguments_of_its_call(pipe):
    def callback(pipe, index, timestep, tensors):
        return tensors

    fastercache.compile(pipe)
    sample(pipe, callback_on_step_end=callback)
    kept = weakref.ref(callback)
    del callback
    gc.collect()
    assert kept() is None and fastercache.summary(pipe).steps == STEPS


def test_sigmas_are_those_of_the_last_steps_of_the_sampler():
    flow = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=5.0)
    flow.set_timesteps(4)
    whole = host_signature._sigmas(flow, 4)
    assert whole == tuple(float(f"{sigma:.5g}") for sigma in flow.sigmas[:4].tolist()) and 0 < whole[-1] < whole[0] <= 1
    assert host_signature._sigmas(flow, 3) == whole[1:]  # a run that begins later, as from a video
    assert host_signature._sigmas(flow, 5) is None and host_signature._sigmas(None, 4) is None


# ---- the model -------------------------------------------------------------------------------------------------------


def of(model, **changes) -> Signature:
    return signature_of(None, model, **{"steps": 3, "shape": (1,), "dtype": torch.float64, "guided": True} | changes)


def test_weights_are_hashed_once_until_they_change(monkeypatch):
    model, count = latte(), []
    hashed = host_signature._hash_of_values
    monkeypatch.setattr(host_signature, "_hash_of_values", lambda weights: count.append(1) or hashed(weights))
    first = of(model).weights
    assert of(model).weights == first and len(count) == 1
    assert of(latte()).weights == first and of(latte(seed=1)).weights != first
    for parameter in model.parameters():
        parameter.mul_(1.01)
    assert of(model).weights != first and len(count) == 4


def test_configurations_tell_models_apart():
    assert of(cogvideox()).config == of(cogvideox()).config != of(cogvideox(layers=3)).config


def test_adapters_are_apart_from_the_weights():
    peft = pytest.importorskip("peft")
    model = cogvideox()
    plain = of(model)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False)
    model.add_adapter(config, adapter_name="style")
    model.requires_grad_(False)
    assert of(model) == replace(plain, adapters=(("style", 2.0),))
    model.set_adapters(["style"], [0.5])
    assert of(model).adapters == (("style", 1.0),)
    model.fuse_lora(adapter_names=["style"])
    fused = of(model)
    assert fused.adapters == (("style", 1.0),) and fused.weights != plain.weights
    model.unfuse_lora()
    model.disable_adapters()
    assert of(model).adapters == ()


def test_a_model_without_configuration_or_plain_weights_is_known_by_its_class():
    class Plain(torch.nn.Linear):
        pass

    found = of(Plain(2, 2, device="meta"))
    assert (found.model, found.config, found.weights) == ("Plain", None, None)


def test_a_denoiser_without_a_pipeline():
    model = cogvideox()
    call = arguments(model, 2)
    made_for = of(model, steps=4, shape=call["hidden_states"].shape[1:])
    fastercache.compile(
        model, replace(CALIBRATED, made_for=replace(made_for, guidance=(4.0,))), steps=4, cfg="cond-first"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            model(**call)
    fastercache.restore(model)
    fastercache.compile(
        model, replace(CALIBRATED, made_for=replace(made_for, shape=(3, 2, 20, 6))), steps=4, cfg="cond-first"
    )
    with pytest.warns(FasterCacheWarning, match="its latents are 3 x 2 x 10 x 6, not 3 x 2 x 20 x 6"):
        model(**call)


def test_two_experts_have_one_signature():
    pipe, call = wan_experts(1)
    sample_wan(pipe, call, num_inference_steps=8, guidance_scale_2=3.0)
    models = [pipe.transformer, pipe.transformer_2]
    known = {"steps": 8, "shape": (2, 3, 8, 6), "dtype": torch.float32, "guided": True}
    made_for = signature_of(pipe, models, {"guidance_scale": 5.0, "guidance_scale_2": 3.0}, **known)
    assert made_for.guidance == (5.0, 3.0) and len(made_for.sigmas) == 8
    assert made_for.weights != of(pipe.transformer).weights
    fastercache.compile(pipe, Schedule((Step(), WITH_SITES.steps[2]) * 4, made_for=made_for))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_wan(pipe, call, num_inference_steps=8, guidance_scale_2=3.0)
    for parameter in pipe.transformer_2.parameters():
        parameter.mul_(1.5)
    with pytest.warns(FasterCacheWarning, match="its model has other weights"):
        sample_wan(pipe, call, num_inference_steps=8, guidance_scale_2=3.0)
