"""What the library has to know about a model family, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastercache.errors import RunError, UnsupportedModelError
from fastercache.models.patching import Route
from fastercache.models.site import Part, Site
from fastercache.models.streams import Block, block_of
from fastercache.schedule.branches import LAYOUTS, BranchLayout, LayoutName
from fastercache.schedule.sites import SiteNode

if TYPE_CHECKING:
    from fastercache.models.observe import ObservedShapes


def guided(pipeline: Any, call: Mapping[str, Any], label: str | None) -> bool:
    """Whether a pipeline's run has two branches, once it has set its state; see `Family.layout_in`."""
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
    """One model family. A new one is one file in this folder and one line in its registry, or a class of a user's own
    that is registered with `fastercache.register_family`.

    name: for people. model_classes: names of the upstream classes (found without importing them). batched: arguments of
    `forward` that hold one row for each element of the batch; empty for every tensor that has as many rows as the
    latents. repeated: arguments that hold a row for each prompt alone, which the model itself repeats for the branches.
    time: the argument that is the timestep. layout: how the family's own pipelines lay out guidance. streams: the
    arguments of a block that are its residual streams, or how many of the first ones are; those that the model reads
    after the last block come first, and `live_streams` is their number. idle_with: by a part's name in
    its block, the names of the modules there whose tokens that part alone reads, as its norm: while the part is
    blended, eager steps call them with one token, from which they give what others read, such as gates, as they would
    from all. Their arguments of three dimensions and more have tokens in dimension 1, or one that stands for all.
    """

    name: str
    model_classes: tuple[str, ...]
    batched: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    time: str = "timestep"
    layout: LayoutName = "uncond-first"
    streams: tuple[str, ...] | int = 1
    live_streams: int = 1
    idle_with: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    # ---- sites -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self, model: nn.Module) -> list[Part]:
        """The modules inside blocks that are sites, in the order they run. `UnsupportedModelError` if the model is not
        built as its class usually is."""

    def block_of(self, part: Part) -> str:
        """Path of the repeated block that a part lies in: "blocks.3" of "blocks.3.attn.proj"."""
        return ".".join(part.path.split(".")[:2])

    def idling(self, model: nn.Module, site: Site) -> list[nn.Module]:
        """The modules that `idle_with` names for a site, where the model has them."""
        block, _, name = site.path.rpartition(".")
        holder = model.get_submodule(block)
        found = (getattr(holder, feeding, None) for feeding in self.idle_with.get(name, ()))
        return [module for module in found if isinstance(module, nn.Module)]

    def block_paths(self, model: nn.Module) -> list[str]:
        """Paths of the repeated blocks, in the order they run."""
        return list(dict.fromkeys(map(self.block_of, self.parts(model))))

    def blocks(self, model: nn.Module, paths: Sequence[str]) -> list[Block]:
        """The blocks at `paths`, in the order they run; none where the family's blocks cannot be reused."""
        return [block_of(path, model.get_submodule(path), self.streams, self.live_streams) for path in paths]

    def route(self, model: nn.Module) -> Route | None:
        """Leads the calls of a model through its blocks until removed, where it calls a function of its own in their
        place; `None` for a model that calls its blocks."""
        return None

    def sites(self, model: nn.Module) -> list[Site]:
        """All sites as a tree, every one after the one that holds it: the stack, then each block with its parts."""
        parts = self.parts(model)
        paths = self.block_paths(model)
        blocks = self.blocks(model, paths)
        sites = [Site(SiteNode("", "stack", 0), block=blocks[-1])] if blocks else []
        for number, path in enumerate(paths):
            parent = len(sites) if blocks else None
            if blocks:
                sites.append(Site(SiteNode(path, "block", number, 0), blocks[number].module, blocks[number]))
            sites += [
                Site(SiteNode(part.path, part.kind, part.layer, parent), part.module)
                for part in parts
                if self.block_of(part) == path
            ]
        return sites

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        """Shapes of the tensors that are kept of a site for these arguments of `forward`; dimension 0 is a multiple of
        the batch.

        Observed on a call on shapes alone, unless a family knows better.
        """
        return self._observed(model, arguments).of_site(site)

    def _observed(self, model: nn.Module, arguments: Mapping[str, Any]) -> ObservedShapes:
        from fastercache.models.observe import observed_shapes  # it needs private names of torch's

        batch, countable = len(self.latents(arguments)), self.countable(arguments)
        return observed_shapes(model, countable, batch, partial(self.sites, model), self.prediction, self.route)

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        """Shape of the prediction, as `forward` gives it, for these arguments; dimension 0 is a multiple of the
        batch."""
        return self._observed(model, arguments).prediction

    def planes_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        """Shape of the prediction's planes: as `planes` gives them."""
        shape = self.prediction_shape(model, arguments)
        if len(shape) < 4:
            raise UnsupportedModelError(
                f"{type(model).__name__} predicts packed tokens {list(shape)}, and CFG-Cache needs latent planes; use "
                "'dynamic-only'"
            )
        return shape

    def at_exit(self, entry: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A residual stream at the entry of a block or the stack, laid out as at the exit, where it has `shape` (but
        for the rows)."""
        if entry.shape[1:] != shape[1:]:
            raise RunError(
                f"a residual stream of {self.name} is {list(entry.shape)} at its entry and {list(shape)} at its exit, "
                "and their difference cannot be kept; leave 'block' and 'stack' out of the schedule"
            )
        return entry

    # ---- arguments ---------------------------------------------------------------------------------------------------

    def latents(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        """The denoiser's input, whose dimension 0 is the batch."""
        return arguments["hidden_states"]

    def latents_like(self, latents: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        """The latents in the shape of a prediction, `None` where the two do not match.

        A prediction with fewer channels is of the first ones (the others are conditions); one with more has a learned
        variance behind.
        """
        if latents.shape == shape:
            return latents
        different = [dim for dim, sizes in enumerate(zip(latents.shape, shape, strict=False)) if sizes[0] != sizes[1]]
        if latents.dim() != len(shape) or len(different) != 1:
            return None
        (dim,) = different
        if latents.shape[dim] > shape[dim]:
            return latents.narrow(dim, 0, shape[dim])
        padding = latents.new_zeros((*latents.shape[:dim], shape[dim] - latents.shape[dim], *latents.shape[dim + 1 :]))
        return torch.cat([latents, padding], dim)

    def layout_in(self, pipeline: Any, call: Mapping[str, Any], label: str | None) -> BranchLayout:
        """How a pipeline lays out guidance in a run, once it has set its state.

        call: the arguments of the pipeline's own call. label: what it calls the run's first call of the denoiser
            (`host.labels`).
        """
        return LAYOUTS[self.layout if guided(pipeline, call, label) else "none"]

    def config(self, model: nn.Module) -> Any:
        """The model's configuration, as its class keeps it."""
        return model.config

    def dtype(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.dtype:
        """Of the sites' outputs, where autocast does not say."""
        return self.latents(arguments).dtype

    def batched_in(self, arguments: Mapping[str, Any]) -> Sequence[str]:
        """Names of the batched arguments."""
        if self.batched:
            return self.batched
        batch = len(self.latents(arguments))
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.dim()}
        return [name for name, value in tensors.items() if len(value) == batch]

    def narrow(self, arguments: Mapping[str, Any], batch: int, rows: slice) -> dict[str, Any]:
        """The arguments of a call that runs only those rows of the batch."""
        narrowed = dict(arguments)
        for name in self.batched_in(arguments):
            value = arguments.get(name)
            if not isinstance(value, torch.Tensor) or not (shape := value.shape):
                continue
            if shape[0] == batch:
                narrowed[name] = value[rows]
            elif shape[0] != 1 and not (name in self.repeated and shape[0] == batch // 2):
                raise RunError(
                    f"argument {name!r} has {shape[0]} rows, but the batch has {batch}; they cannot be split in "
                    "branches"
                )
        return narrowed

    def refuse_nested(self, arguments: Mapping[str, Any], batch: int) -> None:
        """`RunError` if an argument that is no tensor holds tensors of as many rows as the batch, which `narrow` would
        not reach."""
        from torch.utils._pytree import tree_leaves

        for name, value in arguments.items():
            parts = [] if isinstance(value, torch.Tensor) else tree_leaves(value)
            if any(isinstance(part, torch.Tensor) and part.dim() and len(part) == batch for part in parts):
                raise RunError(
                    f"argument {name!r} holds tensors of {batch} rows, as many as the batch has, inside a "
                    f"{type(value).__name__}, and they cannot be split in branches; use the policy 'dynamic-only', "
                    "whose calls run both"
                )

    def countable(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments for a call that runs on shapes alone, without those whose values `forward` reads."""
        return dict(arguments)

    # ---- outputs -----------------------------------------------------------------------------------------------------

    def prediction(self, output: Any) -> torch.Tensor:
        """The predicted noise or velocity in what `forward` returned; dimension 0 is the batch."""
        if isinstance(output, torch.Tensor):
            return output
        return output[0] if isinstance(output, tuple) else output.sample

    def with_prediction(self, output: Any, prediction: torch.Tensor) -> Any:
        """`output` with another prediction in it."""
        if isinstance(output, torch.Tensor):
            return prediction
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        return type(output)(sample=prediction)

    def without_prediction(self, output: Any) -> Any:
        """`output` with an empty prediction, into which another can be put. `RunError` where it holds more, which would
        be out of date."""
        if isinstance(output, tuple) and len(output) > 1:
            raise RunError(
                f"this model of family {self.name} gives {len(output)} values, and a step that runs nothing can stand "
                "in for the first alone; leave such steps out of the schedule"
            )
        return self.with_prediction(output, self.prediction(output).new_empty(0))

    def planes(self, prediction: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        """The prediction with a latent plane as its last two dimensions; `unplaned` is the way back."""
        return prediction

    def unplaned(self, planes: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        return planes


def block_parts(model: nn.Module, blocks: str, indices: range, kinds: Mapping[str, str], first: int = 0) -> list[Part]:
    """Parts of the blocks of a list: `kinds` maps the name of a block's submodule to its kind of site; layer = `first`
    + index."""
    return [
        Part(f"{blocks}.{index}.{name}", kind, first + index, child(model, f"{blocks}.{index}.{name}"))
        for index in indices
        for name, kind in kinds.items()
    ]


def alternating_parts(
    model: nn.Module, count: int, blocks: Mapping[str, str], attention: str, mlp: str, cross: str
) -> list[Part]:
    """Parts of lists of `count` blocks that run in turn: `blocks` maps the kind of a list's attention to its name.

    MLPs and cross-attentions are counted through all lists; a list whose blocks have no cross-attention is left out
    there.
    """
    parts = []
    for layer in range(count):
        for turn, (kind, name) in enumerate(blocks.items()):
            number = len(blocks) * layer + turn
            for part, of, own in ((attention, kind, layer), (cross, "cross", number), (mlp, "mlp", number)):
                path = f"{name}.{layer}.{part}"
                if of == "cross" and getattr(child(model, f"{name}.{layer}"), part, None) is None:
                    continue
                parts.append(Part(path, of, own, child(model, path)))
    return parts


def child(model: nn.Module, path: str) -> nn.Module:
    """The submodule at `path`, or an `UnsupportedModelError` that says where the model differs from its class."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no module {path!r}, which its family expects ({error}); "
            "the model was changed after it was built, or its library version is not supported"
        ) from error
