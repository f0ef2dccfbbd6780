"""HunyuanVideo in diffusers: blocks of two streams, then of one; the guidance scale is an input, so there is one
branch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastercache.models.family import Family, block_parts
from fastercache.models.site import Part, Site
from fastercache.schedule.branches import LAYOUTS, BranchLayout


class HunyuanVideo(Family):
    """In the blocks of one stream the site is the attention's output before the projection that it shares with the
    MLP."""

    name = "HunyuanVideo"
    model_classes = ("HunyuanVideoTransformer3DModel",)
    batched = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "pooled_projections",
        "guidance",
    )
    layout = "none"
    streams = ("hidden_states", "encoder_hidden_states")
    idle_with = MappingProxyType(
        {"attn": ("norm1", "norm1_context"), "ff": ("norm2",), "ff_context": ("norm2_context",)}
    )

    def layout_in(self, pipeline: Any, call: Mapping[str, Any], label: str | None) -> BranchLayout:
        """The pipeline can also guide with a negative prompt ("true" guidance), in a second call."""
        embeds = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
        negative = call.get("negative_prompt") is not None or all(call.get(name) is not None for name in embeds)
        return LAYOUTS["cond-then-uncond" if negative and call.get("true_cfg_scale", 1.0) > 1 else "none"]

    def parts(self, model: nn.Module) -> list[Part]:
        config = self.config(model)
        dual = block_parts(
            model, "transformer_blocks", range(config.num_layers), {"attn": "joint", "ff": "mlp", "ff_context": "mlp"}
        )
        single = block_parts(
            model, "single_transformer_blocks", range(config.num_single_layers), {"attn": "joint"}, config.num_layers
        )
        return dual + single

    def idling(self, model: nn.Module, site: Site) -> list[nn.Module]:
        """None where the first frame is given: there a norm tells its tokens from the others."""
        given = getattr(self.config(model), "image_condition_type", None) == "token_replace"
        return [] if given else super().idling(model, site)

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, _, frames, height, width = arguments["hidden_states"].shape
        tokens = (frames // config.patch_size_t) * (height // config.patch_size) * (width // config.patch_size)
        channels = config.num_attention_heads * config.attention_head_dim
        video, text = (
            torch.Size((batch, count, channels)) for count in (tokens, arguments["encoder_hidden_states"].shape[1])
        )
        if site.kind == "mlp":
            return (text if site.path.endswith("ff_context") else video,)
        return (video,) if site.kind == "stack" else (video, text)

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, _, *rest = arguments["hidden_states"].shape
        return torch.Size((batch, self.config(model).out_channels, *rest))
