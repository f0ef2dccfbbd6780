"""What the engine has to know about a model family, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fastercache.errors import RunError, UnsupportedModelError

BranchOrder = Literal["uncond-first", "cond-first", "uncond-then-cond", "cond-then-uncond", "none"]
"""How guidance is laid out: a call's batch is two halves in that order; or a step is two calls in that order; or there is one branch."""


@dataclass(frozen=True)
class Site:
    """A module whose output can be cached: `path` from the model, `kind` and `layer` as schedules name it."""

    path: str
    kind: str
    layer: int
    module: nn.Module


def guided(pipeline: Any, call: Mapping[str, Any], label: str | None) -> bool:
    """Whether a pipeline's run has two branches, once it has set its state; see `Family.order_in`."""
    if label == "uncond":  # "cond_uncond" is said without guidance, too
        return True
    guider = getattr(pipeline, "guider", None)
    if guider is not None:
        return guider.num_conditions > 1
    said = getattr(pipeline, "do_classifier_free_guidance", None)
    if said is not None:
        return bool(said)
    if "true_cfg_scale" in call:  # the other scale is an input of the model
        embeds = [value for name, value in call.items() if name.startswith("negative_") and name.endswith("_embeds")]
        negative = call.get("negative_prompt") is not None or (bool(embeds) and None not in embeds)
        return negative and call["true_cfg_scale"] is not None and call["true_cfg_scale"] > 1
    parts = getattr(pipeline, "components", {}).values()
    if any(getattr(getattr(part, "config", None), "guidance_embeds", False) for part in parts):
        return False
    # CogVideoX has the scale alone, Open-Sora-Plan only its argument.
    scale = getattr(pipeline, "guidance_scale", call.get("guidance_scale"))
    return scale is not None and scale > 1


class Family(ABC):
    """One model family. A new one is one file in this folder and one line in its registry.

    name: for people. model_classes: names of the upstream classes (found without importing them). batched: arguments of `forward` that hold
    one row for each element of the batch. repeated: arguments that hold a row for each prompt alone, which the model itself repeats for the
    branches. time: the argument that is the timestep. order: how the family's own pipelines lay out guidance.
    """

    name: str
    model_classes: tuple[str, ...]
    batched: tuple[str, ...]
    repeated: tuple[str, ...] = ()
    time: str = "timestep"
    order: BranchOrder = "uncond-first"

    def order_in(self, pipeline: Any, call: Mapping[str, Any], label: str | None) -> BranchOrder:
        """How a pipeline lays out guidance in a run, once it has set its state.

        call: the arguments of the pipeline's own call. label: what it calls the run's first call of the denoiser (`fastercache.labels`).
        """
        return self.order if guided(pipeline, call, label) else "none"

    @abstractmethod
    def sites(self, model: nn.Module) -> list[Site]:
        """All sites, in the order they run. `UnsupportedModelError` if the model is not built as its class usually is."""

    @abstractmethod
    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        """Shapes of the tensors a site gives for these arguments of `forward`; dimension 0 is a multiple of the batch."""

    @abstractmethod
    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        """Shape of the prediction's planes for these arguments; dimension 0 is the batch, the last two are a latent plane."""

    def block_of(self, site: Site) -> str:
        """Path of the repeated block that a site lies in: "blocks.3" of "blocks.3.attn.proj"."""
        return ".".join(site.path.split(".")[:2])

    def config(self, model: nn.Module) -> Any:
        """The model's configuration, as its class keeps it."""
        return model.config

    def latents(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """The denoiser's input, whose dimension 0 is the batch."""
        return arguments["hidden_states"]

    def dtype(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.dtype:
        """Of the sites' outputs, where autocast does not say."""
        return self.latents(arguments).dtype

    def prediction(self, output: Any) -> torch.Tensor:
        """The predicted noise or velocity in what `forward` returned; dimension 0 is the batch."""
        if isinstance(output, torch.Tensor):
            return output
        return output[0] if isinstance(output, tuple) else output.sample

    def planes(self, prediction: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        """The prediction with a latent plane as its last two dimensions; `unplaned` is the way back."""
        return prediction

    def unplaned(self, planes: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        return planes

    def with_prediction(self, output: Any, prediction: torch.Tensor) -> Any:
        """`output` with another prediction in it."""
        if isinstance(output, torch.Tensor):
            return prediction
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        return type(output)(sample=prediction)

    def batched_in(self, arguments: Mapping[str, Any]) -> Sequence[str]:
        """Names of the batched arguments."""
        return self.batched

    def narrow(self, arguments: Mapping[str, Any], batch: int, rows: slice) -> dict[str, Any]:
        """The arguments of a call that runs only those rows of the batch."""
        for name, value in arguments.items():
            parts = [] if isinstance(value, torch.Tensor) else tree_leaves(value)
            if any(isinstance(part, torch.Tensor) and part.dim() and len(part) == batch for part in parts):
                raise RunError(
                    f"argument {name!r} holds tensors of {batch} rows, as many as the batch has, inside a {type(value).__name__}, and they "
                    "cannot be split in branches; use the policy 'dynamic-only', whose calls run both"
                )
        narrowed = dict(arguments)
        for name in self.batched_in(arguments):
            value = arguments.get(name)
            if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] == 1 != batch:
                continue
            if name in self.repeated and value.shape[0] == batch // 2:
                continue
            if value.shape[0] != batch:
                raise RunError(f"argument {name!r} has {value.shape[0]} rows, but the batch has {batch}; they cannot be split in branches")
            narrowed[name] = value[rows]
        return narrowed

    def countable(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments for a call that runs on shapes alone (`fastercache.flops`), without those whose values `forward` reads."""
        return dict(arguments)


def block_sites(model: nn.Module, blocks: str, indices: range, parts: Mapping[str, str], first: int = 0) -> list[Site]:
    """Sites of the blocks of a list: `parts` maps the name of a block's submodule to the kind of its site; layer = `first` + index."""
    return [
        Site(f"{blocks}.{index}.{part}", kind, first + index, child(model, f"{blocks}.{index}.{part}"))
        for index in indices
        for part, kind in parts.items()
    ]


def alternating_sites(model: nn.Module, count: int, blocks: Mapping[str, str], attention: str, mlp: str) -> list[Site]:
    """Sites of lists of `count` blocks that run in turn: `blocks` maps the kind of a list's attention to its name. MLPs count through."""
    sites = []
    for layer in range(count):
        for turn, (kind, name) in enumerate(blocks.items()):
            for part, of, number in ((attention, kind, layer), (mlp, "mlp", len(blocks) * layer + turn)):
                path = f"{name}.{layer}.{part}"
                sites.append(Site(path, of, number, child(model, path)))
    return sites


def child(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, or an `UnsupportedModelError` that says where the model differs from its class."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module {path!r}, which its family expects ({error}); "
            "the model was changed after it was built, or its library version is not supported"
        ) from error
