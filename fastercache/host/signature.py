"""The signature of a run (`fastercache.schedule.signature`): read off the model, and off the pipeline that calls it.

Nothing here is read at a step. Weights are hashed where a schedule asks for a signature, and again only where a weight
or an adapter was replaced since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastercache.models.hooks import adapters_at_work
from fastercache.schedule.signature import Signature

HASHED_WEIGHTS, HASHED_VALUES = 32, 64
"""Matrices of a model that are hashed, and values of each, at equal distances."""

_HASHES: WeakKeyDictionary[nn.Module, tuple[tuple, str | None]] = WeakKeyDictionary()
"""Of each model, and what it was made of."""


def signature_of(
    pipeline: Any,
    model: nn.Module | Sequence[nn.Module],
    call: Mapping[str, Any] | None = None,
    *,
    steps: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    guided: bool,
    cache_format: str | None = None,
) -> Signature:
    """The signature of a run, read when the pipeline has set its timesteps and guidance, as at its first call of the
    denoiser.

    pipeline: whose call it is, `None` where there is none. model: the denoiser, or both experts in the order of their
        steps.
    call: the arguments of the pipeline's call, with defaults. steps: of the run. shape: of the latents as the denoiser
        is given them, without the batch. dtype: of the model's results. guided: whether the run has two branches.
    """
    models = [model] if isinstance(model, nn.Module) else list(model)
    signature = Signature(
        steps=steps,
        shape=tuple(shape),
        dtype=str(dtype).removeprefix("torch."),
        guidance=None if guided else (1.0,),
        cache_format=cache_format,
        **_of_models(models),
    )
    return signature if pipeline is None else of_call(pipeline, models, call or {}, signature)


def of_call(pipeline: Any, models: Sequence[nn.Module], call: Mapping[str, Any], signature: Signature) -> Signature:
    """A signature with what a pipeline knows: its sampler, its guidance, and both experts' weights where it has two."""
    if len(models) > 1:
        signature = replace(signature, **_of_models(models))
    scheduler = getattr(pipeline, "scheduler", None)
    return replace(
        signature,
        scheduler=None if scheduler is None else type(scheduler).__name__,
        scheduler_config=_hash_of_config(scheduler),
        sigmas=_sigmas(scheduler, signature.steps),
        guidance=signature.guidance or _guidance(pipeline, call, len(models)),
    )


def _of_models(models: Sequence[nn.Module]) -> dict[str, Any]:
    models = [getattr(model, "_orig_mod", model) for model in models]
    adapters: dict[str, float] = {}
    for model in models:
        adapters |= {name: scale for name, (scale, _) in adapters_at_work(model).items()}
    found = [_hash_of_weights(model) for model in models]
    return {
        "model": type(models[0]).__name__,
        "config": _hash_of_config(models[0]),
        "weights": found[0] if len(found) == 1 else None if None in found else _hash("".join(map(str, found)).encode()),
        "adapters": tuple(adapters.items()),
    }


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _hash_of_config(part: Any) -> str | None:
    """Of a configuration of diffusers or transformers, without what says where it came from; `None` for a part that has
    none."""
    config: Any = getattr(part, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return None
    kept = {str(key): value for key, value in config.items() if not str(key).startswith("_")}
    return _hash(json.dumps(kept, sort_keys=True, default=_plain).encode())


def _plain(value: Any) -> Any:
    """A value that JSON does not know; no address of an object may get into a hash."""
    return (
        value.tolist()
        if hasattr(value, "tolist")
        else sorted(value)
        if isinstance(value, set | frozenset)
        else str(type(value) if not isinstance(value, torch.dtype) else value)
    )


def _hash_of_weights(model: nn.Module) -> str | None:
    """Of some matrices of the model that lie in memory as plain numbers; `None` where none does, as with quantized
    ones.

    Adapters add modules, and name what they wrap `base_layer`: both are passed over, so that the hash is that of the
    model without them.
    """
    named = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
        and ".lora_" not in name
        and type(parameter) is nn.Parameter
        and parameter.is_floating_point()
        and not parameter.is_meta
    }
    # By a hash of their names, as every n-th of a list of equal blocks may be the same part of each.
    chosen = sorted(named, key=lambda name: hashlib.sha256(name.encode()).digest())[:HASHED_WEIGHTS]
    key = tuple(
        (name, id(named[name]), None if named[name].is_inference() else named[name]._version) for name in chosen
    ) + tuple(adapters_at_work(model).items())
    if (known := _HASHES.get(model)) is not None and known[0] == key:
        return known[1]
    _HASHES[model] = key, _hash_of_values([named[name] for name in chosen]) if chosen else None
    return _HASHES[model][1]


def _hash_of_values(weights: Sequence[torch.Tensor]) -> str:
    with torch.no_grad():
        some = [weight.reshape(-1)[:: max(weight.numel() // HASHED_VALUES, 1)][:HASHED_VALUES] for weight in weights]
        return _hash(torch.cat([values.float() for values in some]).cpu().numpy().tobytes())


def _sigmas(scheduler: Any, steps: int) -> tuple[float, ...] | None:
    """A scheduler's noise levels at the last `steps` of its steps, or its timesteps where it has no levels, rounded."""
    timesteps, sigmas = getattr(scheduler, "timesteps", None), getattr(scheduler, "sigmas", None)
    if not isinstance(timesteps, torch.Tensor) or len(timesteps) < steps:
        return None
    if isinstance(sigmas, torch.Tensor) and sigmas.dim() == 1 and len(sigmas) in (len(timesteps), len(timesteps) + 1):
        timesteps = sigmas[: len(timesteps)]
    return tuple(float(f"{value:.5g}") for value in timesteps[-steps:].double().tolist())


def _guidance(pipeline: Any, call: Mapping[str, Any], experts: int) -> tuple[float, ...] | None:
    """The scale of a run with two branches, of each expert where there are two."""
    scale = getattr(getattr(pipeline, "guider", None), "guidance_scale", None)
    if scale is None and "true_cfg_scale" in call:
        scale = call["true_cfg_scale"]
    if scale is None:
        scale = getattr(pipeline, "guidance_scale", None)
    if scale is None:
        scale = call.get("guidance_scale")
    second = call.get("guidance_scale_2")
    scales = (scale, scale if second is None else second)[:experts]
    numbers = [float(each) for each in scales if isinstance(each, int | float)]
    return tuple(numbers) if len(numbers) == len(scales) else None
