"""The method as slowly and plainly as it can be written: lists, hooks, one branch at a time, and the paper's complex FFT.

Tests hold the engine against it. It shares no code with the package but the schedule it reads.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn


def site_modules(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Path of each site -> (kind, layer), from the models' own structure."""
    sites = {}
    for path, _ in model.named_modules():
        match = re.fullmatch(r"(temporal_)?transformer_blocks\.(\d+)\.(attn1|ff)", path)
        if match:
            temporal, layer, part = bool(match[1]), int(match[2]), match[3]
            latte = type(model).__name__.startswith("Latte")
            if part == "ff":
                sites[path] = ("mlp", 2 * layer + temporal if latte else layer)
            else:
                sites[path] = ("temporal" if temporal else "spatial" if latte else "joint", layer)
    return sites


def named(selector: str, kind: str, layer: int) -> bool:
    match = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", selector)
    kinds = ("spatial", "temporal", "joint") if match[1] == "attention" else (match[1],)
    return kind in kinds and int(match[2] or 0) <= layer < int(match[3] or 10**6)


def paper_reconstruction(e_c: torch.Tensor, d_low: torch.Tensor, d_high: torch.Tensor, w1: float, w2: float, radius: int) -> torch.Tensor:
    """Eq. 11: add the weighted differences to each band of the conditional output's spectrum."""
    disc = low_pass_mask(*e_c.shape[-2:], radius)
    spectrum = torch.fft.fftshift(torch.fft.fft2(e_c), dim=(-2, -1))
    spectrum = spectrum * disc + w1 * d_low + spectrum * ~disc + w2 * d_high
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).real


def paper_differences(e_u: torch.Tensor, e_c: torch.Tensor, radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 6 and 7: the difference of the branches in each band."""
    disc = low_pass_mask(*e_c.shape[-2:], radius)
    f_u, f_c = (torch.fft.fftshift(torch.fft.fft2(e), dim=(-2, -1)) for e in (e_u, e_c))
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
                if any(named(selector, *self.sites[path]) for selector in step.reuse):
                    outputs = tuple(sum(single(tap) * kept[-1 - k][j] for k, tap in enumerate(step.taps)) for j in range(len(outputs)))
                    return outputs if isinstance(output, tuple) else outputs[0]
                kept.append(tuple(tensor.clone() for tensor in outputs))
                return None

            return hook

        handles = [self.model.get_submodule(path).register_forward_hook(hook_for(path)) for path in self.sites]
        try:
            return self.model(**arguments)[0]
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, arguments: dict[str, Any]) -> torch.Tensor:
        step = self.schedule.steps[self.number]
        self.number += 1
        if self.order == "none":
            return self.branch("cond", arguments, step)
        half = arguments["hidden_states"].shape[0] // 2
        halves = [
            {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
            for rows in (slice(0, half), slice(half, None))
        ]
        uncond, cond = halves if self.order == "uncond-first" else reversed(halves)
        e_c = self.branch("cond", cond, step)
        radius = min(e_c.shape[-2:]) // self.schedule.radius_divisor
        if step.branches == "both":
            e_u = self.branch("uncond", uncond, step)
            self.differences = paper_differences(e_u, e_c, radius)
        else:
            e_u = paper_reconstruction(e_c, *self.differences, single(step.low), single(step.high), radius)
        return torch.cat([e_u, e_c] if self.order == "uncond-first" else [e_c, e_u])
