"""HunyuanVideo 1.5 in diffusers: blocks of two streams, the video's and that of an image and two texts; guidance in two
calls."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastercache.models.family import Family, block_parts
from fastercache.models.site import Part, Site

CONTEXT = ("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states")
"""The arguments whose tokens are the second stream. Those that a mask leaves out stay there, behind the others."""


class HunyuanVideo15(Family):
    """A guider of its pipelines says whether there is guidance, for text to video as for image to video."""

    name = "HunyuanVideo 1.5"
    model_classes = ("HunyuanVideo15Transformer3DModel",)
    batched = (
        "hidden_states",
        "timestep",
        "timestep_r",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "encoder_hidden_states_2",
        "encoder_attention_mask_2",
        "image_embeds",
    )
    layout = "cond-then-uncond"
    streams = ("hidden_states", "encoder_hidden_states")
    idle_with = MappingProxyType(
        {"attn": ("norm1", "norm1_context"), "ff": ("norm2",), "ff_context": ("norm2_context",)}
    )

    def parts(self, model: nn.Module) -> list[Part]:
        kinds = {"attn": "joint", "ff": "mlp", "ff_context": "mlp"}
        return block_parts(model, "transformer_blocks", range(self.config(model).num_layers), kinds)

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, _, frames, height, width = arguments["hidden_states"].shape
        patches = (frames // config.patch_size_t) * (height // config.patch_size) * (width // config.patch_size)
        tokens = patches, sum(arguments[name].shape[1] for name in CONTEXT)
        channels = config.num_attention_heads * config.attention_head_dim
        video, context = (torch.Size((batch, count, channels)) for count in tokens)
        if site.kind == "mlp":
            return (context if site.path.endswith("ff_context") else video,)
        return (video,) if site.kind == "stack" else (video, context)

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, channels, *rest = arguments["hidden_states"].shape
        return torch.Size((batch, self.config(model).out_channels or channels, *rest))

    def countable(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Masks that pick all tokens and an image of zeros, as where there is none: `forward` reads them, and does as
        much whatever they are."""
        said = {"encoder_attention_mask": 1, "encoder_attention_mask_2": 1, "image_embeds": 0}
        numbers = {name: torch.full((), number, dtype=arguments[name].dtype) for name, number in said.items()}
        return {**arguments, **{name: number.expand(arguments[name].shape) for name, number in numbers.items()}}
