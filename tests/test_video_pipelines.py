"""diffusers' video pipelines with small random denoisers: untouched where nothing is skipped, cached where something
is."""

from __future__ import annotations

import weakref

import pytest
import torch
from diffusers import (
    AllegroPipeline,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideoPipeline,
    LTXPipeline,
    MochiPipeline,
    WanPipeline,
)
from models import OTHERS, TWO_CALLS, hunyuan15, mask
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastercache
from fastercache import CompileError
from fastercache.cache.cache import Cache

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")
STEPS = 8


def embeddings(names, prompts, width, tokens=5):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn((prompts, tokens, width), generator=generator) for name in names}


def texts(prompts, width):
    return embeddings(("prompt_embeds", "negative_prompt_embeds"), prompts, width) | {
        "prompt_attention_mask": mask(prompts, 5),
        "negative_prompt_attention_mask": mask(prompts, 5),
    }


def mochi(prompts):
    pipe = MochiPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, OTHERS["mochi"](torch.float32))
    return pipe, texts(prompts, 16) | {"height": 64, "width": 48, "num_frames": 13, "guidance_scale": 4.5}


def ltx(prompts):
    pipe = LTXPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, None, None, OTHERS["ltx"](torch.float32)
    )
    return pipe, texts(prompts, 12) | {"height": 192, "width": 160, "num_frames": 9, "guidance_scale": 3.0}


def allegro(prompts):
    pipe = AllegroPipeline(None, None, None, OTHERS["allegro"](torch.float32), DDIMScheduler())
    return pipe, texts(prompts, 12) | {
        "height": 64,
        "width": 48,
        "num_frames": 12,
        "guidance_scale": 7.5,
        "negative_prompt": None,
    }


def hunyuan(prompts):
    pipe = HunyuanVideoPipeline(
        None, None, OTHERS["hunyuan"](torch.float32), None, FlowMatchEulerDiscreteScheduler(), None, None
    )
    pooled = torch.randn((prompts, 6), generator=torch.Generator().manual_seed(1))
    text = embeddings(("prompt_embeds",), prompts, 12) | {
        "prompt_attention_mask": mask(prompts, 5),
        "pooled_prompt_embeds": pooled,
    }
    return pipe, text | {"height": 64, "width": 48, "num_frames": 9}


def hunyuan_true_guidance(prompts):
    pipe, arguments = hunyuan(prompts)
    negative = {
        "negative_prompt_embeds": arguments["prompt_embeds"].flip(2),
        "negative_prompt_attention_mask": mask(prompts, 5),
        "negative_pooled_prompt_embeds": arguments["pooled_prompt_embeds"].neg(),
    }
    return pipe, arguments | negative | {"true_cfg_scale": 4.0}


def hunyuan15_text(prompts, pipeline=HunyuanVideo15Pipeline, **components):
    """Beside two channels of latents the denoiser is given those of an image, zeros here, and a mask."""
    vae = AutoencoderKLHunyuanVideo15(latent_channels=2, block_out_channels=(16,) * 5, layers_per_block=1)
    components |= {"guider": ClassifierFreeGuidance(guidance_scale=4.0), "scheduler": FlowMatchEulerDiscreteScheduler()}
    others = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = pipeline(transformer=hunyuan15(torch.float32, conditions=3), vae=vae, **components, **others)
    pipe.vision_num_semantic_tokens, pipe.target_size = 4, 64
    text = embeddings(("prompt_embeds", "negative_prompt_embeds"), prompts, 12)
    text |= embeddings(("prompt_embeds_2", "negative_prompt_embeds_2"), prompts, 10, tokens=3)
    masks = {name.replace("embeds", "embeds_mask"): mask(prompts, value.shape[1]) for name, value in text.items()}
    return pipe, text | masks | {"height": 128, "width": 96, "num_frames": 9}


def hunyuan15_image(prompts):
    components = {"image_encoder": None, "feature_extractor": None}
    pipe, arguments = hunyuan15_text(prompts, HunyuanVideo15ImageToVideoPipeline, **components)
    of_image = embeddings(("image_embeds",), 1, 6, tokens=4)["image_embeds"]
    pipe.encode_image = lambda image, batch_size, device, dtype: of_image.expand(batch_size, -1, -1)
    del arguments["height"], arguments["width"]
    return pipe, arguments | {"image": Image.linear_gradient("L").resize((64, 64)).convert("RGB")}


def wan(prompts, **components):
    pipe = WanPipeline(
        None, None, None, FlowMatchEulerDiscreteScheduler(), TWO_CALLS["wan"](torch.float32), **components
    )
    text = embeddings(("prompt_embeds", "negative_prompt_embeds"), prompts, 12)
    return pipe, text | {"height": 64, "width": 48, "num_frames": 9, "guidance_scale": 5.0}


def wan_experts(prompts):
    return wan(prompts, transformer_2=TWO_CALLS["wan"](torch.float32, seed=1), boundary_ratio=0.6)


PIPELINES = {
    function.__name__: function
    for function in (
        mochi,
        ltx,
        allegro,
        hunyuan,
        hunyuan_true_guidance,
        hunyuan15_text,
        hunyuan15_image,
        wan,
        wan_experts,
    )
}


def sample(pipe, arguments, **changes):
    pipe.set_progress_bar_config(disable=True)
    arguments = (
        {"num_inference_steps": STEPS, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        | arguments
        | changes
    )
    return pipe(**arguments).frames


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("prompts", [1, 3])
def test_none_is_bit_identical_and_paper_skips_what_it_says(name, prompts):
    pipe, arguments = PIPELINES[name](prompts)
    before = sample(pipe, arguments)
    fastercache.compile(pipe, "none")
    assert torch.equal(sample(pipe, arguments), before)
    fastercache.restore(pipe)
    fastercache.compile(pipe)
    cached = sample(pipe, arguments)
    assert torch.isfinite(cached).all() and not torch.equal(cached, before)
    summary = fastercache.summary(pipe)
    assert (summary.steps, summary.steps_done) == (STEPS, STEPS)
    rows = dict(line.split() for line in summary.chart.splitlines())
    for site in summary.sites:
        blended = rows[site.branch].count("~") if site.kind == "joint" else 0
        skipped = rows[site.branch].count(".")
        assert (site.computed, site.blended, site.skipped) == (STEPS - blended - skipped, blended, skipped)
    assert "~" in rows["cond"] and ("uncond" not in rows or "." in rows["uncond"])
    with fastercache.disabled(pipe):
        assert torch.equal(sample(pipe, arguments), before)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_guidance_off_is_one_branch(name):
    pipe, arguments = PIPELINES[name](1)
    fastercache.compile(pipe)
    sample(pipe, arguments, guidance_scale=1.0)
    assert fastercache.summary(pipe).guidance == "none"


@pytest.mark.parametrize("pipeline", [hunyuan15_text, hunyuan15_image])
def test_a_guider_says_whether_there_is_guidance(pipeline):
    pipe, arguments = pipeline(1)
    fastercache.compile(pipe)
    sample(pipe, arguments)
    assert fastercache.summary(pipe).guidance == "cond-then-uncond"
    pipe.guider.disable()
    sample(pipe, arguments)
    assert fastercache.summary(pipe).guidance == "none"


def test_what_is_counted_of_hunyuan_video_15_is_what_it_computes():
    """Though it reads masks and an image: all tokens stay, whatever these are."""
    pipe, arguments = hunyuan15_text(1)
    fastercache.compile(pipe, "none")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sample(pipe, arguments)
    assert fastercache.summary(pipe).flops.uncached == counter.get_total_flops() > 0


def test_hunyuan_video_15_compiles_by_its_blocks():
    """It asks on the host whether it is given an image."""
    pipe, arguments = hunyuan15_text(1)
    fastercache.compile(pipe)
    expected = sample(pipe, arguments)
    fastercache.restore(pipe)
    fastercache.compile(pipe, backend="eager")
    with pytest.raises(CompileError, match=r"does not compile as one graph: 'Data-dependent branching'; regional=True"):
        sample(pipe, arguments)
    fastercache.restore(pipe)
    fastercache.compile(pipe, backend="eager", regional=True)
    torch.testing.assert_close(sample(pipe, arguments), expected)


class TestExperts:
    """Wan 2.2: one step index for two denoisers, and nothing of one is read by the other."""

    def test_the_schedule_is_divided_where_the_pipeline_changes_experts(self):
        pipe, arguments = wan_experts(1)
        fastercache.compile(pipe)
        sample(pipe, arguments, num_inference_steps=20)
        # Both branches are computed again at the second expert's first step, and every site at its first two.
        first = int((pipe.scheduler.timesteps >= 600).sum())
        schedule = fastercache.policies.paper(20)
        parts = schedule.part(0, first), schedule.part(first, 20)
        assert parts[1].steps[0].branches == "both" and not any(step.reuse for step in parts[1].steps[:2])
        summary = fastercache.summary(pipe)
        assert summary.chart.split()[1] == "".join(part.chart().split()[1] for part in parts)
        assert summary.steps == 20 and summary.model == "WanTransformer3DModel + WanTransformer3DModel"
        assert summary.flops.ratio > 1
        assert "planned" in str(summary)

    def test_the_caches_of_each_are_freed_after_its_last_step(self, monkeypatch):
        caches, alive = [], []

        def remembered(*args):
            cache = Cache(*args)
            caches.append(weakref.ref(cache))
            return cache

        monkeypatch.setattr("fastercache.cache.budget.Cache", remembered)
        pipe, arguments = wan_experts(1)
        fastercache.compile(pipe)

        def count(pipe, index, timestep, tensors):
            alive.append([cache() is not None for cache in caches])
            return tensors

        sample(pipe, arguments, callback_on_step_end=count)
        first = int((pipe.scheduler.timesteps >= 600).sum())
        assert alive == [[True]] * (first - 1) + [[False]] + [[False, True]] * (STEPS - first - 1) + [[False, False]]

    @pytest.mark.parametrize("ratio", [0.0, 2.0])
    def test_an_expert_that_has_no_steps_is_fine(self, ratio):
        pipe, arguments = wan(1, transformer_2=TWO_CALLS["wan"](torch.float32, seed=1), boundary_ratio=ratio)
        fastercache.compile(pipe)
        sample(pipe, arguments)
        assert fastercache.summary(pipe).steps == STEPS

    def test_without_a_boundary_the_second_is_left_alone(self):
        pipe = wan(1, transformer_2=TWO_CALLS["wan"](torch.float32, seed=1))[0]
        fastercache.compile(pipe)
        assert not hasattr(pipe.transformer_2, "_fastercache_engine")

    def test_what_cannot_be_compiled_leaves_both_as_they_were(self):
        pipe = wan_experts(1)[0]
        del pipe.transformer_2.blocks[1]
        with pytest.raises(fastercache.UnsupportedModelError, match=r"no module 'blocks\.1\.attn1'"):
            fastercache.compile(pipe)
        assert "forward" not in vars(pipe.transformer) and not hasattr(pipe.transformer, "_fastercache_engine")
