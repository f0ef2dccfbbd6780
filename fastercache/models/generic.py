"""Any other transformer of diffusers: sites by the classes of its blocks' parts, shapes from a run on shapes alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastercache.errors import UnsupportedModelError
from fastercache.models.family import Family
from fastercache.models.site import Part, Site
from fastercache.models.streams import Block, block_of, returned_names
from fastercache.schedule.branches import LAYOUTS, BranchLayout, LayoutName

CROSS_ATTENTION = re.compile(r"(.*_)?(attn2|cross_attn|cross_attention)|.*_to_.*")
"""Names under which diffusers' blocks keep the attention to the text or, as `audio_to_video_attn`, to another
stream."""
LABELLED: dict[str | None, LayoutName] = {
    "cond_uncond": "uncond-first",
    "cond": "cond-then-uncond",
    "uncond": "uncond-then-cond",
}
"""The label that a pipeline of diffusers gives the first call of a run with guidance -> how it lays out guidance."""


class Generic(Family):
    """Self- and joint attention and MLPs of lists of blocks. Every tensor with a row for each element of the batch
    counts as batched."""

    name = "generic"
    model_classes = ()
    batched = ()

    def layout_in(self, pipeline: Any, call: Mapping[str, Any], label: str | None) -> BranchLayout:
        if not super().layout_in(pipeline, call, label).guided:
            return LAYOUTS["none"]
        if label not in LABELLED:
            raise UnsupportedModelError(
                f"{type(pipeline).__name__} does not say how it lays out guidance: its call is labelled {label!r}, "
                f"and known labels are {', '.join(map(repr, LABELLED))}; compile its denoiser with steps= and cfg= "
                "instead"
            )
        return LAYOUTS[LABELLED[label]]

    def parts(self, model: nn.Module) -> list[Part]:
        if "hidden_states" not in inspect.signature(type(model).forward).parameters:
            raise UnsupportedModelError(
                f"{type(model).__name__}: forward has no argument 'hidden_states', so its latents were not found"
            )
        lists = {
            name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList) and len(child)
        }
        parts = [
            Part(f"{name}.{index}.{child}", kind, index, module)
            for name, blocks in lists.items()
            for index, block in enumerate(blocks)
            for child, module in block.named_children()
            if (kind := _kind(child, module)) is not None
        ]
        if not any(part.kind == "joint" for part in parts):
            found = ", ".join(f"{name} of {type(blocks[0]).__name__}" for name, blocks in lists.items())
            raise UnsupportedModelError(
                f"{type(model).__name__} is of no known family, and no self-attention was found in its lists of blocks "
                f"({found or 'none'}): a part of a block whose class is named ...Attention and that is no "
                "cross-attention"
            )
        return parts

    def blocks(self, model: nn.Module, paths: Sequence[str]) -> list[Block]:
        """Blocks whose `forward` returns its streams by name, the video's first; none if it is not so for all of
        them."""
        found = []
        for path in paths:
            module = model.get_submodule(path)
            forward = inspect.unwrap(type(module).forward)
            names = returned_names(forward) or ()
            if "hidden_states" not in names or not set(names) <= set(inspect.signature(forward).parameters):
                return []
            found.append(block_of(path, module, sorted(names, key=lambda name: name != "hidden_states")))
        return found

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        shapes, batch = super().site_shapes(model, site, arguments), len(self.latents(arguments))
        if any(shape[0] != batch for shape in shapes):
            found = ", ".join(str(list(shape)) for shape in shapes)
            raise UnsupportedModelError(
                f"{site.exit_path} of {type(model).__name__} gives {found} for a batch of {batch}; a model of no "
                "known family must give a row for each element of the batch"
            )
        return shapes


def _kind(name: str, module: nn.Module) -> str | None:
    """What a part of a block is, by its class: attention over the video or to something else, an MLP, or neither."""
    cls = type(module).__name__
    if "Attention" in cls:
        return "cross" if getattr(module, "is_cross_attention", False) or CROSS_ATTENTION.fullmatch(name) else "joint"
    return "mlp" if "FeedForward" in cls or cls.lower().endswith("mlp") else None
