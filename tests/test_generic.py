"""Diffusers' other transformers, and what their pipelines say about the layout of guidance."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import CogView4Transformer2DModel, SkyReelsV2Transformer3DModel, UNet2DModel, WanPipeline
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from models import TWO_CALLS, Values, call, ready
from simulator import Simulator
from test_video_pipelines import wan

import fastercache
from fastercache import RunError, UnsupportedModelError, policies
from fastercache.models.registry import family_of

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")
STEPS = 9


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def skyreels():
    torch.manual_seed(0)
    model = SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2,
        out_channels=2,
        text_dim=12,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
    )
    return ready(model, torch.float32)


def cogview4():
    torch.manual_seed(0)
    model = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=2,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    return ready(model, torch.float32)


def inputs_of(model, rows):
    values = Values(torch.float32, 0)
    texts = {"encoder_hidden_states": values(rows, 5, 12), "timestep": torch.full((rows,), 500.0), "return_dict": False}
    if isinstance(model, SkyReelsV2Transformer3DModel):
        return texts | {"hidden_states": values(rows, 2, 3, 8, 6)}
    sizes = {name: torch.full((rows, 2), 64.0) for name in ("original_size", "target_size", "crop_coords")}
    return texts | sizes | {"hidden_states": values(rows, 2, 8, 8)}


def run(sampler, inputs):
    outputs = []
    for _ in range(STEPS):
        prediction = sampler(inputs)
        outputs.append(prediction)
        inputs = inputs | {"hidden_states": inputs["hidden_states"] - 0.1 * prediction}
    return torch.stack(outputs)


@pytest.mark.parametrize(("build", "site"), [(skyreels, "attention"), (skyreels, "mlp"), (cogview4, "attention")])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_model_of_no_known_family_equals_the_simulator(build, site, prompts):
    model, schedule = build(), policies.paper(STEPS, True, site=site)
    assert family_of(model).name == "generic"
    expected = run(Simulator(build(), schedule, "uncond-first"), inputs_of(model, 2 * prompts))
    fastercache.compile(model, schedule, steps=STEPS, cfg="uncond-first")
    actual = run(lambda inputs: model(**inputs)[0], inputs_of(model, 2 * prompts))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    summary = fastercache.summary(model)
    assert summary.skipped_anything and summary.cache_bytes == summary.cache_bytes_planned > 0
    assert summary.flops.ratio > 1


def test_cross_attention_is_a_site_of_its_own_kind():
    paths = {part.path.split(".", 2)[2]: part.kind for part in family_of(skyreels()).parts(skyreels())}
    assert paths == {"attn1": "joint", "attn2": "cross", "ffn": "mlp"}


def test_what_is_not_found_is_said():
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(UnsupportedModelError, match="UNet2DModel: forward has no argument 'hidden_states'"):
        fastercache.compile(unet)
    model = skyreels()
    for block in model.blocks:
        block.attn1 = torch.nn.Identity()
    with pytest.raises(
        UnsupportedModelError, match=r"no self-attention was found.*blocks of SkyReelsV2TransformerBlock"
    ):
        fastercache.compile(model)
    model = skyreels()
    fastercache.compile(model)
    forward = model.blocks[0].forward
    model.blocks[0].forward = lambda hidden_states, *args: forward(
        hidden_states[:, : 10**6 + int(hidden_states.sum())], *args
    )
    with (
        pytest.raises(UnsupportedModelError, match="cannot be called on shapes alone"),
        fastercache.run(model, steps=3, cfg="none"),
    ):
        model(**inputs_of(model, 1))


class PerFrame(ModelMixin, ConfigMixin):
    """Attention over the tokens of each frame, [batch, frames, tokens, 8]."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"attn": Attention(query_dim=8, heads=2, dim_head=4)})])

    def forward(self, hidden_states):
        return (self.blocks[0]["attn"](hidden_states.flatten(0, 1)).unflatten(0, hidden_states.shape[:2]),)


def test_rows_that_are_no_elements_of_the_batch_are_refused():
    """Sites whose rows are frames or positions cannot be told apart by their shapes."""
    model = PerFrame().requires_grad_(False)
    fastercache.compile(model, steps=STEPS, cfg="none")
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.attn of PerFrame gives \[6, 4, 8\] for a batch of 2"):
        model(hidden_states=torch.randn(2, 3, 4, 8))


def test_a_part_that_runs_twice_in_a_call_is_refused():
    """CogView4 has one MLP for both streams of a block."""
    model = cogview4()
    fastercache.compile(model, partial(policies.paper, site="mlp"), steps=STEPS, cfg="uncond-first")
    with pytest.raises(
        UnsupportedModelError, match=r"transformer_blocks\.0\.ff of .* runs 2 times in a call.*leave 'mlp' out"
    ):
        model(**inputs_of(model, 2))


def labelled(model, label, inputs):
    with model.cache_context(label):
        return model(**inputs)


class TestLabels:
    """diffusers' pipelines say which branch a call is; a run that was declared otherwise is stopped."""

    @pytest.mark.parametrize(
        ("order", "labels"),
        [
            ("uncond-first", ["cond"]),
            ("cond-then-uncond", ["cond_uncond"]),
            ("cond-then-uncond", ["uncond"]),
            ("uncond-then-cond", ["uncond", "uncond"]),
            ("none", ["cond", "uncond"]),
        ],
    )
    def test_a_call_of_another_layout_is_refused(self, order, labels):
        model = TWO_CALLS["wan"](torch.float32)
        inputs = call(model, 2)
        fastercache.compile(model)
        refused = pytest.raises(RunError, match=f"labels this call '{labels[-1]}'")
        with refused, fastercache.run(model, steps=STEPS, cfg=order):
            for label in labels:
                labelled(model, label, inputs)

    def test_the_context_is_given_back(self):
        model = TWO_CALLS["wan"](torch.float32)
        fastercache.compile(model)
        assert "cache_context" in vars(model)
        fastercache.restore(model)
        assert "cache_context" not in vars(model)

    def test_a_pipeline_of_an_unknown_family_tells_its_layout_by_its_first_call(self):
        pipe, arguments = wan(1)
        pipe.register_modules(transformer=skyreels())
        fastercache.compile(pipe)
        pipe.set_progress_bar_config(disable=True)
        pipe(**arguments, num_inference_steps=STEPS, output_type="latent")
        summary = fastercache.summary(pipe)
        assert (summary.family, summary.guidance, summary.steps_done) == ("generic", "cond-then-uncond", STEPS)

    def test_a_pipeline_that_labels_nothing_is_refused(self):
        class Silent(WanPipeline):
            guidance_scale = 5.0

            def __call__(self):
                return self.transformer(**inputs_of(self.transformer, 1))

        pipe = Silent(None, None, None, FlowMatchEulerDiscreteScheduler(), skyreels())
        pipe.scheduler.set_timesteps(STEPS)
        fastercache.compile(pipe)
        pipe._guidance_scale = 5.0
        with pytest.raises(UnsupportedModelError, match=r"Silent does not say how it lays out guidance.*labelled None"):
            pipe()
