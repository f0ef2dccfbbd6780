"""What a generation is made from, what it gives, and how near two of them are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastercache.report import metrics

CEILING = 100.0
"""In dB; stands for the infinite PSNR of equal clips, so that means stay finite."""
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)
"""Student's t for 95 %, for 1 and more degrees of freedom."""


@dataclass(frozen=True)
class Example:
    """A generation: the arguments of a call that are its own, and the seed of its noise. name: the prompt, or a hash of
    the arguments where they hold none."""

    name: str
    seed: int
    arguments: Mapping[str, Any] = field(compare=False, default_factory=dict)

    @classmethod
    def of(cls, prompt: str | Mapping[str, Any], seed: int) -> Example:
        if isinstance(prompt, str):
            return cls(prompt, seed, {"prompt": prompt})
        named = prompt.get("prompt")
        return cls(named if isinstance(named, str) else described(prompt), seed, dict(prompt))

    @property
    def key(self) -> list[Any]:
        """What tells it from others, as plain data."""
        return [self.name, self.seed, described(self.arguments)]


def described(value: Any) -> str:
    """A short hash of a call's arguments, tensors and images included."""

    def plain(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            part = part.detach().float().cpu().numpy()
        if hasattr(part, "__array_interface__"):  # an image, too, whose text has its address
            return hashlib.sha256(np.asarray(part).tobytes()).hexdigest()
        return f"{type(part).__name__} {part}"

    ordered = dict(sorted(value.items())) if isinstance(value, Mapping) else value
    return hashlib.sha256(json.dumps(ordered, default=plain).encode()).hexdigest()[:12]


def clip_of(output: Any) -> np.ndarray:
    """What a pipeline's call gave, float32: frames `[frames, H, W, 3]` in [0, 1], or the latents it was asked for."""
    if isinstance(output.frames, torch.Tensor):
        return output.frames.float().cpu().numpy()
    return np.clip(np.asarray(output.frames[0], np.float32), 0, 1)


def psnr(made: np.ndarray, wanted: np.ndarray) -> float:
    """In dB, at most `CEILING`; the peak is 1 for frames, and the range of the wanted ones for latents."""
    inside = wanted.min() >= 0 and wanted.max() <= 1
    peak = 1.0 if inside else float(wanted.max() - wanted.min())
    return min(metrics.psnr_of_clip(made, wanted, peak), CEILING)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t interval of a mean; `None` for fewer than two values."""
    if len(values) < 2:
        return None
    mean = float(np.mean(values))
    half = T_975[len(values) - 2] * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half
