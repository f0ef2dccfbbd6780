"""Any other transformer of diffusers: sites by the classes of its blocks' parts, shapes from a run on shapes alone."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastercache.errors import UnsupportedModelError
from fastercache.families.base import BranchOrder, Family, Site
from fastercache.skeleton import on_shapes

CROSS_ATTENTION = re.compile(r"(.*_)?(attn2|cross_attn|cross_attention)|.*_to_.*")
"""Names under which diffusers' blocks keep the attention to the text or, as `audio_to_video_attn`, to another stream."""
ORDERS: dict[str | None, BranchOrder] = {"cond_uncond": "uncond-first", "cond": "cond-then-uncond", "uncond": "uncond-then-cond"}
"""The label that a pipeline of diffusers gives the first call of a run with guidance -> how it lays out guidance."""


class Generic(Family):
    """Self- and joint attention and MLPs of lists of blocks. Every tensor with a row for each element of the batch counts as batched."""

    name = "generic"
    model_classes = ()
    batched = ()

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, dict[tuple, dict[str, list[tuple[torch.Size, ...]]]]] = WeakKeyDictionary()

    def batched_in(self, arguments: Mapping[str, Any]) -> list[str]:
        batch = len(self.latents(arguments))
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.dim()}
        return [name for name, value in tensors.items() if len(value) == batch]

    def order_in(self, pipeline: Any, call: Mapping[str, Any], label: str | None) -> BranchOrder:
        if super().order_in(pipeline, call, label) == "none":
            return "none"
        if label not in ORDERS:
            raise UnsupportedModelError(
                f"{type(pipeline).__name__} does not say how it lays out guidance: its call is labelled {label!r}, and known labels are "
                f"{', '.join(map(repr, ORDERS))}; compile its denoiser with steps= and cfg= instead"
            )
        return ORDERS[label]

    def sites(self, model: nn.Module) -> list[Site]:
        if "hidden_states" not in inspect.signature(type(model).forward).parameters:
            raise UnsupportedModelError(f"{type(model).__name__}: forward has no argument 'hidden_states', so its latents were not found")
        lists = {name: child for name, child in model.named_children() if isinstance(child, nn.ModuleList) and len(child)}
        sites = [
            Site(f"{name}.{index}.{part}", kind, index, module)
            for name, blocks in lists.items()
            for index, block in enumerate(blocks)
            for part, module in block.named_children()
            if (kind := _kind(part, module)) is not None
        ]
        if not any(site.kind == "joint" for site in sites):
            found = ", ".join(f"{name} of {type(blocks[0]).__name__}" for name, blocks in lists.items())
            raise UnsupportedModelError(
                f"{type(model).__name__} is of no known family, and no self-attention was found in its lists of blocks "
                f"({found or 'none'}): a part of a block whose class is named ...Attention and that is no cross-attention"
            )
        return sites

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        first, *again = self._shapes(model, arguments)[site.path]
        if again:
            raise UnsupportedModelError(
                f"{site.path} of {type(model).__name__} runs {1 + len(again)} times in a call, and only one output of a site can be kept; "
                f"leave {site.kind!r} out of the schedule's sites"
            )
        batch = len(self.latents(arguments))
        if any(shape[0] != batch for shape in first):
            found = ", ".join(str(list(shape)) for shape in first)
            raise UnsupportedModelError(
                f"{site.path} of {type(model).__name__} gives {found} for a batch of {batch}; a model of no known family must give a "
                "row for each element of the batch"
            )
        return first

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        ((shape,),) = self._shapes(model, arguments)[""]
        if len(shape) < 4:
            raise UnsupportedModelError(
                f"{type(model).__name__} predicts packed tokens {list(shape)}, and CFG-Cache needs latent planes; use 'dynamic-only'"
            )
        return shape

    def _shapes(self, model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, list[tuple[torch.Size, ...]]]:
        """Shapes that each site gives, each time it runs in a call with such arguments, and the model (under ""); nothing is computed."""
        signature = tuple((name, value.shape) for name, value in arguments.items() if isinstance(value, torch.Tensor))
        known = self._known.setdefault(model, {})
        if signature not in known:
            known.clear()
            known[signature] = self._observe(model, arguments)
        return known[signature]

    def _observe(self, model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, list[tuple[torch.Size, ...]]]:
        shapes: dict[str, list[tuple[torch.Size, ...]]] = {}

        def keep(path: str, output: Any) -> None:
            shapes.setdefault(path, []).append(tuple(tensor.shape for tensor in (output if isinstance(output, tuple) else (output,))))

        sites = self.sites(model)
        try:
            with on_shapes(model) as (hollow, shapes_of), torch.no_grad():
                for site in sites:
                    module = hollow.get_submodule(site.path)
                    module.register_forward_hook(lambda _, __, output, path=site.path: keep(path, output))
                keep("", self.prediction(hollow(**shapes_of(arguments))))
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UnsupportedModelError(
                f"{type(model).__name__} is of no known family, and it cannot be called on shapes alone ({reason[0]})"
            ) from error
        idle = [site.path for site in sites if site.path not in shapes]
        if idle:
            raise UnsupportedModelError(f"{type(model).__name__} did not run {idle[0]} in this call; a site must run in every one")
        return shapes


def _kind(name: str, module: nn.Module) -> str | None:
    """What a part of a block is, by its class: attention over the video, an MLP, or neither."""
    cls = type(module).__name__
    if "Attention" in cls:
        return None if getattr(module, "is_cross_attention", False) or CROSS_ATTENTION.fullmatch(name) else "joint"
    return "mlp" if "FeedForward" in cls or cls.lower().endswith("mlp") else None
