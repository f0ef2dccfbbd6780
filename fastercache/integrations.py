"""What other libraries put on a model, known by what they leave on its modules: offloading hooks and adapters. None is imported."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from fastercache.errors import CompileError

ModelState = tuple[tuple, ...]
"""What graphs depend on in a model itself, a tuple for each module."""


def forward_slot(module: nn.Module) -> tuple[dict[str, Any], str]:
    """Where a module's own forward is kept, underneath its hooks: a dictionary and a key, which it may lack for the class's forward.

    accelerate has it as `module._old_forward`, diffusers in the first reference of its registry; both put that back when hooks are renewed.
    """
    if "_old_forward" in module.__dict__:
        return module.__dict__, "_old_forward"
    references = getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", None)
    if references:
        first = vars(references[0])
        return first, "forward" if first["original_forward"] is None else "original_forward"
    return module.__dict__, "forward"


def modules_of(model: nn.Module) -> list[nn.Module]:
    """As `nn.Module.modules`, in a quarter of the time, and in another order; a module at two paths comes twice."""
    found = [model]
    for module in found:
        parts = module._modules
        if parts:
            found += [part for part in parts.values() if part is not None]
    return found


def offloading(module: nn.Module) -> str | None:
    """What moves this module's weights to the device for each of its calls, if anything does."""
    hook = module.__dict__.get("_hf_hook")
    if hook is not None:
        return f"accelerate's {type(hook).__name__}"
    return "diffusers' group offloading" if "group_offloading" in _diffusers_hooks(module) else None


def _diffusers_hooks(module: nn.Module) -> Mapping[str, Any]:
    registry = module.__dict__.get("_diffusers_hook")  # asking a module for what it lacks takes 1 us, and every run asks all of them
    return registry.hooks if registry is not None else {}


def refuse_offloading_inside(model: nn.Module, modules: Iterable[nn.Module], compiled: Iterable[nn.Module], regional: bool) -> None:
    """`CompileError` if weights are moved inside what is compiled; hooks on a compiled module itself run outside of its graph."""
    if not any("_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__ for module in modules):
        return
    for module in compiled:
        for part in modules_of(module)[1:]:
            if (what := offloading(part)) is not None:
                path = next(path for path, one in module.named_modules() if one is part)
                block_level = "block-level group offloading" if regional else "block-level group offloading with regional=True"
                raise CompileError(
                    f"{type(model).__name__}: {what} moves the weights of {path!r} inside {type(module).__name__}, which is compiled as "
                    f"one graph, and cannot be traced; offload in larger parts (enable_model_cpu_offload, {block_level}), or compile "
                    "with backend=None"
                )


def refuse_others_at_work(model: nn.Module) -> None:
    """`CompileError` if torch has compiled the model, which hides its parts from a schedule, or a cache of diffusers is at work in it."""
    own = getattr(model, "_orig_mod", model)
    if own is not model or any(part._compiled_call_impl is not None for part in modules_of(model)):
        raise CompileError(
            f"{type(own).__name__} is compiled by torch already, and the schedule cannot reach inside its graphs; compile by fastercache "
            "instead: fastercache.compile(..., backend='inductor') on the model as it was. For a wrapped model that is model._orig_mod; "
            "after model.compile() or compile_repeated_blocks(), load it again, or undo them: "
            "for part in model.modules(): part._compiled_call_impl = None"
        )
    if getattr(model, "is_cache_enabled", False):
        raise CompileError(
            f"this {type(model).__name__} has a diffusers cache enabled, and two caches exclude each other; call its disable_cache()"
        )


def empty_like(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The arguments of a call, with every tensor replaced by one of its shape and dtype on `device`."""

    def empty(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, torch.Tensor) else value

    return tree_map(empty, dict(arguments))


@contextmanager
def on_shapes(model: nn.Module) -> Iterator[torch.device]:
    """Calls inside run on shapes alone, with nothing computed; gives the device for their inputs.

    Hooks are left out, as they would move fake weights into the real parameters. Weights that hooks bring here, from another device, from
    the disk or from another dtype, have stand-ins, and so have quantized ones (torchao), whose products no counter knows.
    """
    device = torch.device(getattr(model, "device", None) or next(model.parameters()).device)
    if device.type == "meta":  # a model without weights, or one whose weights are offloaded: then its buffers are where it runs
        device = next((tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device != device), device)
    hooked, replaced = [], []
    for module in model.modules():
        place, key = forward_slot(module)
        if place is not module.__dict__ or key != "forward":
            hooked.append((module, module.__dict__["forward"]))
            module.__dict__["forward"] = place[key]
        casting = _diffusers_hooks(module).get("layerwise_casting")
        for store in _stores(module):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                dtype = casting.compute_dtype if casting is not None and tensor.is_floating_point() else tensor.dtype
                if (tensor.device, tensor.dtype) != (device, dtype) or is_traceable_wrapper_subclass(tensor):
                    replaced.append((store, name, tensor, dtype))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for store, name, tensor, dtype in replaced:
                store[name] = torch.empty(tensor.shape, dtype=dtype, device=device)
            yield device
    finally:
        for module, forward in hooked:
            module.__dict__["forward"] = forward
        for store, name, tensor, _ in replaced:
            store[name] = tensor


def state_of(modules: Iterable[nn.Module]) -> ModelState:
    """Kinds of modules and weights, and which adapters are at work: what Dynamo guards, so that a change means other graphs."""
    return tuple(map(_own_state, modules))


def _own_state(module: nn.Module) -> tuple:
    state: list[Any] = [type(module), _adapters(module)]
    for store in _stores(module):
        if store:
            state += [
                (name, type(tensor), tensor.dtype, tensor.shape, tensor.requires_grad)
                for name, tensor in store.items()
                if tensor is not None
            ]
    return tuple(state)


def _stores(module: nn.Module) -> Sequence[dict[str, Any]]:
    """Where a module's own parameters and buffers are, by name."""
    return module._parameters, module._buffers


def _adapters(layer: Any) -> Hashable:
    """Of a layer of peft: which are active, merged or switched off, and their scales (a tensor's value is no part of a graph)."""
    if not hasattr(type(layer), "merged_adapters"):
        return None
    scales = {name: scale if isinstance(scale, (int, float)) else None for name, scale in getattr(layer, "scaling", {}).items()}
    return tuple(layer.active_adapters), tuple(layer.merged_adapters), layer.disable_adapters, tuple(scales.items())


def first_change(before: ModelState, model: nn.Module) -> str:
    """Path of the first module, other than the model itself, that is not as it was."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = (module for module, was in zip(modules_of(model)[1:], before[1:], strict=False) if _own_state(module) != was)
    return next((paths[id(module)] for module in found), "")
