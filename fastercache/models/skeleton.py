"""Calls of a model on shapes alone, made on a copy of its structure, so that nothing of them stays behind in the model.

Many models keep what a call computes: in attributes set in `forward`, in dictionaries, in `functools.lru_cache`. What a
call on shapes leaves there is a stand-in without values, which every later call would read.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastercache.models.hooks import compute_dtype, forward_slot, stores_of
from fastercache.models.patching import ForwardPatch

HOOKS = frozenset(
    name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
)
LEFT_OUT = frozenset(
    {
        "forward",
        "cache_context",
        "_hf_hook",
        "_old_forward",
        "_diffusers_hook",
        "_fastercache_engine",
        "_fastercache_division",
        "_parallel_config",
        "_compiled_call_impl",
    }
)
"""Of a module's attributes: what offloading, caching, compilation and a division between processes have put there."""
MOST_KNOWN = 2**23
"""Bytes up to which a tensor made inside a call on shapes has its values."""
_META = torch.device("meta")
MOST_KEPT = 64
"""Elements up to which an argument of one dimension, as a timestep is, keeps its values for a later count. So does one
number that is expanded to a shape: what `Family.countable` says of an argument that decides what a call does."""


def on_meta(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call without the memory of their tensors, from which it can be counted when those are gone.

    Timesteps and the like, which some models read as numbers, keep their values; copied without waiting for the device.
    """

    def kept(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim() <= 1 and value.numel() <= MOST_KEPT and not value.is_meta:
            return value.detach().clone()
        return torch.empty(value.shape, dtype=value.dtype, device=_META)

    # A tree is walked only where there is one.
    return {
        name: kept(value)
        if value is None or isinstance(value, (torch.Tensor, str, float, int))
        else tree_map(kept, value)
        for name, value in arguments.items()
    }


class AllTokensCount(TorchFunctionMode):
    """Masks have no values here: where a model picks the tokens of one with `nonzero`, as Mochi does, it gets them
    all."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nonzero and args[0].dim() == 1:
            return torch.arange(len(args[0]), device=args[0].device)[:, None]
        return function(*args, **(kwargs or {}))


@contextmanager
def on_shapes(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Mapping[str, Any]], dict[str, Any]]]]:
    """Gives a copy of the model, whose calls inside compute nothing, and what makes the arguments of such a call of any
    others.

    The copy has no hooks, as they would move weights, and are not part of the model. Weights that hooks bring here,
    from another device, from the disk or from another dtype, have stand-ins, and so have quantized ones (torchao),
    whose products no counter knows.
    """
    device = torch.device(getattr(model, "device", None) or next(model.parameters()).device)
    if (
        device.type == "meta"
    ):  # a model without weights, or one whose weights are offloaded: then its buffers are where it runs
        device = next(
            (tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device != device), device
        )
    with _Untouched(model), FakeTensorMode(allow_non_fake_inputs=True):
        hollow = _structure(model, device)

        def shapes(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            stand_in = torch.empty(value.shape, dtype=value.dtype, device=device)
            few = value.numel() <= MOST_KEPT if value.dim() <= 1 else not any(value.stride()) and _small(value)
            if few and not isinstance(value, FakeTensor) and value.device.type != "meta":
                with _disable_current_modes():
                    _know(stand_in, value.detach().to("cpu", copy=True))
            return stand_in

        with _Values():
            yield hollow, lambda arguments: tree_map(shapes, dict(arguments))


def _structure(model: nn.Module, device: torch.device) -> nn.Module:
    """The model's modules again, with copies of their attributes and the weights themselves, or stand-ins for those not
    on the device."""
    modules = list(model.modules())
    copies = {id(module): type(module).__new__(type(module)) for module in modules}
    memo: dict[int, Any] = dict(copies)
    for module in modules:
        hollow = copies[id(module)].__dict__
        for name, value in module.__dict__.items():
            if name in HOOKS:
                hollow[name] = type(value)()
            elif name == "_modules":
                hollow[name] = {path: None if part is None else copies[id(part)] for path, part in value.items()}
            elif name not in LEFT_OUT and name not in ("_parameters", "_buffers"):
                hollow[name] = _copied(value, memo)
        if (forward := _own_forward(module)) is not None:
            hollow["forward"] = _copied(forward, memo)
        dtype_of = compute_dtype(module)
        for store, name in zip(stores_of(module), ("_parameters", "_buffers"), strict=True):
            hollow[name] = {}
            for key, tensor in store.items():
                if tensor is not None and (
                    (tensor.device, tensor.dtype) != (device, dtype_of(tensor)) or is_traceable_wrapper_subclass(tensor)
                ):
                    tensor = torch.empty(tensor.shape, dtype=dtype_of(tensor), device=device)
                hollow[name][key] = tensor
    return copies[id(model)]


def _own_forward(module: nn.Module) -> Any:
    """What someone has put in place of a module's forward, under offloading's hooks and this package's patches."""
    place, key = forward_slot(module)
    forward = place.get(key)
    while isinstance(patch := getattr(forward, "__self__", forward), ForwardPatch):
        forward = patch.__wrapped__  # type: ignore[attr-defined]
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy that shares tensors; what cannot be copied, such as a lock or a process group, is shared."""
    with _SharedTensors():
        try:
            return copy.deepcopy(value, memo)
        except Exception:
            return value


class _SharedTensors(TorchFunctionMode):
    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in (torch.Tensor.__deepcopy__, torch.Tensor.clone):  # a parameter's copy is made of its clone
            return args[0]
        return function(*args, **(kwargs or {}))


# ---- values ----------------------------------------------------------------------------------------------------------


def _know(stand_in: torch.Tensor, value: torch.Tensor) -> None:
    stand_in._value = value  # type: ignore[attr-defined]


def _small(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() <= MOST_KNOWN


LIFTS = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
"""What a tensor that is written out, as in `torch.tensor(1)`, goes through."""
UNWRITTEN = tuple(
    getattr(torch.ops.aten, name)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
)
"""What gives memory as it is: stand-ins for arguments, too, come of it."""


class _Values(TorchDispatchMode):
    """Lets a call on shapes read the values that do not depend on weights or latents: of timesteps, positions and masks
    of its own.

    They are computed on the CPU beside the stand-ins. A value that an unknown one was written over is unknown from then
    on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._overwritten: list[torch.UntypedStorage] = []

    def _value(self, tensor: torch.Tensor) -> torch.Tensor | None:
        value = getattr(tensor, "_value", None)
        if value is None or any(value.untyped_storage()._cdata == storage._cdata for storage in self._overwritten):
            return None
        return value

    def _places(self, indices: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Indices with as many places in place of a mask of known values as it picks: of a mask alone nobody knows how
        many."""
        places: list[torch.Tensor | None] = []
        for index in indices:
            mask = self._value(index) if index is not None and index.dtype is torch.bool else None
            if index is None or mask is None:
                places.append(index)
                continue
            with _disable_current_modes():
                count = int(mask.sum())
            places += [torch.zeros(count, dtype=torch.long, device=index.device)] * index.dim()
        return places

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        values = tensors if func in LIFTS else [self._value(tensor) for tensor in tensors]
        known = (
            None not in values
            and torch.Tag.nondeterministic_seeded not in func.tags
            and func.overloadpacket not in UNWRITTEN
        )
        if func is torch.ops.aten._local_scalar_dense.default and known:
            with _disable_current_modes():
                return values[0].item()  # type: ignore[union-attr]
        given = (args[0], self._places(args[1])) if func is torch.ops.aten.index.Tensor else args
        output = func(*given, **kwargs)
        outputs = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]
        if known and all(map(_small, outputs)):
            remaining = iter(values)
            leaves = [
                next(remaining)
                if isinstance(leaf, torch.Tensor)
                else torch.device("cpu")
                if isinstance(leaf, torch.device)
                else leaf
                for leaf in leaves
            ]
            with _disable_current_modes():
                real_args, real_kwargs = tree_unflatten(leaves, structure)
                real = tree_flatten(func(*real_args, **real_kwargs))[0]
            for stand_in, value in zip(outputs, (leaf for leaf in real if isinstance(leaf, torch.Tensor)), strict=True):
                _know(stand_in, value)
        elif func._schema.is_mutable:
            self._overwritten += [value.untyped_storage() for value in values if value is not None]
        return output


# ---- what is kept outside of the model -------------------------------------------------------------------------------


class _Untouched:
    """Takes back what a call on shapes leaves in the modules themselves, in their classes and files, and in functions'
    caches."""

    def __init__(self, model: nn.Module):
        owners: dict[int, Any] = {}
        for module in model.modules():
            owners[id(module)] = module
            for part in (module, *vars(module).values()):
                for cls in type(part).__mro__:
                    file = sys.modules.get(cls.__module__)
                    if file is not None and cls.__module__.split(".")[0] not in (
                        "torch",
                        "builtins",
                        "collections",
                        "typing",
                    ):
                        owners[id(cls)], owners[id(file)] = cls, file
        self._owners = list(owners.values())

    def __enter__(self) -> None:
        self._before = [dict(vars(owner)) for owner in self._owners]
        self._misses = {id(cached): cached.cache_info().misses for cached in _cached_functions()}

    def __exit__(self, *error: object) -> None:
        for owner, before in zip(self._owners, self._before, strict=True):
            for name, value in list(vars(owner).items()):
                was = before.get(name)
                if value is was:
                    _purge(value)
                elif _holds_stand_in(value):
                    if name in before:
                        setattr(owner, name, was)
                    else:
                        delattr(owner, name)
        for cached in _cached_functions():
            if cached.cache_info().misses != self._misses.get(id(cached), 0) and any(
                map(_holds_stand_in, _contents(cached))
            ):
                cached.cache_clear()


def _cached_functions() -> list[Any]:
    """All `functools.lru_cache`s, also those that nothing but a closure knows; torch's own hold no tensors of a
    model."""
    found = (one for one in gc.get_objects() if type(one) is functools._lru_cache_wrapper)
    return [one for one in found if not (getattr(one, "__module__", None) or "").startswith("torch.")]


def _contents(cached: Any) -> list[Any]:
    """Keys and values of a cache, as the collector sees them: in a dictionary, or where the size is limited beside
    it."""
    contents: list[Any] = []
    for entry in gc.get_referents(cached):
        contents += [one for pair in entry.items() for one in pair] if type(entry) is dict else [entry]
    return contents


_PLAIN = (nn.Module, types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType, str, bytes, int, float)
"""What is looked at by itself, or holds nothing."""


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping) and type(value) is not types.MappingProxyType:
        yield from list(value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from list(value)
    elif not isinstance(value, _PLAIN) and type(getattr(value, "__dict__", None)) is dict:
        yield from list(vars(value).values())


def _holds_stand_in(value: Any, depth: int = 4) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(value, FakeTensor)
    return depth > 0 and any(_holds_stand_in(part, depth - 1) for part in _parts(value))


def _purge(value: Any, depth: int = 3) -> None:
    """Take the entries that hold stand-ins out of a dictionary, a list or an object that was there before."""
    if depth == 0 or isinstance(value, torch.Tensor):
        return
    entries = value if isinstance(value, dict) else None
    if entries is None and not isinstance(value, (*_PLAIN, list)) and type(getattr(value, "__dict__", None)) is dict:
        entries = vars(value)
    if entries is not None:
        for key, entry in list(entries.items()):
            if any(isinstance(one, (torch.Tensor, tuple)) and _holds_stand_in(one) for one in (key, entry)):
                del entries[key]
            else:
                _purge(entry, depth - 1)
    elif type(value) is list and any(map(_holds_stand_in, value)):
        value[:] = [entry for entry in value if not _holds_stand_in(entry)]
