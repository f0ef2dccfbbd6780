"""What goes wrong in a user's hands gets a message whose remedy helps: each is followed here, and then works."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    SkyReelsV2DiffusionForcingPipeline,
    UniPCMultistepScheduler,
)
from models import call, latte, ready, wan
from test_generic import skyreels
from test_pipelines import PROMPT, sample
from test_video_pipelines import embeddings
from test_video_pipelines import wan as wan_pipeline

import fastercache
from fastercache import CompileError, FasterCacheWarning, RunError, ScheduleError, policies, shapes


@pytest.fixture(scope="module")
def shared():
    pipe = shapes.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(shared):
    scheduler = shared.scheduler
    yield shared
    shared.scheduler = scheduler
    if hasattr(shared.transformer, "_fastercache_engine"):
        fastercache.restore(shared)


# ---- pipelines that call their denoiser otherwise than they say ------------------------------------------------------


def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, ready(model, torch.float32))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample_flux(pipe):
    return pipe(
        prompt_embeds=embeddings(("prompt_embeds",), 1, 12)["prompt_embeds"],
        pooled_prompt_embeds=torch.ones(1, 6),
        height=64,
        width=64,
        num_inference_steps=8,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images


class TwiceConditional(type(wan_pipeline(1)[0])):
    """As Flux without true guidance: it says that it guides, and makes conditional calls alone."""

    def __call__(self, num_inference_steps=8):
        self._guidance_scale = 3.5
        self.scheduler.set_timesteps(num_inference_steps)
        self._num_timesteps = num_inference_steps
        inputs = call(self.transformer, 1)
        with torch.no_grad():
            for _ in range(num_inference_steps):
                with self.transformer.cache_context("cond"):
                    self.transformer(**inputs)


def test_a_pipeline_without_true_guidance_is_told_what_it_can_do():
    """Pipelines refuse cfg=; their denoisers take it."""
    pipe = TwiceConditional(**wan_pipeline(1)[0].components)
    fastercache.compile(pipe)
    with pytest.raises(RunError, match=r"compile\(pipe\.transformer, steps=8, cfg='none'\)") as caught:
        pipe()
    assert "Declare" not in str(caught.value)
    fastercache.restore(pipe)
    fastercache.compile(pipe.transformer, steps=8, cfg="none")
    pipe()
    summary = fastercache.summary(pipe.transformer)
    assert summary.steps_done == 8 and summary.skipped_anything


def test_flux_runs_by_that_remedy():
    pipe = flux()
    before = sample_flux(pipe)
    fastercache.compile(pipe.transformer, steps=8, cfg="none")
    assert not torch.equal(sample_flux(pipe), before)
    assert fastercache.summary(pipe.transformer).skipped_anything


def test_a_long_video_of_several_loops_is_told_what_it_can_do():
    pipe = SkyReelsV2DiffusionForcingPipeline(
        None, None, skyreels(), None, UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    )
    pipe.set_progress_bar_config(disable=True)

    def long_video():
        return pipe(
            None,
            **embeddings(("prompt_embeds", "negative_prompt_embeds"), 1, 12),
            height=64,
            width=48,
            num_frames=33,
            base_num_frames=17,
            overlap_history=9,
            num_inference_steps=8,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    before = long_video()
    fastercache.compile(pipe)
    with pytest.raises(
        RunError,
        match=r"9 latent frames, but this call 5: .*loops.*compile\(pipe\.transformer, steps=8, cfg='cond-then-uncond'",
    ):
        long_video()
    fastercache.restore(pipe)
    fastercache.compile(pipe.transformer, steps=8, cfg="cond-then-uncond")
    assert not torch.equal(long_video(), before)
    summary = fastercache.summary(pipe.transformer)
    assert (summary.steps, summary.steps_done) == (8, 8) and summary.skipped_anything


def test_a_fixed_schedule_under_heun_is_told_the_number_of_calls(pipe):
    """Heun makes 11 calls of 6 steps, so setting 6 steps, as they are, would not help."""
    pipe.scheduler = HeunDiscreteScheduler()
    fastercache.compile(pipe, policies.paper(6))
    with pytest.raises(ScheduleError, match=r"has 11 .*num_inference_steps=6.* a schedule of 11 steps") as caught:
        sample(pipe, num_inference_steps=6)
    assert "set the run's step count" not in str(caught.value)
    fastercache.restore(pipe)
    fastercache.compile(pipe, policies.paper(11))
    sample(pipe, num_inference_steps=6)
    assert fastercache.summary(pipe).steps_done == 11
    fastercache.restore(pipe)
    fastercache.compile(pipe, policies.paper(12))
    pipe.scheduler = shapes.load().scheduler
    with pytest.raises(ScheduleError, match="set the run's step count to 12"):
        sample(pipe)


# ---- warnings --------------------------------------------------------------------------------------------------------


def warnings_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [warning for warning in caught if warning.category is FasterCacheWarning]


def line_of(function):
    """The file and line of the only statement of a function."""
    return __file__, function.__code__.co_firstlineno + 1


class EndsAtOnce(type(wan_pipeline(1)[0])):
    def __call__(self, num_inference_steps=8):
        return None


def test_a_call_without_steps_is_not_taken_for_a_replaced_forward():
    pipe = EndsAtOnce(**wan_pipeline(1)[0].components)
    fastercache.compile(pipe)

    def make_a_call():
        pipe(num_inference_steps=-1)

    (warning,) = warnings_of(make_a_call)
    assert "call with num_inference_steps=-1 made no call of WanTransformer3DModel" in str(warning.message)
    assert (warning.filename, warning.lineno) == line_of(make_a_call)


def test_an_empty_block_is_not_taken_for_a_replaced_forward():
    model = latte()
    fastercache.compile(model)

    def leave_out_the_calls():
        with fastercache.run(model, steps=3, cfg="none"):
            pass

    (warning,) = warnings_of(leave_out_the_calls)
    assert "the block of fastercache.run made no call of LatteTransformer3DModel" in str(warning.message)
    assert (warning.filename, warning.lineno) == line_of(leave_out_the_calls)


def test_warnings_point_at_the_line_of_the_user(pipe):
    fastercache.compile(pipe, "cfg-only")

    def sample_without_guidance():
        pipe(PROMPT, num_inference_steps=5, guidance_scale=1.0, output_type="latent")

    (warning,) = warnings_of(sample_without_guidance)
    assert (warning.filename, warning.lineno) == line_of(sample_without_guidance)
    # 5 steps are enough for it; what is missing is guidance.
    assert "skips unconditional calls alone, and this run has no guidance" in str(warning.message)
    assert "too short" not in str(warning.message)

    model, inputs = wan(torch.float32), call(wan(torch.float32), 1)
    fastercache.compile(model)

    def call_outside_a_run():
        model(**inputs)

    with torch.no_grad():
        (warning,) = warnings_of(call_outside_a_run)
    assert (warning.filename, warning.lineno) == line_of(call_outside_a_run)


def test_a_run_that_is_too_short_with_guidance_too_is_called_so():
    model = latte()
    fastercache.compile(model, "cfg-only", steps=1, cfg="none")
    with torch.no_grad(), pytest.warns(FasterCacheWarning, match="a run of 1 steps is too short"):
        model(
            torch.zeros(1, 2, 3, 8, 8, dtype=torch.float64), torch.zeros(1), torch.zeros(1, 5, 12, dtype=torch.float64)
        )


# ---- what is done to a compiled model afterwards ---------------------------------------------------------------------


@pytest.mark.parametrize("backend", [0, False, 3.5])
def test_what_is_no_backend_is_refused(backend):
    model = latte()
    with pytest.raises(CompileError, match=r"backend is .* or None for no graphs"):
        fastercache.compile(model, backend=backend)
    with pytest.raises(CompileError, match="mode is 5"):
        fastercache.compile(model, backend="eager", mode=5)
    with pytest.raises(CompileError, match="regional 'yes'"):
        fastercache.compile(model, backend="eager", regional="yes")
    assert "forward" not in vars(model)
    fastercache.compile(model, backend=None)


def compile_the_whole(model):
    model.compile(backend="eager")


def compile_the_blocks(model):
    """As diffusers' compile_repeated_blocks does, where a class names its blocks."""
    for block in model.transformer_blocks:
        block.compile(backend="eager")


def undo_torch_compile(model):
    for part in model.modules():
        part._compiled_call_impl = None


@pytest.mark.parametrize(
    ("harm", "reason", "remedy"),
    [
        (compile_the_whole, "compiled by torch", undo_torch_compile),
        (compile_the_blocks, "compiled by torch", undo_torch_compile),
        (
            lambda model: model.enable_cache(
                PyramidAttentionBroadcastConfig(
                    spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
                )
            ),
            "diffusers cache enabled",
            lambda model: model.disable_cache(),
        ),
    ],
)
def test_what_would_go_around_the_schedule_is_noticed(pipe, harm, reason, remedy):
    fastercache.compile(pipe)
    expected = sample(pipe)
    harm(pipe.transformer)
    try:
        with pytest.raises(CompileError, match=reason):
            sample(pipe)
    finally:
        remedy(pipe.transformer)
    assert torch.equal(sample(pipe), expected)


def test_a_compiled_pipeline_is_not_pickled(pipe):
    fastercache.compile(pipe)
    with pytest.raises(
        CompileError, match=r"cannot be pickled; call fastercache\.restore first, or use save_pretrained"
    ):
        pickle.dumps(pipe)
    with pytest.raises(CompileError, match="cannot be copied"):
        copy.deepcopy(pipe)
    assert copy.copy(pipe).transformer is pipe.transformer
    fastercache.restore(pipe)
    assert type(pickle.loads(pickle.dumps(pipe))) is type(pipe)


# ---- a warm-up that would compile nothing ----------------------------------------------------------------------------


class TestWarmup:
    def test_inside_disabled(self, pipe):
        fastercache.compile(pipe, backend="eager")
        with fastercache.disabled(pipe), pytest.raises(CompileError, match="leave that block first"):
            fastercache.warmup(pipe, PROMPT)

    @pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")
    def test_without_a_call_of_the_denoiser(self):
        pipe = EndsAtOnce(**wan_pipeline(1)[0].components)
        fastercache.compile(pipe, backend="eager")
        with pytest.raises(CompileError, match="compiled nothing: the call of this EndsAtOnce ended before"):
            fastercache.warmup(pipe)

    def test_of_a_denoiser_that_does_not_know_its_runs(self):
        model = wan(torch.float32)
        inputs = call(model, 1)
        fastercache.compile(model, partial(policies.paper, start=2), backend="eager")
        with torch.no_grad():
            with pytest.raises(CompileError, match=r"compile it with steps= and cfg=, or warm it up inside a block"):
                fastercache.warmup(model, **inputs)
            with fastercache.run(model, steps=4, cfg="none"):
                fastercache.warmup(model, progress=False, **inputs)
            with torch.compiler.set_stance("fail_on_recompile"), fastercache.run(model, steps=4, cfg="none"):
                for _ in range(4):
                    model(**inputs)
        assert fastercache.summary(model).steps_done == 4

    def test_with_the_defaults_of_the_embedded_pipeline(self, pipe):
        """As the README has it: `fastercache.warmup(pipe, prompt)`, and no other argument."""
        fastercache.compile(pipe, backend="eager", regional=True)
        fastercache.warmup(pipe, PROMPT, progress=False)
        assert "no run has ended" in str(fastercache.summary(pipe))


def test_a_summary_of_the_cpu_has_no_notes_on_other_devices():
    """Where Triton is missing, the ops of a GPU fall back, which is nothing to a run on the CPU."""
    code = """
import sys
sys.modules["triton"] = None
import torch, fastercache
from fastercache import ops
from models import latte, arguments
assert any("CUDA" in reason for reason in ops.fallback_reasons()), ops.fallback_reasons()
model = fastercache.compile(latte(), steps=1, cfg="none")
with torch.no_grad():
    model(**arguments(model, 1))
summary = fastercache.summary(model)
assert summary.steps_done == 1 and not any("CUDA" in note for note in summary.notes), summary.notes
"""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
