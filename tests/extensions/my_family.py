"""A model family from outside the package: what the library has to know about `MyDenoiser`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import fastercache


class MyFamily(fastercache.Family):
    name = "my own"
    model_classes = ("MyDenoiser",)
    time = "time"

    def parts(self, model: nn.Module) -> list[fastercache.Part]:
        return [
            fastercache.Part(f"layers.{number}.{name}", kind, number, getattr(layer, name))
            for number, layer in enumerate(model.layers)
            for name, kind in (("mix", "joint"), ("feed", "mlp"))
        ]

    def latents(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        return arguments["video"]


fastercache.register_family(MyFamily())
