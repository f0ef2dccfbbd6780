"""The video systems whose schedules are published, at their published sizes: what each site costs and what caching it takes.

Counted from the shapes alone, so that a preset can be inspected without a model: transformer blocks only (attention with its projections,
MLPs), one branch, one video. Tests hold the counts against `torch.utils.flop_counter` on the models themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastercache.memory import FORMATS, CacheFormat, RingPlan
from fastercache.plan import Plan, group_of


@dataclass(frozen=True)
class PublishedSite:
    """One place whose output a schedule may reuse. macs: of one branch. outputs: (tokens, channels) of each tensor it gives."""

    kind: str
    layer: int
    macs: int
    outputs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class System:
    """A published configuration.

    source: where its sizes are from. steps: denoiser calls of one video. guided: whether it runs two branches. macs: multiply-accumulates.
    prediction: elements of one branch's predicted latents. other_macs: of the blocks, outside all sites, for one branch. parameters: of the
    denoiser. dtype: its published precision.
    """

    name: str
    source: str
    video: str
    steps: int
    sites: tuple[PublishedSite, ...]
    other_macs: int
    prediction: int
    parameters: int
    guided: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one branch through all blocks."""
        return self.other_macs + sum(site.macs for site in self.sites)

    def cached_macs(self, plan: Plan) -> int:
        """Multiply-accumulates of a whole run of `plan`."""
        groups = [group_of(plan.groups, site.kind, site.layer) for site in self.sites]
        saved = [
            sum(site.macs for site, group in zip(self.sites, groups, strict=True) if group == index) for index in range(len(plan.groups))
        ]
        return sum(
            len(step.branches) * (self.macs - sum(macs for macs, group in zip(saved, step.groups, strict=True) if group.blend))
            for step in plan.steps
        )

    def uncached_macs(self, plan: Plan) -> int:
        """The same run with nothing skipped."""
        return len(plan.steps) * len(plan.branches) * self.macs

    def cache_bytes(self, plan: Plan, storage: CacheFormat) -> int:
        """Bytes that a run of `plan` keeps for one video: the outputs that a later step reads, and the two float32 maps of CFG-Cache."""
        total = 2 * 4 * self.prediction if any(step.split for step in plan.steps) else 0
        for site in self.sites:
            index = group_of(plan.groups, site.kind, site.layer)
            if index is None or not plan.groups[index].branches:
                continue
            group = plan.groups[index]
            for tokens, channels in site.outputs:
                shape = (len(group.branches) * tokens, channels)
                total += RingPlan(0, index, group.branches, group.slots, shape, self.dtype, storage).bytes
        return total

    def fitting_format(self, plan: Plan, device_bytes: int = 80_000_000_000, working_share: float = 0.15) -> CacheFormat | None:
        """The most exact format with which weights, caches and a share of the device for activations fit, or `None` if none does."""
        room = device_bytes * (1 - working_share) - self.parameters * self.dtype.itemsize
        return next((storage for storage in FORMATS if self.cache_bytes(plan, storage) <= room), None)


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return tokens * inputs * outputs


def _attention(queries: int, keys: int, width: int) -> int:
    """The two products of softmax(Q K^T) V."""
    return 2 * queries * keys * width


def _spatial_temporal(
    width: int, depth: int, frames: int, positions: int, text: int, temporal_cross: bool
) -> tuple[tuple[PublishedSite, ...], int]:
    """Spatial and temporal blocks in turn; cross-attention to the text in the spatial ones, and in the temporal ones of Open-Sora."""
    tokens = frames * positions
    projections = _linear(tokens, width, 4 * width)
    spatial = projections + frames * _attention(positions, positions, width)
    temporal = projections + positions * _attention(frames, frames, width)
    mlp = 2 * _linear(tokens, width, 4 * width)
    cross = 2 * _linear(tokens, width, width) + _linear(text, width, 2 * width) + _attention(tokens, text, width)
    output = ((tokens, width),)
    sites = []
    for layer in range(depth):
        for kind, macs, index in (("spatial", spatial, 2 * layer), ("temporal", temporal, 2 * layer + 1)):
            sites += [PublishedSite(kind, layer, macs, output), PublishedSite("mlp", index, mlp, output)]
    return tuple(sites), depth * (2 if temporal_cross else 1) * cross


def _joint(width: int, depth: int, video: int, text: int) -> tuple[PublishedSite, ...]:
    """Joint attention over video and text with shared weights, and one MLP over both (CogVideoX)."""
    tokens = video + text
    attention = _linear(tokens, width, 4 * width) + _attention(tokens, tokens, width)
    mlp = 2 * _linear(tokens, width, 4 * width)
    sites = []
    for layer in range(depth):
        sites += [
            PublishedSite("joint", layer, attention, ((video, width), (text, width))),
            PublishedSite("mlp", layer, mlp, ((tokens, width),)),
        ]
    return tuple(sites)


def _vchitect(width: int, depth: int, frames: int, positions: int, text: int) -> tuple[PublishedSite, ...]:
    """Three attentions in one module: over a frame with its text, over the frames of each position, and to the first frame's text."""
    tokens, context = frames * positions, frames * text
    attention = 2 * _linear(tokens, width, 3 * width) + _linear(tokens, width, width) + _linear(context, width, 3 * width)
    attention += 2 * _linear(tokens, width, width) + _linear(tokens + context, width, width) + 2 * _linear(context, width, width)
    attention += frames * _attention(positions + text, positions + text, width)
    attention += (positions + text) * _attention(frames, frames, width) + _attention(tokens + context, text, width)
    mlp, context_mlp = 2 * _linear(tokens, width, 4 * width), 2 * _linear(context, width, 4 * width)
    sites = []
    for layer in range(depth):
        last = layer == depth - 1
        sites += [
            PublishedSite("joint", layer, attention - last * _linear(context, width, width), ((tokens, width), (context, width))),
            PublishedSite("mlp", layer, mlp, ((tokens, width),)),
        ]
        if not last:
            sites.append(PublishedSite("mlp", layer, context_mlp, ((context, width),)))
    return tuple(sites)


def _mochi(width: int, text_width: int, depth: int, video: int, text: int) -> tuple[PublishedSite, ...]:
    """Joint attention over video and a narrower text, SwiGLU MLPs; the last block leaves the text as it is."""
    attention = _linear(video, width, 4 * width) + _linear(text, text_width, 3 * width) + _linear(text, width, text_width)
    attention += _attention(video + text, video + text, width)
    hidden, text_hidden = 4 * width * 2 // 3, 4 * text_width * 2 // 3
    sites = []
    for layer in range(depth):
        last = layer == depth - 1
        sites += [
            PublishedSite(
                "joint", layer, attention - last * _linear(text, width, text_width), ((video, width), (text, width if last else text_width))
            ),
            PublishedSite("mlp", layer, 3 * _linear(video, width, hidden), ((video, width),)),
        ]
        if not last:
            sites.append(PublishedSite("mlp", layer, 3 * _linear(text, text_width, text_hidden), ((text, text_width),)))
    return tuple(sites)


def _hunyuan(width: int, dual: int, single: int, video: int, text: int) -> tuple[tuple[PublishedSite, ...], int]:
    """Blocks with two streams, then blocks with one whose attention output goes straight into a projection it shares with the MLP."""
    tokens = video + text
    scores = _attention(tokens, tokens, width)
    outputs = ((video, width), (text, width))
    sites = []
    for layer in range(dual):
        sites += [
            PublishedSite("joint", layer, _linear(tokens, width, 4 * width) + scores, outputs),
            PublishedSite("mlp", layer, 2 * _linear(video, width, 4 * width), ((video, width),)),
            PublishedSite("mlp", layer, 2 * _linear(text, width, 4 * width), ((text, width),)),
        ]
    for layer in range(dual, dual + single):
        sites.append(PublishedSite("joint", layer, _linear(tokens, width, 3 * width) + scores, outputs))
    return tuple(sites), single * (_linear(tokens, width, 4 * width) + _linear(tokens, 5 * width, width))


def _systems() -> dict[str, System]:
    open_sora, open_sora_cross = _spatial_temporal(1152, 28, 57, 30 * 53, 300, temporal_cross=True)
    plan, plan_cross = _spatial_temporal(1152, 28, 17, 32 * 32, 300, temporal_cross=False)
    latte, latte_cross = _spatial_temporal(1152, 28, 16, 32 * 32, 120, temporal_cross=False)
    hunyuan, hunyuan_fused = _hunyuan(3072, 20, 40, 33 * 45 * 80, 256)
    published = (
        System(
            "open-sora-1.2", "github.com/hpcaitech/Open-Sora, STDiT3-XL/2", "192 frames of 480x854", 30,
            open_sora, open_sora_cross, math.prod((8, 57, 60, 106)), 1_208_000_000,
        ),
        System(
            "open-sora-plan-1.1", "github.com/PKU-YuanGroup/Open-Sora-Plan v1.1, LatteT2V-XL/122", "65 frames of 512x512", 159,
            plan, plan_cross, math.prod((8, 17, 64, 64)), 1_057_000_000,
        ),
        System(
            "latte", "github.com/Vchitect/Latte, LatteT2V", "16 frames of 512x512", 50,
            latte, latte_cross, math.prod((8, 16, 64, 64)), 1_057_000_000,
        ),
        System(
            "cogvideox-2b", "huggingface.co/THUDM/CogVideoX-2b, transformer/config.json", "49 frames of 480x720", 50,
            _joint(1920, 30, 13 * 30 * 45, 226), 0, math.prod((16, 13, 60, 90)), 1_690_000_000,
        ),
        System(
            "vchitect-2.0", "huggingface.co/Vchitect/Vchitect-2.0-2B, transformer/config.json", "40 frames of 432x768", 100,
            _vchitect(1536, 24, 40, 27 * 48, 77 + 256), 0, math.prod((16, 40, 54, 96)), 2_425_000_000,
        ),
        System(
            "cogvideox-5b", "huggingface.co/THUDM/CogVideoX-5b, transformer/config.json", "49 frames of 480x720", 50,
            _joint(3072, 42, 13 * 30 * 45, 226), 0, math.prod((16, 13, 60, 90)), 5_570_000_000,
        ),
        System(
            "mochi", "huggingface.co/genmo/mochi-1-preview, transformer/config.json", "163 frames of 480x848", 64,
            _mochi(3072, 1536, 48, 28 * 30 * 53, 256), 0, math.prod((12, 28, 60, 106)), 10_030_000_000,
        ),
        System(
            "hunyuan-video", "huggingface.co/tencent/HunyuanVideo, diffusers' default configuration", "129 frames of 720x1280", 50,
            hunyuan, hunyuan_fused, math.prod((16, 33, 90, 160)), 12_820_000_000, guided=False,
        ),
    )  # fmt: skip
    return {system.name: system for system in published}


SYSTEMS: dict[str, System] = _systems()
"""By name; the part of a preset's name before the slash is one of these."""
