"""What diffusers' pipelines say about each call of a denoiser: `with model.cache_context("cond"): model(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastercache.errors import RunError
from fastercache.families import BranchOrder
from fastercache.plan import Branch

BATCH = "cond_uncond"
GUIDERS = {"pred_cond": "cond", "pred_uncond": "uncond"}
"""What diffusers' guiders call the branches."""


class CallLabels:
    """Keeps the name of the context that a model is called in, `None` outside any."""

    def __init__(self, model: nn.Module):
        self.current: str | None = None
        self._model = model
        self._original = getattr(model, "cache_context", None)
        if self._original is not None:
            model.__dict__["cache_context"] = self._context

    @contextmanager
    def _context(self, name: str, **where: Any) -> Iterator[None]:
        assert self._original is not None
        self.current, before = GUIDERS.get(name, name), self.current
        try:
            with self._original(name, **where):
                yield
        finally:
            self.current = before

    def detach(self) -> None:
        """Give the model its own `cache_context` back."""
        self._model.__dict__.pop("cache_context", None)

    def check(self, order: BranchOrder, branch: Branch | None) -> None:
        """`RunError` if the label is not what a run of that order would have; `branch`: the one that this call is to be, of two calls."""
        label = self.current
        if label not in ("cond", "uncond", BATCH, None):
            raise RunError(
                f"the pipeline labels this call {label!r}, which is neither the conditional nor the unconditional branch: guidance by a "
                "third one is not supported; switch that kind of guidance off, or run inside fastercache.disabled"
            )
        if branch is not None:
            wrong, expected = label in ("cond", "uncond", BATCH) and label != branch, repr(branch)
        elif order == "none":
            wrong, expected = label == "uncond", "no unconditional call"
        else:
            wrong, expected = label in ("cond", "uncond"), repr(BATCH)
        if wrong:
            raise RunError(
                f"the pipeline labels this call {label!r}, but with guidance laid out as {order!r} it would be {expected}; the rows of a "
                "call of one branch are prompts, never branches. Declare the pipeline's own order (cfg=...), and begin a new run"
            )
