"""The method as slowly and plainly as it can be written: lists, hooks, one branch at a time, and the paper's complex
FFT.

Tests hold the engine against it. It shares no code with the package but the schedule it reads. Every part of the model
always runs here; what a part gives that the schedule reuses is overruled afterwards, and what lies inside it is
forgotten.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn


def same(layer: int) -> int:
    return layer


def even(layer: int) -> int:
    return 2 * layer


def odd(layer: int) -> int:
    return 2 * layer + 1


def alternating(spatial: str, temporal: str, attention: str, mlp: str, cross: str) -> dict:
    """Spatial and temporal blocks in turn, in two lists; blocks, MLPs and cross-attentions are counted through both."""
    return {
        rf"{spatial}\.(\d+)": ("block", even),
        rf"{temporal}\.(\d+)": ("block", odd),
        rf"{spatial}\.(\d+)\.{attention}": ("spatial", same),
        rf"{temporal}\.(\d+)\.{attention}": ("temporal", same),
        rf"{spatial}\.(\d+)\.{cross}": ("cross", even),
        rf"{temporal}\.(\d+)\.{cross}": ("cross", odd),
        rf"{spatial}\.(\d+)\.{mlp}": ("mlp", even),
        rf"{temporal}\.(\d+)\.{mlp}": ("mlp", odd),
    }


def one_list(blocks: str, attention: str, mlp: str, cross: str = "none") -> dict:
    return {
        rf"{blocks}\.(\d+)": ("block", same),
        rf"{blocks}\.(\d+)\.{attention}": ("joint", same),
        rf"{blocks}\.(\d+)\.{cross}": ("cross", same),
        rf"{blocks}\.(\d+)\.{mlp}": ("mlp", same),
    }


STRUCTURE = {
    "Latte": alternating("transformer_blocks", "temporal_transformer_blocks", "attn1", "ff", "attn2"),
    "STDiT3": alternating("spatial_blocks", "temporal_blocks", "attn", "mlp", "cross_attn"),
    "HunyuanVideo": one_list("transformer_blocks", "attn", "ff(?:_context)?")
    | {
        r"single_transformer_blocks\.(\d+)": ("block", lambda layer: layer + 1),
        r"single_transformer_blocks\.(\d+)\.attn": ("joint", lambda layer: layer + 1),
    },
    "DiffusionTransformer": one_list(r"transformer\.layers", "attention", "mlp"),
    "AsymmDiTJoint": one_list("blocks", "attn", "mlp_[xy]"),
    "SkyReels": one_list("blocks", "attn1", "ffn", "attn2"),
    "Wan": one_list("blocks", "attn1", "ffn", "attn2"),
    "Vchitect": one_list("transformer_blocks", "attn", "ff(?:_context)?"),
    "CogVideoX": one_list("transformer_blocks", "attn1", "ff(?:_context)?"),
    "Mochi": one_list("transformer_blocks", "attn1", "ff(?:_context)?"),
    "": one_list("transformer_blocks", "attn1", "ff(?:_context)?", "attn2"),
}
"""Beginning of a class's name -> paths of its sites -> their kind and the number of their layer."""
TWO_STREAMS = ("HunyuanVideo", "Vchitect", "CogVideoX", "CogView4", "AsymmDiTJoint", "Mochi")
"""Beginnings of the names of classes whose blocks carry the video and the text; the others carry the video alone."""


STREAM_PLACES = {"AsymmetricJointBlock": (0, 2)}
"""Where the streams are among a block's arguments, if they are not the first."""


def site_modules(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Path of each site that is a module -> (kind, layer), from the models' own structure."""
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


def taps_of(step, branch: str, kind: str, layer: int) -> tuple[float, ...]:
    """The coefficients of a reused site in a branch: the last of the step's own ones that name it, else those of the
    step."""
    taps = step.taps
    for text, own in step.own_taps:
        selector, _, only = text.partition("@")
        if only in ("", branch) and named(selector, kind, layer):
            taps = own
    return tuple(single(tap) for tap in taps)


def paper_reconstruction(
    e_c: torch.Tensor, d_low: torch.Tensor, d_high: torch.Tensor, w1: float, w2: float, radius: int
) -> torch.Tensor:
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
        self.blocks = [
            path for path, (kind, _) in sorted(self.sites.items(), key=lambda item: item[1][1]) if kind == "block"
        ]
        self.streams = 2 if type(model).__name__.startswith(TWO_STREAMS) else 1
        self.history: dict[tuple[str, str], list] = {}
        self.number = 0
        self.differences: list = []
        self.predictions: list = []

    def branch(self, name: str, arguments: dict[str, Any], step) -> torch.Tensor:
        """One branch alone, with every reused site overruled."""
        entries: dict[str, list] = {}
        reusing: list[str] = []

        def reused(kind, layer):
            return any(named(selector, kind, layer) for selector in step.reuse)

        def blend(path, kind, layer):
            kept = self.history.setdefault((name, path), [])
            taps = taps_of(step, name, kind, layer)
            return [sum(tap * kept[-1 - k][j] for k, tap in enumerate(taps)) for j in range(len(kept[-1]))]

        def keep(path, tensors):
            if not reusing:
                self.history.setdefault((name, path), []).append([tensor.clone() for tensor in tensors])

        def module_hook(path):
            kind, layer = self.sites[path]

            def hook(module, args, output):
                if not reusing and reused(kind, layer):
                    blended = tuple(blend(path, kind, layer))
                    return blended if isinstance(output, tuple) else blended[0]
                keep(path, output if isinstance(output, tuple) else (output,))
                return None

            return hook

        def streams_into(module, args, kwargs):
            parameters = list(inspect.signature(type(module).forward).parameters)[1:]
            places = STREAM_PLACES.get(type(module).__name__, tuple(range(self.streams)))
            return [args[k] if k < len(args) else kwargs[parameters[k]] for k in places]

        def block_hooks(path):
            kind, layer = self.sites[path]
            first, last = path == self.blocks[0], path == self.blocks[-1]

            def before(module, args, kwargs):
                entries[path] = streams_into(module, args, kwargs)
                if first:
                    entries["stack"] = entries[path]
                    if reused("stack", 0):
                        reusing.append("stack")
                if not reusing and reused(kind, layer):
                    reusing.append(path)

            def after(module, args, output):
                exits = list(output) if isinstance(output, tuple) else [output]
                if reusing == [path]:
                    reusing.clear()
                    exits = [entry + more for entry, more in zip(entries[path], blend(path, kind, layer), strict=True)]
                elif reusing:
                    exits = list(entries[path])
                else:
                    keep(path, [out - entry for entry, out in zip(entries[path], exits, strict=True)])
                if last:
                    start = turned(entries["stack"][0], exits[0])
                    if reusing:
                        reusing.clear()
                        exits[0] = start + blend("stack", "stack", 0)[0]
                    else:
                        keep("stack", [exits[0] - start])
                return tuple(exits) if isinstance(output, tuple) else exits[0]

            return before, after

        handles = []
        around = {}
        for path, (kind, _) in self.sites.items():
            module = self.model.get_submodule(path)
            if kind == "block" and hasattr(self.model, "hooks"):
                around[path] = block_hooks(path)
            elif kind == "block":
                before, after = block_hooks(path)
                handles += [
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(after),
                ]
            else:
                handles.append(module.register_forward_hook(module_hook(path)))
        if around:
            handles.append(AroundLayers(self.model, around))
        try:
            output = self.model(**arguments)
            return output if isinstance(output, torch.Tensor) else output[0]
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, arguments: dict[str, Any]) -> torch.Tensor:
        step = self.schedule.steps[self.number]
        self.number += 1
        latents = arguments["x" if "x" in arguments else "hidden_states"]
        if self.order == "none":
            computed = self.branch("cond", arguments, step) if step.branches != "none" else None
            return self.delivered(step, computed, latents)
        batch = len(latents)
        halves = [
            {
                key: value[rows] if isinstance(value, torch.Tensor) and len(value) == batch else value
                for key, value in arguments.items()
            }
            for rows in (slice(0, batch // 2), slice(batch // 2, None))
        ]
        uncond, cond = halves if self.order == "uncond-first" else reversed(halves)
        if step.branches == "none":
            return self.delivered(step, None, latents)
        e_u, e_c = self.both(uncond, cond, step)
        return self.delivered(step, torch.cat([e_u, e_c] if self.order == "uncond-first" else [e_c, e_u]), latents)

    def pair(self, uncond: dict[str, Any], cond: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """A step of guidance in two calls: the predictions of both."""
        step = self.schedule.steps[self.number]
        self.number += 1
        latents = torch.cat([one["x" if "x" in one else "hidden_states"] for one in (uncond, cond)])
        computed = torch.cat(self.both(uncond, cond, step)) if step.branches != "none" else None
        return self.delivered(step, computed, latents).chunk(2)

    def delivered(self, step, computed: torch.Tensor | None, latents: torch.Tensor) -> torch.Tensor:
        """What the sampler gets: the computed prediction, one that stands in for it, or a correction."""
        terms, result = step.prediction, computed
        if computed is None or terms is not None:
            taps = (1.0,) if terms is None else terms.taps
            total = sum(single(tap) * self.predictions[-1 - k][0].double() for k, tap in enumerate(taps))
            like = computed if computed is not None else self.predictions[-1][0]
            if terms is not None and terms.now:
                total = total + single(terms.now) * as_prediction(latents, like).double()
            if terms is not None and terms.newest:
                total = total + single(terms.newest) * self.predictions[-1][1].double()
            if computed is not None:
                total = total + single(terms.fresh) * computed.double()
            result = total.to(like.dtype)
        if computed is not None:
            self.predictions.append((computed, as_prediction(latents, computed)))
        return result

    def both(self, uncond: dict[str, Any], cond: dict[str, Any], step) -> tuple[torch.Tensor, torch.Tensor]:
        e_c = self.branch("cond", cond, step)
        packed = type(self.model).__name__.startswith("LTX")
        extents = [cond[name] for name in ("num_frames", "height", "width")] if packed else []
        plane = e_c.mT.unflatten(2, extents) if packed else e_c
        radius = min(plane.shape[-2:]) // self.schedule.radius_divisor
        if step.branches == "both":
            e_u = self.branch("uncond", uncond, step)
            self.differences.append(paper_differences(e_u.mT.unflatten(2, extents) if packed else e_u, plane, radius))
        else:
            low, high = self.differences[-1]
            e_u = paper_reconstruction(plane, low, high, single(step.low), single(step.high), radius)
            if step.previous:
                zero = torch.zeros_like(plane)
                e_u = e_u + single(step.previous) * paper_reconstruction(zero, *self.differences[-2], 1.0, 1.0, radius)
            e_u = e_u.flatten(2).mT if packed else e_u
        return e_u, e_c


class AroundLayers:
    """SAT calls a function in place of each layer: the layers' hooks, called around it."""

    def __init__(self, model: nn.Module, around: dict):
        self.model, self.around, self.hooks = model, around, model.hooks
        model.hooks = self.hooks | {"layer_forward": self.call}

    def call(self, *args, layer_id, **kwargs):
        path = f"transformer.layers.{int(layer_id)}"
        module, (before, after) = self.model.get_submodule(path), self.around[path]
        before(module, args, kwargs)
        return after(module, args, self.hooks["layer_forward"](*args, layer_id=layer_id, **kwargs))

    def remove(self):
        self.model.hooks = self.hooks


def turned(entry: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The residual stream at the first block's entry, laid out as it is at the last one's exit: Latte's frames and
    tokens change places."""
    if entry.shape == out.shape:
        return entry
    frames = out.shape[1]
    return entry.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)


def as_prediction(latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The latents in the shape of a prediction: without the channels that it lacks, with zeros for those that it has
    besides."""
    if latents.dim() > like.dim():
        latents = latents.flatten(0, 1)
    padded = torch.zeros_like(like)
    common = tuple(slice(0, min(sizes)) for sizes in zip(latents.shape, like.shape, strict=True))
    padded[common] = latents[common].to(like.dtype)
    return padded
