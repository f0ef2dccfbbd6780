"""The shapes of what a model's sites give, observed on one call on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastercache.errors import UnsupportedModelError
from fastercache.models.site import Site
from fastercache.models.skeleton import on_shapes

Shapes = tuple[torch.Size, ...]
Runs = dict[str, list[Shapes]]
"""By a module's path, what each of its runs took or gave."""


@dataclass
class ObservedShapes:
    """Of one call of a model. outputs: of the sites' modules; of a block, its residual streams. entries: of the blocks'
    residual streams."""

    model: str
    batch: int
    first_block: str
    prediction: torch.Size = field(default_factory=torch.Size)
    entries: Runs = field(default_factory=dict)
    outputs: Runs = field(default_factory=dict)

    def of_site(self, site: Site) -> Shapes:
        """Shapes of the tensors that are kept of a site; `UnsupportedModelError` where they cannot be."""
        if site.block is None:
            shapes = self._once(self.outputs, site.path, site)
        else:
            path = site.block.path
            start, kept = (self.first_block, site.block.live) if site.kind == "stack" else (path, None)
            entry = self._once(self.entries, start, site)[:kept]
            shapes = self._once(self.outputs, path, site)[:kept]
            if [shape[1:] for shape in entry] != [shape[1:] for shape in shapes]:
                raise UnsupportedModelError(
                    f"the {site.node} of {self.model} takes residual streams of {_listed(entry)} and gives "
                    f"{_listed(shapes)}, and their difference cannot be kept; leave {site.kind!r} out of the "
                    "schedule's sites"
                )
        if any(shape[0] % self.batch for shape in shapes):
            raise UnsupportedModelError(
                f"{site.path or 'the stack'} of {self.model} gives {_listed(shapes)} for a batch of {self.batch}; a "
                f"site must give as many rows for each element of the batch; leave {site.kind!r} out of the "
                "schedule's sites"
            )
        return shapes

    def _once(self, runs: Runs, path: str, site: Site) -> Shapes:
        found = runs.get(path, [])
        if not found:
            raise UnsupportedModelError(f"{self.model} did not run {path} in this call; a site must run in every one")
        if len(found) > 1:
            raise UnsupportedModelError(
                f"{path} of {self.model} runs {len(found)} times in a call, and only one output of a site can be "
                f"kept; leave {site.kind!r} out of the schedule's sites"
            )
        return found[0]


def _listed(shapes: Shapes) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple, ObservedShapes]] = WeakKeyDictionary()
"""The newest observation of each model."""


def observed_shapes(
    model: nn.Module,
    arguments: Mapping[str, Any],
    batch: int,
    sites: Callable[[], Sequence[Site]],
    prediction: Callable[[Any], torch.Tensor],
    route: Callable[[nn.Module], Any],
) -> ObservedShapes:
    """What a call with such arguments takes and gives at each site; nothing is computed, and nothing of it stays in the
    model.

    batch: rows of the call. sites: gives the model's sites. prediction: finds the prediction in the model's output.
    route: leads the calls of a model through its blocks, where it passes them by.

    Raises:
        UnsupportedModelError: the model cannot be called on shapes alone.
    """
    signature = tuple((name, value.shape) for name, value in arguments.items() if isinstance(value, torch.Tensor))
    known = _KNOWN.setdefault(model, {})
    if signature not in known:
        known.clear()
        known[signature] = _observe(model, arguments, batch, sites(), prediction, route)
    return known[signature]


def _observe(
    model: nn.Module,
    arguments: Mapping[str, Any],
    batch: int,
    sites: Sequence[Site],
    prediction: Callable[[Any], torch.Tensor],
    route: Callable[[nn.Module], Any],
) -> ObservedShapes:
    blocks = [site.path for site in sites if site.kind == "block"]
    shapes = ObservedShapes(type(model).__name__, batch, blocks[0] if blocks else "")

    def keep(runs: Runs, path: str, tensors: Any) -> None:
        runs.setdefault(path, []).append(tuple(tensor.shape for tensor in tensors if tensor is not None))

    def watch(site: Site, module: nn.Module) -> None:
        if (block := site.block) is None:
            module.register_forward_hook(
                lambda _, __, output: keep(
                    shapes.outputs, site.path, output if isinstance(output, tuple) else (output,)
                )
            )
            return
        module.register_forward_pre_hook(
            lambda _, args, kwargs: keep(shapes.entries, site.path, block.streams_in(args, kwargs)), with_kwargs=True
        )
        module.register_forward_hook(lambda _, __, output: keep(shapes.outputs, site.path, block.streams_out(output)))

    try:
        with on_shapes(model) as (hollow, shapes_of), torch.no_grad():
            route(hollow)
            for site in sites:
                if site.kind != "stack":
                    watch(site, hollow.get_submodule(site.path))
            shapes.prediction = prediction(hollow(**shapes_of(arguments))).shape
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be called on shapes alone, from which its sites would be known "
            f"({reason[0]})"
        ) from error
    return shapes
