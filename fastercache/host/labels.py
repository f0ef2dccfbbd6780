"""What diffusers' pipelines say about each call of a denoiser: `with model.cache_context("cond"): model(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from fastercache.errors import RunError
from fastercache.schedule.branches import Branch, BranchLayout

BATCH = "cond_uncond"
GUIDERS = {"pred_cond": "cond", "pred_uncond": "uncond"}
"""What diffusers' guiders call the branches."""


_ENTERED: ContextVar[tuple[tuple[CallLabels, str], ...]] = ContextVar("fastercache_labels", default=())
"""The contexts that this thread is in."""


class CallLabels:
    """Keeps the name of the context that a model is called in."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._own = model.__dict__.get("cache_context")
        self._original = getattr(model, "cache_context", None)
        if self._original is not None:
            model.__dict__["cache_context"] = self._context

    @property
    def current(self) -> str | None:
        """The innermost context of the model that this thread is in, `None` outside any."""
        entered = _ENTERED.get()
        return next((name for labels, name in reversed(entered) if labels is self), None) if entered else None

    @contextmanager
    def _context(self, name: str, **where: Any) -> Iterator[None]:
        assert self._original is not None
        before = _ENTERED.get()
        _ENTERED.set((*before, (self, GUIDERS.get(name, name))))
        try:
            with self._original(name, **where):
                yield
        finally:
            _ENTERED.set(before)

    def detach(self) -> None:
        """Give the model its own `cache_context` back."""
        self._model.__dict__.pop("cache_context", None)
        if self._own is not None:
            self._model.__dict__["cache_context"] = self._own

    def check(self, layout: BranchLayout, branch: Branch | None, remedy: str | None = None) -> None:
        """`RunError` if the label is not what a run of that layout would have.

        branch: the one that this call is to be, of two calls. remedy: what a pipeline's user can do, who cannot declare
            the layout.
        """
        label = self.current
        if label not in ("cond", "uncond", BATCH, None):
            raise RunError(
                f"the pipeline labels this call {label!r}, which is neither the conditional nor the unconditional "
                "branch: guidance by a third one is not supported; switch that kind of guidance off, or run inside "
                "fastercache.disabled"
            )
        remedy = remedy or "Declare the order that it has (cfg=...), and begin a new run"
        if branch is not None:
            wrong, expected = label in ("cond", "uncond", BATCH) and label != branch, repr(branch)
        elif not layout.guided:
            wrong, expected = label == "uncond", "no unconditional call"
        else:
            wrong, expected = label in ("cond", "uncond"), repr(BATCH)
        if wrong:
            raise RunError(
                f"the pipeline labels this call {label!r}, but with guidance laid out as {layout.name!r} it would be "
                f"{expected}; the rows of a call of one branch are prompts, never branches. {remedy}"
            )
