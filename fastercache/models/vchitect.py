"""Vchitect-2.0: three attentions summed in one module, two calls a step, the unconditional one first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastercache.models.family import Family, block_parts
from fastercache.models.site import Part, Site


class Vchitect(Family):
    """The prediction has a row for each frame: [batch * frames, channels, height, width]."""

    name = "Vchitect"
    model_classes = ("VchitectXLTransformerModel",)
    batched = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    layout = "uncond-then-cond"
    streams = 2

    def parts(self, model: nn.Module) -> list[Part]:
        last = self.config(model).num_layers - 1
        whole = block_parts(
            model, "transformer_blocks", range(last), {"attn": "joint", "ff": "mlp", "ff_context": "mlp"}
        )
        return whole + block_parts(model, "transformer_blocks", range(last, last + 1), {"attn": "joint", "ff": "mlp"})

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, frames, _, height, width = arguments["hidden_states"].shape
        tokens = (height // config.patch_size) * (width // config.patch_size)
        channels = config.num_attention_heads * config.attention_head_dim
        video, text = (
            torch.Size((batch * frames, count, channels))
            for count in (tokens, arguments["encoder_hidden_states"].shape[1])
        )
        if site.kind == "mlp":
            return (text if site.path.endswith("ff_context") else video,)
        return (video,) if site.kind == "stack" else (video, text)

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, frames, _, *plane = arguments["hidden_states"].shape
        return torch.Size((batch * frames, self.config(model).out_channels, *plane))

    def latents_like(self, latents: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        return super().latents_like(latents.flatten(0, 1), shape)
