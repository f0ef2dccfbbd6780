"""The method as slowly and plainly as it can be written: lists, hooks, one branch at a time, and the paper's complex FFT.

Tests hold the engine against it. It shares no code with the package but the schedule it reads.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

STRUCTURE = {
    "Latte": {
        r"transformer_blocks\.(\d+)\.attn1": ("spatial", lambda layer: layer),
        r"temporal_transformer_blocks\.(\d+)\.attn1": ("temporal", lambda layer: layer),
        r"transformer_blocks\.(\d+)\.ff": ("mlp", lambda layer: 2 * layer),
        r"temporal_transformer_blocks\.(\d+)\.ff": ("mlp", lambda layer: 2 * layer + 1),
    },
    "STDiT3": {
        r"spatial_blocks\.(\d+)\.attn": ("spatial", lambda layer: layer),
        r"temporal_blocks\.(\d+)\.attn": ("temporal", lambda layer: layer),
        r"spatial_blocks\.(\d+)\.mlp": ("mlp", lambda layer: 2 * layer),
        r"temporal_blocks\.(\d+)\.mlp": ("mlp", lambda layer: 2 * layer + 1),
    },
    "HunyuanVideo": {
        r"transformer_blocks\.(\d+)\.attn": ("joint", lambda layer: layer),
        r"transformer_blocks\.(\d+)\.ff(?:_context)?": ("mlp", lambda layer: layer),
        r"single_transformer_blocks\.(\d+)\.attn": ("joint", lambda layer: layer + 1),
    },
    "DiffusionTransformer": {
        r"transformer\.layers\.(\d+)\.attention": ("joint", lambda layer: layer),
        r"transformer\.layers\.(\d+)\.mlp": ("mlp", lambda layer: layer),
    },
    "AsymmDiTJoint": {
        r"blocks\.(\d+)\.attn": ("joint", lambda layer: layer),
        r"blocks\.(\d+)\.mlp_[xy]": ("mlp", lambda layer: layer),
    },
    "SkyReels": {
        r"blocks\.(\d+)\.attn1": ("joint", lambda layer: layer),
        r"blocks\.(\d+)\.ffn": ("mlp", lambda layer: layer),
    },
    "Wan": {
        r"blocks\.(\d+)\.attn1": ("joint", lambda layer: layer),
        r"blocks\.(\d+)\.ffn": ("mlp", lambda layer: layer),
    },
    "Vchitect": {
        r"transformer_blocks\.(\d+)\.attn": ("joint", lambda layer: layer),
        r"transformer_blocks\.(\d+)\.ff(?:_context)?": ("mlp", lambda layer: layer),
    },
    "": {
        r"transformer_blocks\.(\d+)\.attn1": ("joint", lambda layer: layer),
        r"transformer_blocks\.(\d+)\.ff(?:_context)?": ("mlp", lambda layer: layer),
    },
}
"""Beginning of a class's name -> paths of its sites -> their kind and the number of their layer."""


def site_modules(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Path of each site -> (kind, layer), from the models' own structure."""
    patterns = next(patterns for name, patterns in STRUCTURE.items() if type(model).__name__.startswith(name))
    sites = {}
    for path, _ in model.named_modules():
        for pattern, (kind, layer) in patterns.items():
            match = re.fullmatch(pattern, path)
            if match:
                sites[path] = kind, layer(int(match[1]))
    return sites


def named(selector: str, kind: str, layer: int) -> bool:
    match = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", selector)
    kinds = ("spatial", "temporal", "joint") if match[1] == "attention" else (match[1],)
    return kind in kinds and int(match[2] or 0) <= layer < int(match[3] or 10**6)


def paper_reconstruction(e_c: torch.Tensor, d_low: torch.Tensor, d_high: torch.Tensor, w1: float, w2: float, radius: int) -> torch.Tensor:
    """Eq. 11: add the weighted differences to each band of the conditional output's spectrum."""
    disc = low_pass_mask(*e_c.shape[-2:], radius)
    spectrum = torch.fft.fftshift(torch.fft.fft2(e_c.double()), dim=(-2, -1))
    spectrum = spectrum * disc + w1 * d_low + spectrum * ~disc + w2 * d_high
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real.to(e_c.dtype)


def paper_differences(e_u: torch.Tensor, e_c: torch.Tensor, radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 6 and 7: the difference of the branches in each band."""
    disc = low_pass_mask(*e_c.shape[-2:], radius)
    f_u, f_c = (torch.fft.fftshift(torch.fft.fft2(e.double()), dim=(-2, -1)) for e in (e_u, e_c))
    return f_u * disc - f_c * disc, f_u * ~disc - f_c * ~disc


def low_pass_mask(height: int, width: int, radius: int) -> torch.Tensor:
    ky = torch.arange(height) - height // 2
    kx = torch.arange(width) - width // 2
    return ky[:, None] ** 2 + kx[None, :] ** 2 <= radius**2


def single(value: float) -> float:
    """A coefficient as the engine's table holds it, in float32."""
    return float(torch.tensor(value, dtype=torch.float32))


class Simulator:
    """One run of `schedule` on an untouched `model`; `order` is "uncond-first", "cond-first" or "none"."""

    def __init__(self, model: nn.Module, schedule, order: str):
        self.model, self.schedule, self.order = model, schedule, order
        self.sites = site_modules(model)
        self.history: dict[tuple[str, str], list] = {}
        self.number = 0
        self.differences = None

    def branch(self, name: str, arguments: dict[str, Any], step) -> torch.Tensor:
        def hook_for(path):
            def hook(module, args, output):
                outputs = output if isinstance(output, tuple) else (output,)
                kept = self.history.setdefault((name, path), [])
                names = [selector for selector in step.reuse if named(selector, *self.sites[path])]
                if names:
                    taps = dict(step.own_taps).get(names[0], step.taps)
                    outputs = tuple(sum(single(tap) * kept[-1 - k][j] for k, tap in enumerate(taps)) for j in range(len(outputs)))
                    return outputs if isinstance(output, tuple) else outputs[0]
                kept.append(tuple(tensor.clone() for tensor in outputs))
                return None

            return hook

        handles = [self.model.get_submodule(path).register_forward_hook(hook_for(path)) for path in self.sites]
        try:
            output = self.model(**arguments)
            return output if isinstance(output, torch.Tensor) else output[0]
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, arguments: dict[str, Any]) -> torch.Tensor:
        step = self.schedule.steps[self.number]
        self.number += 1
        if self.order == "none":
            return self.branch("cond", arguments, step)
        batch = len(arguments["x" if "x" in arguments else "hidden_states"])
        halves = [
            {key: value[rows] if isinstance(value, torch.Tensor) and len(value) == batch else value for key, value in arguments.items()}
            for rows in (slice(0, batch // 2), slice(batch // 2, None))
        ]
        uncond, cond = halves if self.order == "uncond-first" else reversed(halves)
        e_u, e_c = self.both(uncond, cond, step)
        return torch.cat([e_u, e_c] if self.order == "uncond-first" else [e_c, e_u])

    def pair(self, uncond: dict[str, Any], cond: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """A step of guidance in two calls: the predictions of both."""
        self.number += 1
        return self.both(uncond, cond, self.schedule.steps[self.number - 1])

    def both(self, uncond: dict[str, Any], cond: dict[str, Any], step) -> tuple[torch.Tensor, torch.Tensor]:
        e_c = self.branch("cond", cond, step)
        packed = type(self.model).__name__.startswith("LTX")
        extents = [cond[name] for name in ("num_frames", "height", "width")] if packed else []
        plane = e_c.mT.unflatten(2, extents) if packed else e_c
        radius = min(plane.shape[-2:]) // self.schedule.radius_divisor
        if step.branches == "both":
            e_u = self.branch("uncond", uncond, step)
            self.differences = paper_differences(e_u.mT.unflatten(2, extents) if packed else e_u, plane, radius)
        else:
            e_u = paper_reconstruction(plane, *self.differences, single(step.low), single(step.high), radius)
            e_u = e_u.flatten(2).mT if packed else e_u
        return e_u, e_c
