"""The architectures of our own have the parameters of the published checkpoints, by name and shape, and upstream's
conventions."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from models import OTHERS, TWO_CALLS, call

from bench.published import build


def names(model):
    """Each name of the state dict with its layer left out -> how often it occurs."""
    return Counter(re.sub(r"\.\d+\.", ".N.", key, count=1) if "blocks." in key else key for key in model.state_dict())


def layer(prefix, parts):
    return {f"{prefix}.N.{part}" for part in parts}


def pairs(*modules):
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


STDIT3_BLOCK = [
    *pairs(
        "attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2"
    ),
    "attn.q_norm.weight",
    "attn.k_norm.weight",
    "scale_shift_table",
]
LATTE_BLOCK = [
    *pairs(*(f"attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")), "ff.net.0.proj", "ff.net.2"),
    "scale_shift_table",
]
LATTE_CROSS = pairs(*(f"attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")))
VCHITECT_ATTENTION = [
    "to_q",
    "to_k",
    "to_v",
    "to_q_cross",
    "to_q_temp",
    "to_k_temp",
    "to_v_temp",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_out.0",
    "to_out_temporal",
    "to_out_context",
    "to_add_out_temporal",
]
VCHITECT_BLOCK = pairs(
    "norm1.linear",
    "norm1_context.linear",
    *(f"attn.{part}" for part in VCHITECT_ATTENTION),
    "ff.net.0.proj",
    "ff.net.2",
)
VCHITECT_TEXT = pairs("attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")


def test_stdit3_has_the_names_of_open_sora():
    model, _ = build("open-sora-1.2")
    outside = pairs(
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "fps_embedder.mlp.0",
        "fps_embedder.mlp.2",
        "t_block.1",
        "y_embedder.y_proj.fc1",
        "y_embedder.y_proj.fc2",
        "final_layer.linear",
    )
    expected = {*outside, "y_embedder.y_embedding", "rope.freqs", "final_layer.scale_shift_table"}
    blocks = layer("spatial_blocks", STDIT3_BLOCK) | layer("temporal_blocks", STDIT3_BLOCK)
    assert names(model) == Counter(dict.fromkeys(expected, 1) | dict.fromkeys(blocks, 28))
    state = model.state_dict()
    assert state["y_embedder.y_embedding"].shape == (300, 4096) and state["rope.freqs"].shape == (36,)
    assert state["x_embedder.proj.weight"].shape == (1152, 4, 1, 2, 2) and state["final_layer.linear.weight"].shape == (
        32,
        1152,
    )


def test_latte_t2v_has_the_names_of_open_sora_plan():
    model, _ = build("open-sora-plan-1.1")
    outside = pairs(
        "pos_embed.proj",
        "proj_out",
        "adaln_single.linear",
        "adaln_single.emb.timestep_embedder.linear_1",
        "adaln_single.emb.timestep_embedder.linear_2",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
    )
    expected = {*outside, "caption_projection.y_embedding", "scale_shift_table"}
    blocks = layer("transformer_blocks", LATTE_BLOCK + LATTE_CROSS) | layer("temporal_transformer_blocks", LATTE_BLOCK)
    assert names(model) == Counter(dict.fromkeys(expected, 1) | dict.fromkeys(blocks, 28))
    assert model.state_dict()["proj_out.weight"].shape == (2 * 2 * 8, 1152)


def test_vchitect_has_the_names_of_its_checkpoint():
    model, _ = build("vchitect-2.0")
    embedders = [f"time_text_embed.{which}_embedder.linear_{n}" for which in ("timestep", "text") for n in (1, 2)]
    outside = {
        *pairs("pos_embed.proj", *embedders, "context_embedder", "norm_out.linear", "proj_out"),
        "pos_embed.pos_embed",
    }
    expected = dict.fromkeys(outside, 1) | dict.fromkeys(layer("transformer_blocks", VCHITECT_BLOCK), 24)
    assert names(model) == Counter(expected | dict.fromkeys(layer("transformer_blocks", VCHITECT_TEXT), 23))
    assert model.state_dict()["transformer_blocks.23.norm1_context.linear.weight"].shape == (2 * 1536, 1536)


@pytest.mark.parametrize("name", ["stdit3", "latte_t2v", "vchitect"])
def test_rows_are_independent(name):
    """A row's prediction is the same alone and in a batch: no row reads another."""
    model = (OTHERS | TWO_CALLS)[name]()
    rows = 4
    inputs = call(model, rows)
    whole = model(**inputs)
    whole = whole if isinstance(whole, torch.Tensor) else whole[0]
    for row in range(rows):
        alone = {
            key: value[row : row + 1] if isinstance(value, torch.Tensor) and len(value) == rows else value
            for key, value in inputs.items()
        }
        if name == "stdit3":  # one row for each prompt: rows 0 and 2 are the first prompt's, as [cond, uncond] has them
            alone |= {key: inputs[key][row % 2 : row % 2 + 1] for key in ("mask", "fps", "height", "width")}
        output = model(**alone)
        output = output if isinstance(output, torch.Tensor) else output[0]
        torch.testing.assert_close(output, whole.unflatten(0, (rows, -1))[row], rtol=1e-5, atol=1e-6)


def test_open_sora_takes_frames_that_are_given_as_of_timestep_0():
    """`x_mask` false: the frame is modulated as at timestep 0, whatever the timestep is, but sees the others."""
    model = OTHERS["stdit3"]()
    inputs = call(model, 2)
    late = inputs | {"timestep": torch.full((2,), 900.0, dtype=torch.float64)}
    none = {"x_mask": torch.zeros(2, 3, dtype=torch.bool)}
    assert torch.equal(model(**inputs | none), model(**late | none))
    assert not torch.equal(model(**inputs), model(**late))
