"""What diffusers' pipelines say about each call of a denoiser: `with model.cache_context("cond"): model(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from fastercache.errors import RunError
from fastercache.families import BranchOrder
from fastercache.plan import Branch

BATCH = "cond_uncond"


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
        return next((name for labels, name in reversed(_ENTERED.get()) if labels is self), None)

    @contextmanager
    def _context(self, name: str, **where: Any) -> Iterator[None]:
        assert self._original is not None
        before = _ENTERED.get()
        _ENTERED.set((*before, (self, name)))
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

    def check(self, order: BranchOrder, branch: Branch | None) -> None:
        """`RunError` if the label is not what a run of that order would have; `branch`: the one that this call is to be, of two calls."""
        label = self.current
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
