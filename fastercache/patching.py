"""Putting a function in place of a module's `forward`, under whatever offloading hooks are there, and taking it out again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from fastercache.errors import CompileError

Around = Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]
"""`around(original, args, kwargs)` stands in for `original(*args, **kwargs)`."""


class ForwardPatch:
    """Calls `around` in place of a module's `forward` until removed.

    traced: the module is called inside compiled graphs. Dynamo guards an object in place of a forward by its identity, so that no two
    layers could share a graph, but looks into the object that a bound method belongs to. A bound method, though, hides the original's
    signature, which diffusers asks whole models for.

    accelerate keeps the forward it wraps as `module._old_forward` and puts that back whenever its hooks are renewed, which diffusers'
    model offloading does after every call of the pipeline: a patch on top would be lost there, so it goes underneath.
    """

    def __init__(self, module: nn.Module, around: Around, *, traced: bool = False):
        self._module = module
        self._around: Around | None = around
        self._slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        self._was_instance_attribute = self._slot in module.__dict__
        self._original = getattr(module, self._slot)
        functools.update_wrapper(self, self._original)
        self._installed = self.__call__ if traced else self
        module.__dict__[self._slot] = self._installed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._around is None:
            return self._original(*args, **kwargs)
        return self._around(self._original, args, kwargs)

    def remove(self) -> None:
        """Put the original back. Where a later hook holds the patch, it stays as a plain call of the original."""
        self._around = None
        attributes = self._module.__dict__
        if attributes.get("_old_forward") is self._installed:
            attributes["_old_forward"] = self._original
        elif attributes.get("forward") is self._installed:
            if self._was_instance_attribute and self._slot == "forward":
                attributes["forward"] = self._original
            else:
                del attributes["forward"]

    def __deepcopy__(self, memo: dict) -> Any:
        raise CompileError("a compiled model cannot be copied: the copy would share its caches; call fastercache.restore first")

    def __reduce__(self) -> Any:
        raise CompileError("a compiled model cannot be pickled; call fastercache.restore first, or use save_pretrained")
