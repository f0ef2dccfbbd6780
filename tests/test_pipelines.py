"""Whole diffusers pipelines: runs begin and end with the call, whatever happens inside it."""

from __future__ import annotations

import threading

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
    PNDMScheduler,
)
from models import cogvideox

import fastercache
from fastercache import CompileError, RunError, UnsupportedModelError
from fastercache.shapes import CALL, load

ARGUMENTS = CALL | {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "latent"}
PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def shared():
    pipe = load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared):
    yield shared
    if hasattr(shared.transformer, "_fastercache_engine"):
        fastercache.restore(shared)


def sample(pipe, prompt=PROMPT, seed=0, **changes):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **ARGUMENTS | changes).frames


def steps_of(pipe, branch, kind="spatial"):
    return next(
        (row.computed, row.blended, row.skipped)
        for row in fastercache.summary(pipe).sites
        if (row.branch, row.kind) == (branch, kind)
    )


def is_original(model):
    """Whether `forward` is the class's own (accelerate leaves it behind as an attribute)."""
    return getattr(model.forward, "__func__", None) is type(model).forward


def test_compile_restore_and_disabled(pipe):
    before, cls, call = sample(pipe), type(pipe), pipe.__call__.__doc__
    assert fastercache.compile(pipe) is pipe
    assert isinstance(pipe, cls) and type(pipe).__name__ == cls.__name__ and pipe.__call__.__doc__ == call
    cached = sample(pipe)
    assert not torch.equal(cached, before)
    assert steps_of(pipe, "cond") == (6, 2, 0) and steps_of(pipe, "uncond") == (4, 0, 4)
    with fastercache.disabled(pipe):
        assert torch.equal(sample(pipe), before)
    assert torch.equal(sample(pipe), cached)
    assert fastercache.restore(pipe) is pipe and type(pipe) is cls
    assert torch.equal(sample(pipe), before)


def test_a_pipeline_is_warmed_up_without_a_run(pipe):
    """All phases are compiled on the first call's inputs, and no clip is made; the next clip is that of the eager
    pipeline."""
    cached = sample(fastercache.compile(pipe))
    fastercache.restore(pipe)
    torch._dynamo.reset()
    fastercache.compile(pipe, backend="eager", regional=True)
    fastercache.warmup(pipe, PROMPT, progress=False, **ARGUMENTS)
    assert "no run has ended" in str(fastercache.summary(pipe))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(sample(pipe), cached)
    assert "6 graphs by eager" in str(fastercache.summary(pipe))


def test_a_schedule_that_skips_nothing_is_bit_identical(pipe):
    before = sample(pipe)
    fastercache.compile(pipe, "none")
    assert torch.equal(sample(pipe), before)


def test_several_prompts_and_videos_per_prompt(pipe):
    fastercache.compile(pipe)
    prompts = [PROMPT, "a blue circle moving down", "a green triangle moving down"]
    assert sample(pipe, prompts, num_images_per_prompt=2).shape[0] == 6
    assert steps_of(pipe, "uncond") == (4, 0, 4)


def test_guidance_off_reuses_features_only(pipe):
    fastercache.compile(pipe)
    sample(pipe, guidance_scale=1.0)
    assert fastercache.summary(pipe).guidance == "none" and steps_of(pipe, "cond") == (5, 3, 0)


def test_another_step_count_or_scheduler_needs_nothing(pipe):
    fastercache.compile(pipe)
    sample(pipe, num_inference_steps=12)
    assert fastercache.summary(pipe).steps == 12
    scheduler = pipe.scheduler
    pipe.scheduler = PNDMScheduler.from_config(scheduler.config, prediction_type="v_prediction")
    try:
        sample(pipe, num_inference_steps=12)
        assert fastercache.summary(pipe).steps == len(pipe.scheduler.timesteps) != 12
    finally:
        pipe.scheduler = scheduler


@pytest.mark.parametrize("how", ["exception", "interrupt"])
def test_the_run_after_a_broken_one_equals_a_fresh_one(pipe, how):
    fastercache.compile(pipe)
    fresh = sample(pipe)

    def stop(pipe, index, timestep, tensors):
        if index == 4:
            if how == "exception":
                raise KeyboardInterrupt
            pipe._interrupt = True
        return tensors

    if how == "exception":
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, seed=1, callback_on_step_end=stop)
    else:
        sample(pipe, seed=1, callback_on_step_end=stop)
    assert fastercache.summary(pipe).steps_done == 5
    assert torch.equal(sample(pipe), fresh)


def test_a_run_inside_a_run_is_refused_and_the_outer_one_goes_on(pipe):
    fastercache.compile(pipe)
    fresh, seen = sample(pipe), []

    def again(pipe, index, timestep, tensors):
        if index == 4:
            with pytest.raises(RunError, match="already under way in this thread") as caught:
                sample(pipe)
            seen.append(caught)
        return tensors

    assert torch.equal(sample(pipe, callback_on_step_end=again), fresh) and seen


def test_a_second_thread_is_refused(pipe):
    fastercache.compile(pipe)
    messages = []

    def elsewhere():
        try:
            sample(pipe)
        except RunError as error:
            messages.append(str(error))

    def spawn(pipe, index, timestep, tensors):
        if index == 2:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return tensors

    sample(pipe, callback_on_step_end=spawn)
    assert len(messages) == 1 and "another thread" in messages[0]


def test_configuration_and_moves_stay_usable(pipe, tmp_path):
    fastercache.compile(pipe)
    assert pipe.transformer.config.num_layers == 4 and pipe.dtype == torch.float32
    pipe.save_pretrained(tmp_path)
    pipe.to(torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    latents = sample(pipe)
    assert latents.dtype == torch.bfloat16 and torch.isfinite(latents).all()
    pipe.to(torch.float32)


def test_model_offloading_before_or_after(pipe):
    """diffusers renews accelerate's hooks after every call; the schedule must survive that, in both orders."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    fresh = None
    for first in (True, False):
        if first:
            cpu_offload(pipe.transformer, execution_device="cpu")
        fastercache.compile(pipe)
        if not first:
            cpu_offload(pipe.transformer, execution_device="cpu")
        latents = sample(pipe)
        assert fastercache.summary(pipe).skipped_anything
        fresh = latents if fresh is None else fresh
        assert torch.equal(latents, fresh)
        fastercache.restore(pipe)
        remove_hook_from_module(pipe.transformer, recurse=True)
        assert is_original(pipe.transformer)


def test_a_replaced_denoiser_is_noticed(pipe):
    fastercache.compile(pipe)
    transformer = pipe.transformer
    pipe.transformer = load().transformer
    try:
        with pytest.raises(CompileError, match=r"transformer was replaced after fastercache\.compile"):
            sample(pipe)
    finally:
        pipe.transformer = transformer


def test_what_cannot_be_compiled_is_left_as_it_was(pipe):
    cls = type(pipe)
    with pytest.raises(CompileError, match="leave out steps"):
        fastercache.compile(pipe, steps=8)
    fastercache.compile(pipe)
    compiled = type(pipe)
    with pytest.raises(CompileError, match="already"):
        fastercache.compile(pipe, "plain")
    assert type(pipe) is compiled
    fastercache.restore(pipe)
    transformer, pipe.transformer = pipe.transformer, torch.compile(pipe.transformer)
    with pytest.raises(CompileError, match="compiled by torch already"):
        fastercache.compile(pipe)
    pipe.transformer = torch.nn.Linear(1, 1)
    with pytest.raises(UnsupportedModelError, match=r"transformer: Linear.*known are.*LatteTransformer3DModel"):
        fastercache.compile(pipe)
    pipe.transformer = transformer
    assert type(pipe) is cls and is_original(transformer)


class TestCogVideoX:
    @pytest.fixture
    def pipe(self):
        torch.manual_seed(0)
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=2,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
        pipe = CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            transformer=cogvideox(torch.float32),
            scheduler=CogVideoXDDIMScheduler(),
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @staticmethod
    def sample(pipe, prompts=1, **changes):
        generator = torch.Generator().manual_seed(0)
        embeds = torch.randn((2 * prompts, 5, 12), generator=generator)
        arguments = {
            "num_inference_steps": 8,
            "guidance_scale": 6.0,
            "height": 80,
            "width": 48,
            "num_frames": 9,
            "output_type": "latent",
        }
        return pipe(
            prompt_embeds=embeds[:prompts],
            negative_prompt_embeds=embeds[prompts:],
            generator=generator,
            **arguments | changes,
        ).frames

    @pytest.mark.parametrize("prompts", [1, 3])
    def test_none_is_bit_identical_and_paper_is_close(self, pipe, prompts):
        before = self.sample(pipe, prompts)
        fastercache.compile(pipe, "none")
        assert torch.equal(self.sample(pipe, prompts), before)
        fastercache.restore(pipe)
        fastercache.compile(pipe)
        cached = self.sample(pipe, prompts)
        error = (cached - before).norm() / before.norm()
        assert 0 < error < 0.1
        assert steps_of(pipe, "uncond", "joint") == (4, 0, 4)

    def test_a_partial_run_is_as_long_as_its_calls(self, pipe):
        pipe = CogVideoXVideoToVideoPipeline(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
        fastercache.compile(pipe)
        video = torch.rand((1, 9, 3, 80, 48), generator=torch.Generator().manual_seed(1))
        embeds = torch.randn((2, 5, 12), generator=torch.Generator().manual_seed(0))
        pipe(
            video=video,
            strength=0.5,
            num_inference_steps=16,
            height=80,
            width=48,
            prompt_embeds=embeds[:1],
            negative_prompt_embeds=embeds[1:],
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
        summary = fastercache.summary(pipe)
        assert (summary.steps, summary.steps_done) == (8, 8) and summary.skipped_anything

    def test_dynamic_guidance_and_videos_per_prompt(self, pipe):
        fastercache.compile(pipe)
        self.sample(pipe, 2, use_dynamic_cfg=True, num_videos_per_prompt=2)
        assert fastercache.summary(pipe).guidance == "uncond-first" and steps_of(pipe, "cond", "joint") == (6, 2, 0)
