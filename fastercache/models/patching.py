"""Putting a function in place of a module's `forward`, under whatever offloading hooks are there, and taking it out
again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from fastercache.errors import CompileError
from fastercache.models.hooks import forward_slot

Around = Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]
"""`around(original, args, kwargs)` stands in for `original(*args, **kwargs)`."""


class ForwardPatch:
    """Calls `around` in place of a module's `forward` until removed.

    traced: the module is called inside compiled graphs. Dynamo guards an object in place of a forward by its identity,
    so that no two layers could share a graph, but looks into the object that a bound method belongs to. A bound method,
    though, hides the original's signature, which diffusers asks whole models for.

    accelerate and diffusers keep the forward they wrap and put that back whenever hooks are renewed, which model
    offloading does after every call of the pipeline and group offloading with every LoRA: a patch on top would be lost
    there, so it goes underneath.
    """

    def __init__(self, module: nn.Module, around: Around, *, traced: bool = False):
        self._module = module
        self._around: Around | None = around
        place, key = forward_slot(module)
        self._original = place.get(key, module.forward)
        # Not the original's attributes: they may be those of a removed patch, which a hook has copied.
        functools.update_wrapper(self, self._original, updated=())
        self._installed = self.__call__ if traced else self
        place[key] = self._installed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._around is None:
            return self._original(*args, **kwargs)
        return self._around(self._original, args, kwargs)

    @property
    def in_place(self) -> bool:
        """Whether the module's forward still leads here."""
        own = self._module.__dict__
        return any(place.get(key) is self._installed for place, key in (forward_slot(self._module), (own, "forward")))

    def remove(self) -> None:
        """Put the original back. Where a later hook holds the patch, it stays as a plain call of the original."""
        self._around = None
        own = self._module.__dict__
        for place, key in (forward_slot(self._module), (own, "forward")):
            if place.get(key) is not self._installed:
                continue
            if (
                place is own
                and key == "forward"
                and getattr(self._original, "__func__", None) is type(self._module).forward
            ):
                del place[key]
            else:
                place[key] = self._original

    def __deepcopy__(self, memo: dict) -> Any:
        raise CompileError(
            "a compiled model cannot be copied: the copy would share its caches; call fastercache.restore first"
        )

    def __reduce__(self) -> Any:
        raise CompileError("a compiled model cannot be pickled; call fastercache.restore first, or use save_pretrained")
