"""Vchitect-2.0: three attentions summed in one module, two calls a step, the unconditional one first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastercache.families.base import Family, Site, block_sites


class Vchitect(Family):
    """The prediction has a row for each frame: [batch * frames, channels, height, width]."""

    name = "Vchitect"
    model_classes = ("VchitectXLTransformerModel",)
    batched = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    order = "uncond-then-cond"

    def sites(self, model: nn.Module) -> list[Site]:
        last = self.config(model).num_layers - 1
        whole = block_sites(model, "transformer_blocks", range(last), {"attn": "joint", "ff": "mlp", "ff_context": "mlp"})
        return whole + block_sites(model, "transformer_blocks", range(last, last + 1), {"attn": "joint", "ff": "mlp"})

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, frames, _, height, width = arguments["hidden_states"].shape
        tokens = (height // config.patch_size) * (width // config.patch_size)
        channels = config.num_attention_heads * config.attention_head_dim
        video, text = (
            torch.Size((batch * frames, count, channels)) for count in (tokens, arguments["encoder_hidden_states"].shape[1])
        )  # fmt: skip
        if site.kind == "mlp":
            return (text if site.path.endswith("ff_context") else video,)
        return video, text

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, frames, _, *plane = arguments["hidden_states"].shape
        return torch.Size((batch * frames, self.config(model).out_channels, *plane))
