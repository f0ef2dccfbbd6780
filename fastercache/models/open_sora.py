"""Open-Sora 1.2: spatial and temporal blocks in turn, all with cross-attention, one batch [cond, uncond]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from fastercache.models.family import Family, alternating_parts, child
from fastercache.models.site import Part, Site


class OpenSora(Family):
    name = "Open-Sora"
    model_classes = ("STDiT3",)
    batched = ("x", "timestep", "y", "mask", "x_mask", "fps", "height", "width")
    repeated = ("mask", "fps", "height", "width")
    layout = "cond-first"

    def parts(self, model: nn.Module) -> list[Part]:
        blocks = {"spatial": "spatial_blocks", "temporal": "temporal_blocks"}
        return alternating_parts(model, self.config(model).depth, blocks, "attn", "mlp", "cross_attn")

    def _grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, int]:
        """Frames, and patches of one: the model pads to whole patches."""
        frames, rows, columns = (
            -(-extent // patch)
            for extent, patch in zip(arguments["x"].shape[2:], self.config(model).patch_size, strict=True)
        )
        return frames, rows * columns

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        batch, channels = len(arguments["x"]), self.config(model).hidden_size
        frames, tokens = self._grid(model, arguments)
        if site.kind not in ("spatial", "temporal"):
            return (torch.Size((batch, frames * tokens, channels)),)
        if site.kind == "temporal":
            return (torch.Size((batch * tokens, frames, channels)),)
        return (torch.Size((batch * frames, tokens, channels)),)

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, channels, *rest = arguments["x"].shape
        return torch.Size((batch, channels * (2 if self.config(model).pred_sigma else 1), *rest))

    def latents(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        return arguments["x"]

    def dtype(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.dtype:
        return child(model, "x_embedder.proj").get_parameter("weight").dtype

    def countable(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """All text tokens count, and the size in pixels, which only scales the positions, is any."""
        return {**arguments, "mask": None, "height": np.ones(1), "width": np.ones(1)}
