"""Putting a function in place of a module's `forward`, under whatever offloading hooks are there, and taking it out
again; and leading calls through modules that a model leaves out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
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
        _put_back(self._module, self._installed, self._original)

    def __deepcopy__(self, memo: dict) -> Any:
        raise CompileError(
            "a compiled model cannot be copied: the copy would share its caches; call fastercache.restore first"
        )

    def __reduce__(self) -> Any:
        raise CompileError("a compiled model cannot be pickled; call fastercache.restore first, or use save_pretrained")


def _put_back(module: nn.Module, installed: Any, original: Any) -> None:
    """Undo `forward = installed`, wherever hooks have moved it."""
    own = module.__dict__
    for place, key in (forward_slot(module), (own, "forward")):
        if place.get(key) is not installed:
            continue
        if place is own and key == "forward" and getattr(original, "__func__", None) is type(module).forward:
            del place[key]
        else:
            place[key] = original


class Route:
    """Leads the calls that a model makes of one function in place of its blocks through the blocks, until removed: the
    function becomes each block's own forward, around which gates can stand.

    SwissArmyTransformer's models are made so: they look a function up by name in a dictionary, `hooks`, and call it
    with the number of a layer.

    owners: what has such a dictionary: the first one's is what counts, the others hold copies of it. name: of the
    function there. number: the argument that says which block it is called for.
    """

    def __init__(self, owners: Sequence[Any], name: str, number: str, blocks: nn.ModuleList):
        function = owners[0].hooks[name]
        if isinstance(known := getattr(function, "__self__", None), Route):  # in a copy of a model that has one
            function = known.function
        self.function: Callable[..., Any] = function
        self._owners, self._name, self._number = owners, name, number
        self._blocks: nn.ModuleList | None = blocks
        slots = [forward_slot(block) for block in blocks]
        self._originals = [place.get(key, block.forward) for (place, key), block in zip(slots, blocks, strict=True)]
        for place, key in slots:
            place[key] = function
        self._installed = self._call_block
        # A dictionary of its own: a copy of a model has the original's where that cannot be copied.
        owners[0].hooks = {**owners[0].hooks, name: self._installed}

    def _call_block(self, *args: Any, **kwargs: Any) -> Any:
        if self._blocks is None:
            return self.function(*args, **kwargs)
        return self._blocks[kwargs[self._number]](*args, **kwargs)

    def check(self) -> None:
        """`CompileError` if the model looks up another function by now, whose calls would pass the blocks by."""
        if self._owners[0].hooks.get(self._name) != self._installed:
            raise CompileError(
                f"the hook {self._name!r} of {type(self._owners[0]).__name__} was replaced after fastercache.compile, "
                "as by a mixin that was added or removed, and its calls would pass by the blocks that are cached; call "
                "fastercache.restore and compile again"
            )

    def remove(self) -> None:
        """Put everything back. Where somebody has wrapped the function since, its calls go straight to it."""
        assert self._blocks is not None
        blocks, self._blocks = self._blocks, None
        for owner in self._owners:
            if owner.hooks.get(self._name) == self._installed:
                owner.hooks[self._name] = self.function
        for block, original in zip(blocks, self._originals, strict=True):
            _put_back(block, self.function, original)
