"""Others' caching methods as their packages ship them, on a diffusers pipeline: diffusers' own hooks, and cache-dit.

A setting is plain data: `{"peer": "FirstBlockCache", "threshold": 0.1}`, the peer's name and the arguments of its
configuration. Whatever a peer refuses or cannot do is its own error, which the caller reports.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

DIFFUSERS = {
    "FasterCache": "FasterCacheConfig",
    "PyramidAttentionBroadcast": "PyramidAttentionBroadcastConfig",
    "FirstBlockCache": "FirstBlockCacheConfig",
    "TaylorSeer": "TaylorSeerCacheConfig",
    "MagCache": "MagCacheConfig",
}
"""diffusers' hooks, by the name of their configuration in `diffusers.hooks`."""
CACHE_DIT = "cache-dit"
NEEDS_TIMESTEP = ("FasterCache", "PyramidAttentionBroadcast")


def setting(peer: str, **arguments: Any) -> str:
    """A setting as JSON text, the same for the same values."""
    return json.dumps({"peer": peer, **arguments}, sort_keys=True)


def package_of(text: str) -> str:
    """The package, beside diffusers, whose version a setting's clips depend on."""
    return CACHE_DIT if json.loads(text)["peer"] == CACHE_DIT else "diffusers"


@contextmanager
def enabled(pipe: Any, text: str | None, steps: int) -> Iterator[None]:
    """The pipeline runs under a peer's setting inside the block, and is the untouched one after it.

    What a peer cached is gone after each call of the pipeline: diffusers' pipelines reset their denoiser's hooks at the
    end of a call, and cache-dit begins a new context at its beginning.
    """
    if text is None:
        yield
        return
    given = json.loads(text)
    peer = given.pop("peer")
    if peer != CACHE_DIT and peer not in DIFFUSERS:
        raise ValueError(f"no peer is called {peer!r}; there are {', '.join((*DIFFUSERS, CACHE_DIT))}")
    if peer == CACHE_DIT:
        import_module("cache_dit")  # which sets the level of its log
    with _quiet():
        disable = _cache_dit(pipe, given, steps) if peer == CACHE_DIT else _diffusers(pipe, peer, given, steps)
        try:
            yield
        finally:
            disable()


def _diffusers(pipe: Any, peer: str, given: dict[str, Any], steps: int) -> Callable[[], None]:
    if peer in NEEDS_TIMESTEP:
        given["current_timestep_callback"] = lambda: pipe.current_timestep
    if given.get("attention_weight_callback") == "rising":
        given["attention_weight_callback"] = rising(
            lambda: float(pipe.current_timestep), given["spatial_attention_timestep_skip_range"][1]
        )
    enable_diffusers(pipe.transformer, peer, given | ({"num_inference_steps": steps} if peer == "MagCache" else {}))
    return lambda: disable_diffusers(pipe.transformer)


def rising(timestep: Callable[[], float], first: float) -> Callable[[nn.Module], float]:
    """The paper's w of Eq. 5 for the hook: 0 at timestep `first`, 1 at timestep 0."""
    return lambda module: min(max(1.0 - timestep() / first, 0.0), 1.0)


def enable_diffusers(model: Any, peer: str, arguments: Mapping[str, Any]) -> None:
    """Turn on one of diffusers' hooks on a denoiser. An error while they are attached leaves none of them."""
    hooks = import_module("diffusers.hooks")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
    if "taylor_factors_dtype" in values:
        values["taylor_factors_dtype"] = getattr(torch, values["taylor_factors_dtype"])
    config, enable = getattr(hooks, DIFFUSERS[peer])(**values), model.enable_cache
    try:
        enable(config)
    except BaseException:
        model._cache_config = config  # what was attached before the error is taken off
        disable_diffusers(model)
        raise


def disable_diffusers(model: Any) -> None:
    """Take off what `enable_diffusers` attached."""
    if model.is_cache_enabled:
        model.disable_cache()
    for module in model.modules():
        if hasattr(module, "_diffusers_hook") and not module._diffusers_hook.hooks:
            del module._diffusers_hook


def _cache_dit(pipe: Any, given: dict[str, Any], steps: int) -> Callable[[], None]:
    cache_dit = import_module("cache_dit")
    policy, order = given.pop("mask_policy", None), given.pop("taylorseer_order", None)
    if policy is not None:
        given["steps_computation_mask"] = cache_dit.steps_mask(mask_policy=policy, total_steps=steps)
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(num_inference_steps=steps, **given),
        calibrator_config=None if order is None else cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order),
    )
    return lambda: cache_dit.disable_cache(pipe)


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors only of the peers' logs."""
    logs = [logging.getLogger(name) for name in ("diffusers", "CACHE_DIT")]
    before = [log.level for log in logs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for log in logs:
            log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for log, level in zip(logs, before, strict=True):
                log.setLevel(level)


def described_error(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")


# ---- what a run computes and keeps -----------------------------------------------------------------------------------


def counted(model: nn.Module, call: Callable[[], Any]) -> int:
    """Floating-point operations in a denoiser's forwards during a call, as they are run; attention by matrix
    products."""
    counter = FlopCounterMode(display=False)
    inside = 0

    def enter(*_: Any) -> None:
        nonlocal inside
        inside -= counter.get_total_flops()

    def leave(*_: Any) -> None:
        nonlocal inside
        inside += counter.get_total_flops()

    handles = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave)]
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return inside


def cache_bytes(model: nn.Module, pipe: Any = None) -> int:
    """Bytes of the tensors that a peer keeps between steps of a denoiser, at the moment of the call; each storage
    counts once. pipe: the denoiser's, where cache-dit has its own."""
    found: dict[int, int] = {}
    seen: set[int] = set()

    def look(value: Any, depth: int) -> None:
        if id(value) in seen or depth > 8 or isinstance(value, nn.Module):
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for each in value.values():
                look(each, depth + 1)
        elif isinstance(value, list | tuple):
            for each in value:
                look(each, depth + 1)
        elif type(value).__module__.startswith(("diffusers.hooks", "cache_dit.caching")):
            look(vars(value), depth + 1)

    for module in model.modules():
        if hasattr(module, "_diffusers_hook"):
            for hook in module._diffusers_hook.hooks.values():
                for name in ("state", "state_manager"):
                    look(getattr(hook, name, None), 0)
    look(getattr(pipe, "_context_manager", None), 0)
    return sum(found.values())
