"""What pipelines other than the known families' do: how they say that guidance is on, what they pass, how often they
loop."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from models import Values
from test_generic import cogview4, inputs_of, skyreels
from test_video_pipelines import sample, wan, wan_experts

import fastercache
from fastercache import FasterCacheWarning, RunError
from fastercache.models.registry import family_of

STEPS = 12


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Pipeline:
    """As diffusers' pipelines are: components, a state that the call sets, a scheduler. `steps` is the work of one call
    of it."""

    def __init__(self, **components):
        self.components = {"scheduler": FlowMatchEulerDiscreteScheduler()} | components
        self.config = SimpleNamespace(boundary_ratio=None)
        vars(self).update(self.components)

    def denoise(self, labels, **arguments):
        for _ in range(STEPS):
            for label in labels:
                with self.transformer.cache_context(label):
                    self.transformer(**inputs_of(self.transformer, 1) | arguments)


def compiled(cls, model=None, policy="dynamic-only"):
    pipe = cls(transformer=model or skyreels())
    pipe.scheduler.set_timesteps(STEPS)
    return fastercache.compile(pipe, policy)


class TestGuidance:
    def test_a_scale_of_none_is_no_guidance(self):
        """QwenImage: the scale is an input of distilled models, and `None` for the others."""

        class Qwen(Pipeline):
            guidance_scale = None

            def __call__(
                self, negative_prompt=None, negative_prompt_embeds=None, true_cfg_scale=4.0, guidance_scale=None
            ):
                self.denoise(["cond", "uncond"] if negative_prompt and true_cfg_scale > 1 else ["cond"])

        pipe = compiled(Qwen)
        pipe()
        assert fastercache.summary(pipe).guidance == "none"
        pipe("bad quality")
        assert fastercache.summary(pipe).guidance == "cond-then-uncond"
        pipe("bad quality", true_cfg_scale=1.0)
        assert fastercache.summary(pipe).guidance == "none"

    @pytest.mark.parametrize("embeds", [{}, {"negative_prompt_embeds": 1, "negative_pooled_prompt_embeds": 1}])
    def test_embedded_guidance_is_one_branch(self, embeds):
        """Flux and FramePack: `guidance_scale` is an input of the model, and `true_cfg_scale` guides, with a negative
        prompt."""

        class Flux(Pipeline):
            guidance_scale = 3.5

            def __call__(
                self,
                negative_prompt=None,
                negative_prompt_embeds=None,
                negative_pooled_prompt_embeds=None,
                true_cfg_scale=1.0,
            ):
                self.denoise(["cond", "uncond"] if true_cfg_scale > 1 and negative_pooled_prompt_embeds else ["cond"])

        pipe = compiled(Flux)
        pipe(**embeds)
        assert fastercache.summary(pipe).guidance == "none"
        pipe(**embeds, true_cfg_scale=4.0)
        assert fastercache.summary(pipe).guidance == ("cond-then-uncond" if embeds else "none")

    def test_embedded_guidance_alone_is_one_branch(self):
        class Control(Pipeline):
            guidance_scale = 30.0

            def __call__(self):
                self.denoise(["cond"])

        model = skyreels()
        model.register_to_config(guidance_embeds=True)
        pipe = compiled(Control, model)
        pipe()
        assert fastercache.summary(pipe).guidance == "none"

    @pytest.mark.parametrize("conditions", [1, 2])
    def test_a_guider_tells_and_its_labels_are_known(self, conditions):
        """Motif and HunyuanVideo 1.5: no property says that guidance is on, and the branches are "pred_cond" and
        "pred_uncond"."""

        class Guided(Pipeline):
            guider = SimpleNamespace(num_conditions=conditions)

            def __call__(self):
                self.denoise(["pred_cond", "pred_uncond"][:conditions])

        pipe = compiled(Guided)
        pipe()
        summary = fastercache.summary(pipe)
        assert (summary.guidance, summary.steps_done) == (["none", "cond-then-uncond"][conditions - 1], STEPS)

    def test_a_third_branch_is_refused_at_its_first_call(self):
        class Skipping(Pipeline):
            do_classifier_free_guidance = True
            calls = 0

            def __call__(self):
                self.denoise(["cond", "uncond", "uncond_stg"])

        pipe = compiled(Skipping)
        with pytest.raises(RunError, match="labels this call 'uncond_stg', which is neither"):
            pipe()
        assert "ended by an error after 1 steps" in str(fastercache.summary(pipe))


class OneMask(type(skyreels())):
    """As Cosmos: a mask of one row, which the model repeats for the batch."""

    def forward(self, hidden_states, padding_mask, **arguments):
        repeated = padding_mask.repeat(len(hidden_states), 1, hidden_states.shape[2], 1, 1)
        return super().forward(hidden_states=hidden_states + repeated, **arguments)


class Nested(type(skyreels())):
    """As PixArt and SD3 with an IP-Adapter: batched tensors inside of an argument."""

    def forward(self, hidden_states, timestep, encoder_hidden_states, added=None, return_dict=False):
        return super().forward(
            hidden_states + added["size"][0][:, None, None, None, None],
            timestep,
            encoder_hidden_states,
            return_dict=False,
        )


class TestArguments:
    @pytest.mark.parametrize("order", ["cond-then-uncond", "uncond-first"])
    def test_a_mask_of_one_row_stays_one(self, order):
        rows = 2 if order == "uncond-first" else 1
        model = skyreels()
        model.__class__ = OneMask
        arguments = inputs_of(model, rows) | {"padding_mask": torch.ones(1, 1, 1, 8, 6)}
        expected = model(**arguments)[0]
        fastercache.compile(model, steps=STEPS, cfg=order)
        for number in range(STEPS * (1 if rows == 2 else 2)):
            output = model(**arguments)[0]
            assert number > 1 or torch.equal(output, expected)
        assert fastercache.summary(model).skipped_anything and fastercache.summary(model).flops.ratio > 1

    def test_what_cannot_be_split_is_said_as_the_run_begins(self):
        model = skyreels()
        model.__class__ = Nested
        arguments = inputs_of(model, 2) | {"added": {"size": [torch.ones(2)]}}
        fastercache.compile(model, steps=STEPS, cfg="uncond-first")
        with pytest.raises(RunError, match=r"argument 'added' holds tensors of 2 rows.*inside a dict.*'dynamic-only'"):
            model(**arguments)
        fastercache.restore(model)
        fastercache.compile(model, "dynamic-only", steps=STEPS, cfg="uncond-first")
        for _ in range(STEPS):
            model(**arguments)
        assert fastercache.summary(model).skipped_anything

    @pytest.mark.parametrize("order", ["cond-then-uncond", "uncond-then-cond"])
    def test_texts_of_two_lengths_are_refused_where_both_are_cached(self, order):
        model = cogview4()
        long = inputs_of(model, 1)
        short = long | {"encoder_hidden_states": Values(torch.float32, 1)(1, 3, 12)}
        fastercache.compile(model, "dynamic-only", steps=STEPS, cfg=order)
        model(**long)
        with pytest.raises(
            RunError, match=r"'encoder_hidden_states' has shapes \[1, 5, 12\] and \[1, 3, 12\].*pad both.*'cfg-only'"
        ):
            model(**short)
        fastercache.restore(model)
        fastercache.compile(model, "cfg-only", steps=STEPS, cfg=order)
        for _ in range(STEPS):
            model(**long)
            model(**short)
        assert fastercache.summary(model).skipped_anything


def test_a_pipeline_that_loops_several_times_is_refused_at_its_first_call():
    """As SkyReels' long videos, Helios and FramePack: each loop has all steps, for a part of the frames."""

    class Loops(Pipeline):
        vae_scale_factor_temporal = 4
        do_classifier_free_guidance = False

        def __call__(self, num_frames):
            for _ in range(-(-num_frames // 9)):
                self.denoise(["cond"])

    pipe = compiled(Loops)
    pipe(num_frames=9)
    assert fastercache.summary(pipe).steps_done == STEPS
    with pytest.raises(
        RunError, match="the video has 5 latent frames, but this call 3: the pipeline samples it in several loops"
    ):
        pipe(num_frames=17)
    with fastercache.disabled(pipe):
        pipe(num_frames=17)


def test_attention_to_another_stream_is_no_joint_attention():
    """LTX-2's blocks have cross-attentions between video and audio, of the class of the others."""
    from diffusers import LTX2VideoTransformer3DModel

    with torch.device("meta"):
        model = LTX2VideoTransformer3DModel(num_layers=2)
    kinds = {part.path.split(".", 2)[2]: part.kind for part in family_of(model).parts(model)}
    crossing = ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
    assert kinds == {"attn1": "joint", "audio_attn1": "joint", "ff": "mlp", "audio_ff": "mlp"} | dict.fromkeys(
        crossing, "cross"
    )


def test_an_expert_that_skips_nothing_does_not_warn_while_the_other_skips():
    pipe, arguments = wan_experts(1)
    pipe.register_to_config(boundary_ratio=0.95)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FasterCacheWarning)
        fastercache.compile(pipe)
        sample(pipe, arguments, num_inference_steps=STEPS)
    first = int((pipe.scheduler.timesteps >= 950).sum())
    assert 0 < first < 6 and fastercache.summary(pipe).skipped_anything


def test_a_run_in_which_no_expert_skips_warns():
    pipe, arguments = wan_experts(1)
    fastercache.compile(pipe)
    with pytest.warns(FasterCacheWarning, match="skips nothing here"):
        sample(pipe, arguments, num_inference_steps=2)


def test_wan_with_one_model_is_as_before():
    pipe, arguments = wan(1)
    fastercache.compile(pipe)
    sample(pipe, arguments)
    assert fastercache.summary(pipe).guidance == "cond-then-uncond"
