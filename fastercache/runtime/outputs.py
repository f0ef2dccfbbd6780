"""What a run keeps of the denoiser's outputs, and the outputs it makes from that: a rebuilt branch, a prediction that
no call computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastercache import ops
from fastercache.cache.cache import Cache
from fastercache.cache.ring import half
from fastercache.errors import RunError
from fastercache.models.family import Family
from fastercache.schedule.branches import BranchLayout
from fastercache.schedule.plan import Plan, PlannedStep


class Outputs:
    """Of one run. `rows` below: the half of the whole batch that a call is about, `None` for all of it."""

    def __init__(self, family: Family, plan: Plan, layout: BranchLayout, cache: Cache):
        self.family, self.plan, self.cache = family, plan, cache
        self._cond_half = layout.order.index("cond")
        self._coefficients = cache.vectors[-1]
        self._form: Any = None
        self._both: torch.Tensor | None = None

    # ---- CFG-Cache ---------------------------------------------------------------------------------------------------

    def split(self, uncond: torch.Tensor, cond: torch.Tensor) -> None:
        """Keep the difference of the two branches' planes in its two bands (Eq. 6, 7), and the difference before it
        where a step reads it."""
        cache = self.cache
        if cache.previous is not None:
            torch.add(cache.low, cache.high, out=cache.previous)
        ops.cfg_split(cache.low, cache.high, uncond, cond, min(cond.shape[-2:]) // self.plan.schedule.radius_divisor)

    def rebuilt(self, cond: torch.Tensor) -> torch.Tensor:
        """The planes of both branches, in the order of the batch, from the conditional ones and the kept differences
        (Eq. 11)."""
        cache, both = self.cache, self._both
        if both is None or both.dtype is not cond.dtype:
            both = self._both = cond.new_empty(()).expand(2 * len(cond), *cond.shape[1:])
        both = torch.empty_like(both, memory_format=torch.contiguous_format)  # the quickest way to make one
        ops.cfg_reconstruct(both, cond, cache.low, cache.high, self._coefficients, self._cond_half, cache.previous)
        return both

    # ---- predictions -------------------------------------------------------------------------------------------------

    def finished(self, output: Any, arguments: Mapping[str, Any], step: PlannedStep, rows: int | None = None) -> Any:
        """What a step that ran gives, corrected where the schedule says so; its own prediction is kept."""
        if not self.plan.predictions:
            return output
        cache, own = self.cache, self.family.prediction(output)
        if self._form is None:
            self._form = self.family.without_prediction(output)
        fresh = own.to(cache.plan.dtype)
        latents = self._latents(arguments, own.shape)
        result = output
        if step.sum_prediction:
            result = self.family.with_prediction(output, self._sum(latents, rows, fresh).to(own.dtype))
        if step.push_prediction:
            assert cache.predictions is not None
            ops.ring_push(half(cache.predictions, rows, 1), fresh, self._coefficients)
            if cache.latents is not None and latents is not None:
                half(cache.latents, rows).copy_(latents)
        return result

    def stand_in(self, arguments: Mapping[str, Any], rows: int | None = None) -> Any:
        """What a step that runs nothing gives."""
        assert self.cache.predictions is not None
        shape = half(self.cache.predictions, rows, 1).shape[1:]
        total = self._sum(self._latents(arguments, shape), rows, None)
        return self.family.with_prediction(self._form, total.to(self.family.latents(arguments).dtype))

    def _sum(self, latents: torch.Tensor | None, rows: int | None, fresh: torch.Tensor | None) -> torch.Tensor:
        cache = self.cache
        assert cache.predictions is not None
        ring = half(cache.predictions, rows, 1)
        out = torch.empty(ring.shape[1:], dtype=ring.dtype, device=ring.device)
        now = latents if latents is not None else ring[0]  # a term whose coefficient is 0 is not read
        newest = half(cache.latents, rows) if cache.latents is not None else now
        ops.prediction_blend(out, ring, newest, now, self._coefficients, fresh)
        return out

    def _latents(self, arguments: Mapping[str, Any], shape: torch.Size) -> torch.Tensor | None:
        """The latents of a call, in the shape of its prediction; `None` where no step reads any."""
        if not self.plan.reads_latents:
            return None
        latents = self.family.latents_like(self.family.latents(arguments), shape)
        if latents is None:
            raise RunError(
                f"a prediction of shape {list(shape)} and latents of {list(self.family.latents(arguments).shape)} do "
                f"not add up, so the schedule {self.plan.schedule.name!r} cannot use latents here; leave `now` and "
                "`newest` of its predictions at 0"
            )
        return latents.to(self.cache.plan.dtype)
