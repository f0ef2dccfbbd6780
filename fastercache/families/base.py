"""What the engine has to know about a model family, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastercache.errors import RunError, UnsupportedModelError

BranchOrder = Literal["uncond-first", "cond-first", "none"]
"""How a call's batch is made of branches: two halves in that order, or a single branch (no guidance)."""


@dataclass(frozen=True)
class Site:
    """A module whose output can be cached: `path` from the model, `kind` and `layer` as schedules name it."""

    path: str
    kind: str
    layer: int
    module: nn.Module


class Family(ABC):
    """One model family. A new one is one file in this folder and one line in its registry.

    name: for people. model_classes: names of the upstream classes (found without importing them). batched: arguments of `forward` that hold
    one row for each element of the batch. order: how the family's own pipelines lay out guidance.
    """

    name: str
    model_classes: tuple[str, ...]
    batched: tuple[str, ...]
    order: BranchOrder = "uncond-first"

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """All sites, in the order they run. `UnsupportedModelError` if the model is not built as its class usually is."""

    @abstractmethod
    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        """Shapes of the tensors a site gives for these arguments of `forward`; dimension 0 is a multiple of the batch."""

    @abstractmethod
    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        """Shape of the prediction for these arguments; dimension 0 is the batch, the last two are a latent plane."""

    def block_of(self, site: Site) -> str:
        """Path of the repeated block that a site lies in: "blocks.3" of "blocks.3.attn.proj"."""
        return ".".join(site.path.split(".")[:2])

    def config(self, model: nn.Module) -> Any:
        """The model's configuration, as its class keeps it."""
        return model.config

    def latents(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """The denoiser's input, whose dimension 0 is the batch and whose last two are a latent plane."""
        return arguments["hidden_states"]

    def prediction(self, output: Any) -> torch.Tensor:
        """The predicted noise or velocity in what `forward` returned; last two dimensions a latent plane."""
        return output[0] if isinstance(output, tuple) else output.sample

    def with_prediction(self, output: Any, prediction: torch.Tensor) -> Any:
        """`output` with another prediction in it."""
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        return type(output)(sample=prediction)

    def narrow(self, arguments: Mapping[str, Any], batch: int, rows: slice) -> dict[str, Any]:
        """The arguments of a call that runs only those rows of the batch."""
        narrowed = dict(arguments)
        for name in self.batched:
            value = arguments.get(name)
            if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] == 1 != batch:
                continue
            if value.shape[0] != batch:
                raise RunError(f"argument {name!r} has {value.shape[0]} rows, but the batch has {batch}; they cannot be split in branches")
            narrowed[name] = value[rows]
        return narrowed


def child(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, or an `UnsupportedModelError` that says where the model differs from its class."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module {path!r}, which its family expects ({error}); "
            "the model was changed after it was built, or its library version is not supported"
        ) from error
