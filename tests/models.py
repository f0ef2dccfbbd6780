"""Small models with random weights, and the arguments of one call of each."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroTransformer3DModel,
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from torch import nn

from bench.architectures import LatteT2V, STDiT3, VchitectXLTransformerModel


def latte(dtype: torch.dtype = torch.float64, seed: int = 0, frames: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=12,
        video_length=frames,
    )
    return model.to(dtype).eval().requires_grad_(False)


def cogvideox(dtype: torch.dtype = torch.float64, seed: int = 0, layers: int = 2, heads: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=8,
        in_channels=2,
        out_channels=2,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=layers,
        sample_width=6,
        sample_height=10,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=5,
    )
    return ready(model, dtype)


def ready(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """For sampling, with no parameter at zero: diffusers starts some projections there, which would hide a wrong
    branch."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(False)


def arguments(model: nn.Module, rows: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of a call with `rows` rows, every row different."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    latte = type(model).__name__.startswith("Latte")
    shape = (rows, 2, 3, 8, 8) if latte else (rows, 3, 2, 10, 6)
    return {
        "hidden_states": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),
        "encoder_hidden_states": torch.randn((rows, 5, 12), generator=generator, dtype=torch.float64).to(dtype),
        "timestep": torch.full((rows,), 500),
        "return_dict": False,
    }


MODELS = {"latte": latte, "cogvideox": cogvideox}


# ---- one model of each other family, and the arguments of a call with `rows` rows of different values ----------------


def stdit3(dtype: torch.dtype = torch.float64, seed: int = 0, heads: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return ready(
        STDiT3(hidden_size=16, depth=2, num_heads=heads, in_channels=2, caption_channels=12, model_max_length=5), dtype
    )


def latte_t2v(dtype: torch.dtype = torch.float64, seed: int = 0, heads: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = LatteT2V(
        num_attention_heads=heads,
        attention_head_dim=8,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=(8, 8),
        caption_channels=12,
    )
    return ready(model, dtype)


def mochi(dtype: torch.dtype = torch.float64, seed: int = 0, heads: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = MochiTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=12,
        in_channels=2,
        text_embed_dim=16,
        time_embed_dim=8,
    )
    return ready(model, dtype)


def ltx(dtype: torch.dtype = torch.float64, seed: int = 0, heads: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=heads,
        attention_head_dim=8,
        cross_attention_dim=8 * heads,
        num_layers=2,
        caption_channels=12,
    )
    return ready(model, dtype)


def allegro(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2,
        out_channels=2,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=12,
    )
    return ready(model, dtype)


def hunyuan(dtype: torch.dtype = torch.float64, seed: int = 0, heads: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = HunyuanVideoTransformer3DModel(
        in_channels=2,
        out_channels=2,
        num_attention_heads=heads,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=6,
        rope_axes_dim=(4, 2, 2),
    )
    return ready(model, dtype)


def hunyuan15(dtype: torch.dtype = torch.float64, seed: int = 0, heads: int = 2, conditions: int = 0) -> nn.Module:
    """conditions: channels of its input beside those that it predicts."""
    torch.manual_seed(seed)
    model = HunyuanVideo15Transformer3DModel(
        in_channels=2 + conditions,
        out_channels=2,
        num_attention_heads=heads,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=12,
        text_embed_2_dim=10,
        image_embed_dim=6,
        rope_axes_dim=(4, 2, 2),
    )
    model.context_embedder_2 = type(model.context_embedder_2)(10, 16, 8 * heads)  # its width is 2048 for any model
    return ready(model, dtype)


def wan(dtype: torch.dtype = torch.float64, seed: int = 0, heads: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=12,
        in_channels=2,
        out_channels=2,
        text_dim=12,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
    )
    return ready(model, dtype)


def vchitect(dtype: torch.dtype = torch.float64, seed: int = 0, heads: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = VchitectXLTransformerModel(
        sample_size=16,
        in_channels=2,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=heads,
        joint_attention_dim=12,
        caption_projection_dim=8 * heads,
        pooled_projection_dim=6,
        out_channels=2,
        pos_embed_max_size=12,
    )
    return ready(model, dtype)


class Values:
    """Random tensors in float64, rounded to a dtype: the same values whatever the dtype."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)


def mask(rows: int, tokens: int) -> torch.Tensor:
    """Row i has its first 1 + (i mod tokens) tokens valid."""
    return (torch.arange(tokens) <= torch.arange(rows)[:, None] % tokens).long()


def call(model: nn.Module, rows: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of `forward`. With guidance in one batch, two rows are one prompt's."""
    values, name = Values(next(model.parameters()).dtype, seed), type(model).__name__
    time = torch.full((rows,), 500.0).to(values.dtype)
    if name == "STDiT3":
        prompts = max(rows // 2, 1)
        return {
            "x": values(rows, 2, 3, 7, 8),
            "timestep": time,
            "y": values(rows, 1, 5, 12),
            "mask": mask(prompts, 5),
            "x_mask": torch.arange(3).expand(rows, 3) > 0,
            "fps": torch.full((prompts,), 24.0, dtype=values.dtype),
            "height": torch.full((prompts,), 56.0),
            "width": torch.full((prompts,), 64.0),
        }
    common = {"timestep": time, "return_dict": False}
    if name == "WanTransformer3DModel":
        return common | {"hidden_states": values(rows, 2, 3, 8, 6), "encoder_hidden_states": values(rows, 5, 12)}
    if name == "VchitectXLTransformerModel":
        return common | {
            "hidden_states": values(rows, 3, 2, 8, 6),
            "encoder_hidden_states": values(rows, 5, 12),
            "pooled_projections": values(rows, 6),
        }
    if name == "LatteT2V":
        return common | {
            "hidden_states": values(rows, 2, 3, 8, 8),
            "encoder_hidden_states": values(rows, 1, 5, 12),
            "encoder_attention_mask": mask(rows, 5)[:, None],
        }
    if name == "LTXVideoTransformer3DModel":
        return common | {
            "hidden_states": values(rows, 2 * 6 * 5, 4),
            "encoder_hidden_states": values(rows, 5, 12),
            "encoder_attention_mask": mask(rows, 5),
            "num_frames": 2,
            "height": 6,
            "width": 5,
        }
    if name == "HunyuanVideo15Transformer3DModel":
        return common | {
            "hidden_states": values(rows, model.config.in_channels, 3, 8, 6),
            "encoder_hidden_states": values(rows, 5, 12),
            "encoder_attention_mask": mask(rows, 5),
            "encoder_hidden_states_2": values(rows, 3, 10),
            "encoder_attention_mask_2": mask(rows, 3),
            "image_embeds": values(rows, 4, 6),
        }
    texts = {
        "encoder_hidden_states": values(rows, 5, 16 if name.startswith("Mochi") else 12),
        "encoder_attention_mask": mask(rows, 5),
    }
    if name.startswith("Hunyuan"):
        texts |= {"pooled_projections": values(rows, 6), "guidance": torch.full((rows,), 6000.0).to(values.dtype)}
    return common | texts | {"hidden_states": values(rows, 2, 3, 8, 6)}


def latents_of(arguments: dict[str, Any]) -> str:
    return "x" if "x" in arguments else "hidden_states"


OTHERS = {"stdit3": stdit3, "latte_t2v": latte_t2v, "mochi": mochi, "ltx": ltx, "allegro": allegro, "hunyuan": hunyuan}
TWO_CALLS = {"wan": wan, "vchitect": vchitect, "hunyuan15": hunyuan15}
"""Families whose pipelines call once for each branch."""
