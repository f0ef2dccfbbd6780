"""What other libraries put on a model, known by what they leave on its modules: offloading hooks and adapters. None is
imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fastercache.errors import CompileError

ModelState = tuple[tuple, ...]
"""What graphs depend on in a model itself, a tuple for each module."""


def forward_slot(module: nn.Module) -> tuple[dict[str, Any], str]:
    """Where a module's own forward is kept, underneath its hooks: a dictionary and a key, which it may lack for the
    class's forward.

    accelerate has it as `module._old_forward`, diffusers in the first reference of its registry; both put that back
    when hooks are renewed.
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


def comes_and_goes(module: nn.Module) -> bool:
    """Whether a module's weights leave the device after its calls, or after those of the pipeline: then no address of
    theirs stays."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))  # accelerate's hooks in a row, or one
    # An AlignDevicesHook may only move inputs to where the weights are; others that have no such word move the weights.
    return any(
        one is not None and getattr(one, "offload", True) for one in hooks
    ) or "group_offloading" in _diffusers_hooks(module)


def devices_of(model: nn.Module, modules: Iterable[nn.Module]) -> list[str]:
    """The devices, other than the CPU, that a model's weights are spread over. Those that offloading keeps elsewhere
    are not counted."""
    placed = getattr(model, "hf_device_map", None) or {}
    # accelerate's maps have the bare index of the current kind of accelerator, whatever that is.
    found = {f"device {place}" if isinstance(place, int) else str(place) for place in placed.values()}
    found -= {"cpu", "disk", "meta"}
    if len(found) > 1:
        return sorted(found)
    devices = set()
    for module in modules:
        for tensor in module._parameters.values():
            if tensor is not None and not tensor.is_cpu:
                devices.add(tensor.device)
    return sorted(str(device) for device in devices if device.type != "meta")


def _diffusers_hooks(module: nn.Module) -> Mapping[str, Any]:
    registry = module.__dict__.get(
        "_diffusers_hook"
    )  # asking a module for what it lacks takes 1 us, and every run asks all of them
    return registry.hooks if registry is not None else {}


def refuse_offloading_inside(
    model: nn.Module, modules: Iterable[nn.Module], compiled: Iterable[nn.Module], regional: bool
) -> None:
    """`CompileError` if weights are moved inside what is compiled; hooks on a compiled module itself run outside of its
    graph."""
    if not any("_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__ for module in modules):
        return
    for module in compiled:
        for part in modules_of(module)[1:]:
            if (what := offloading(part)) is not None:
                path = next(path for path, one in module.named_modules() if one is part)
                block_level = (
                    "block-level group offloading" if regional else "block-level group offloading with regional=True"
                )
                raise CompileError(
                    f"{type(model).__name__}: {what} moves the weights of {path!r} inside {type(module).__name__}, "
                    "which is compiled as one graph, and cannot be traced; offload in larger parts "
                    f"(enable_model_cpu_offload, {block_level}), or compile with backend=None"
                )


def compute_dtype(module: nn.Module) -> Callable[[torch.Tensor], torch.dtype]:
    """What a weight's dtype is while the module runs: diffusers' layerwise casting keeps it in another."""
    casting = _diffusers_hooks(module).get("layerwise_casting")
    return lambda tensor: casting.compute_dtype if casting is not None and tensor.is_floating_point() else tensor.dtype


def refuse_others_at_work(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> None:
    """`CompileError` if torch has compiled the model, which hides its parts from a schedule, or a cache of diffusers is
    at work in it.

    modules: all of the model's, where they are known.
    """
    own = model.__dict__.get("_modules", {}).get("_orig_mod", model)
    modules = modules_of(model) if modules is None else modules
    if own is not model or any(part._compiled_call_impl is not None for part in modules):
        raise CompileError(
            f"{type(own).__name__} is compiled by torch already, and the schedule cannot reach inside its graphs; "
            "compile by fastercache instead: fastercache.compile(..., backend='inductor') on the model as it was. For "
            "a wrapped model that is model._orig_mod; after model.compile() or compile_repeated_blocks(), load it "
            "again, or undo them: for part in model.modules(): part._compiled_call_impl = None"
        )
    if getattr(model, "is_cache_enabled", False):
        raise CompileError(
            f"this {type(model).__name__} has a diffusers cache enabled, and two caches exclude each other; call its "
            "disable_cache()"
        )


def state_of(modules: Iterable[nn.Module]) -> ModelState:
    """Kinds of modules and weights, and which adapters are at work: what Dynamo guards, so that a change means other
    graphs."""
    return tuple([_own_state(module) for module in modules])


def _own_state(module: nn.Module) -> tuple:
    kind: Any = type(module)
    state: list[Any] = [kind, _adapters(module) if _holds_adapters(kind) else None]
    for store in stores_of(module):
        for name, tensor in store.items():
            if tensor is not None:
                state.append((name, type(tensor), tensor.dtype, tensor.shape, tensor.requires_grad))
    return tuple(state)


def stores_of(module: nn.Module) -> Sequence[dict[str, Any]]:
    """Where a module's own parameters and buffers are, by name."""
    return module._parameters, module._buffers


@lru_cache(maxsize=1024)
def _holds_adapters(kind: type) -> bool:
    """Whether modules of this class are layers of peft."""
    return hasattr(kind, "merged_adapters")


def _adapters(layer: Any) -> tuple:
    """Of a layer of peft: which are active, merged or switched off, and their scales (a tensor's value is no part of a
    graph)."""
    scales = {
        name: scale if isinstance(scale, (int, float)) else None
        for name, scale in getattr(layer, "scaling", {}).items()
    }
    return tuple(layer.active_adapters), tuple(layer.merged_adapters), layer.disable_adapters, tuple(scales.items())


def adapters_at_work(model: nn.Module) -> dict[str, tuple[float, bool]]:
    """The adapters of peft that are active in any layer: their scales, in the first layer that has each, and whether
    they are merged into the weights there."""
    found: dict[str, tuple[float, bool]] = {}
    for layer in modules_of(model):
        kind: Any = type(layer)
        if not _holds_adapters(kind):
            continue
        active, merged, disabled, scaling = _adapters(layer)
        if not disabled:
            for name, scale in scaling:
                if scale is not None and name in (*active, *merged):
                    found.setdefault(name, (float(scale), name in merged))
    return found


def first_change(before: ModelState, model: nn.Module) -> str:
    """Path of the first module, other than the model itself, that is not as it was."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = (
        module for module, was in zip(modules_of(model)[1:], before[1:], strict=False) if _own_state(module) != was
    )
    return next((paths[id(module)] for module in found), "")
