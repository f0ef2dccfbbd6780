"""The video systems whose schedules are published, at their published sizes: what each site costs and what caching it
takes.

Counted from the shapes alone, so that a preset can be inspected without a model: transformer blocks only (attention
with its projections, MLPs), one branch, one video. Tests hold the counts against `torch.utils.flop_counter` on the
models themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastercache.cache.cache import plan_cache
from fastercache.cache.formats import BUILT_IN
from fastercache.schedule.plan import Plan
from fastercache.schedule.sites import SiteNode

Outputs = tuple[tuple[int, int], ...]
"""(tokens, channels) of each tensor that a site keeps of one branch."""


@dataclass(frozen=True)
class PublishedSite:
    """One place whose result a schedule may reuse. macs: of one branch, those of the sites inside it included."""

    node: SiteNode
    macs: int
    outputs: Outputs


@dataclass(frozen=True)
class Part:
    """A site inside a block, of `macs` multiply-accumulates."""

    kind: str
    layer: int
    macs: int
    outputs: Outputs


@dataclass(frozen=True)
class Block:
    """One of the repeated blocks. other_macs: outside its parts. streams: what its residual streams are, the video
    first."""

    parts: tuple[Part, ...]
    streams: Outputs
    other_macs: int = 0

    @property
    def macs(self) -> int:
        return self.other_macs + sum(part.macs for part in self.parts)


def sites_of(blocks: Sequence[Block]) -> tuple[PublishedSite, ...]:
    """The tree of sites of a model with these blocks; of the stack, only the video is read afterwards."""
    sites = [PublishedSite(SiteNode("", "stack", 0), sum(block.macs for block in blocks), blocks[-1].streams[:1])]
    for number, block in enumerate(blocks):
        parent = len(sites)
        sites.append(PublishedSite(SiteNode("", "block", number, 0), block.macs, block.streams))
        sites += [
            PublishedSite(SiteNode("", part.kind, part.layer, parent), part.macs, part.outputs) for part in block.parts
        ]
    return tuple(sites)


@dataclass(frozen=True)
class System:
    """A published configuration.

    source: where its sizes are from. steps: denoiser calls of one video. guided: whether it runs two branches. sites:
        the stack first.
    prediction: elements of one branch's predicted latents. parameters: of the denoiser. dtype: its published precision.
    """

    name: str
    source: str
    video: str
    steps: int
    sites: tuple[PublishedSite, ...]
    prediction: int
    parameters: int
    guided: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def tree(self) -> tuple[SiteNode, ...]:
        return tuple(site.node for site in self.sites)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one branch through all blocks."""
        return self.sites[0].macs

    def cached_macs(self, plan: Plan) -> int:
        """Multiply-accumulates of a whole run of `plan`."""
        saved = [
            sum(
                site.macs
                for site, number in zip(self.sites, plan.cadence_of, strict=True)
                if phase.modes[number].action == "blend"
            )
            for phase in plan.phases
        ]
        return sum(
            len(step.branches) * (self.macs - saved[step.phase]) for step in plan.steps if step.phase is not None
        )

    def uncached_macs(self, plan: Plan) -> int:
        """The same run with nothing skipped."""
        return len(plan.steps) * len(plan.branches) * self.macs

    def cache_bytes(self, plan: Plan, storage: str) -> int:
        """Bytes that a run of `plan` keeps for one video: results that a later step reads, differences of the branches,
        predictions."""
        branches = len(plan.branches)

        def site_shapes(site: int) -> list[tuple[int, ...]]:
            return [(branches * tokens, channels) for tokens, channels in self.sites[site].outputs]

        def prediction_shape() -> tuple[int, int]:
            return branches, self.prediction

        return plan_cache(plan, site_shapes, prediction_shape, prediction_shape, self.dtype, storage).bytes

    def fitting_format(self, plan: Plan, device_bytes: int = 80_000_000_000, working_share: float = 0.15) -> str | None:
        """The most exact format with which weights, caches and a share of the device for activations fit, or `None` if
        none does."""
        room = device_bytes * (1 - working_share) - self.parameters * self.dtype.itemsize
        return next((storage.name for storage in BUILT_IN if self.cache_bytes(plan, storage.name) <= room), None)


def _linear(tokens: int, inputs: int, outputs: int) -> int:
    return tokens * inputs * outputs


def _attention(queries: int, keys: int, width: int) -> int:
    """The two products of softmax(Q K^T) V."""
    return 2 * queries * keys * width


def _spatial_temporal(
    width: int, depth: int, frames: int, positions: int, text: int, temporal_cross: bool = False, texts: int = 1
) -> list[Block]:
    """Spatial and temporal blocks in turn; cross-attention to the text in the spatial ones, and in the temporal ones of
    Open-Sora.

    texts: how often a spatial block makes keys and values of the text; Latte, as diffusers has it, repeats the text for
        each frame.
    """
    tokens = frames * positions
    projections = _linear(tokens, width, 4 * width)
    spatial = projections + frames * _attention(positions, positions, width)
    temporal = projections + positions * _attention(frames, frames, width)
    mlp = 2 * _linear(tokens, width, 4 * width)
    cross = (
        2 * _linear(tokens, width, width) + texts * _linear(text, width, 2 * width) + _attention(tokens, text, width)
    )
    output = ((tokens, width),)
    blocks = []
    for layer in range(depth):
        for kind, macs, number in (("spatial", spatial, 2 * layer), ("temporal", temporal, 2 * layer + 1)):
            parts = [Part(kind, layer, macs, output), Part("mlp", number, mlp, output)]
            if kind == "spatial" or temporal_cross:
                parts.insert(1, Part("cross", number, cross, output))
            blocks.append(Block(tuple(parts), output))
    return blocks


def _joint(width: int, depth: int, video: int, text: int) -> list[Block]:
    """Joint attention over video and text with shared weights, and one MLP over both (CogVideoX)."""
    tokens = video + text
    attention = _linear(tokens, width, 4 * width) + _attention(tokens, tokens, width)
    mlp = 2 * _linear(tokens, width, 4 * width)
    streams = ((video, width), (text, width))
    return [
        Block((Part("joint", layer, attention, streams), Part("mlp", layer, mlp, ((tokens, width),))), streams)
        for layer in range(depth)
    ]


def _vchitect(width: int, depth: int, frames: int, positions: int, text: int) -> list[Block]:
    """Three attentions in one module: over a frame with its text, over the frames of each position, and to the first
    frame's text."""
    tokens, context = frames * positions, frames * text
    attention = (
        2 * _linear(tokens, width, 3 * width) + _linear(tokens, width, width) + _linear(context, width, 3 * width)
    )
    attention += (
        2 * _linear(tokens, width, width) + _linear(tokens + context, width, width) + 2 * _linear(context, width, width)
    )
    attention += frames * _attention(positions + text, positions + text, width)
    attention += (positions + text) * _attention(frames, frames, width) + _attention(tokens + context, text, width)
    mlp, context_mlp = 2 * _linear(tokens, width, 4 * width), 2 * _linear(context, width, 4 * width)
    streams = ((tokens, width), (context, width))
    blocks = []
    for layer in range(depth):
        last = layer == depth - 1
        parts = [
            Part("joint", layer, attention - last * _linear(context, width, width), streams),
            Part("mlp", layer, mlp, streams[:1]),
            Part("mlp", layer, context_mlp, streams[1:]),
        ]
        blocks.append(Block(tuple(parts[: 2 if last else 3]), streams))
    return blocks


def _mochi(width: int, text_width: int, depth: int, video: int, text: int) -> list[Block]:
    """Joint attention over video and a narrower text, SwiGLU MLPs; the last block leaves the text as it is."""
    attention = (
        _linear(video, width, 4 * width) + _linear(text, text_width, 3 * width) + _linear(text, width, text_width)
    )
    attention += _attention(video + text, video + text, width)
    hidden, text_hidden = 4 * width * 2 // 3, 4 * text_width * 2 // 3
    streams = ((video, width), (text, text_width))
    blocks = []
    for layer in range(depth):
        last = layer == depth - 1
        parts = [
            Part(
                "joint",
                layer,
                attention - last * _linear(text, width, text_width),
                (streams[0], (text, width)) if last else streams,
            ),
            Part("mlp", layer, 3 * _linear(video, width, hidden), streams[:1]),
            Part("mlp", layer, 3 * _linear(text, text_width, text_hidden), streams[1:]),
        ]
        blocks.append(Block(tuple(parts[: 2 if last else 3]), streams))
    return blocks


def _hunyuan(width: int, dual: int, single: int, video: int, text: int) -> list[Block]:
    """Blocks with two streams, then blocks with one whose attention output goes straight into a projection it shares
    with the MLP."""
    tokens = video + text
    scores = _attention(tokens, tokens, width)
    streams = ((video, width), (text, width))
    mlp, context_mlp = 2 * _linear(video, width, 4 * width), 2 * _linear(text, width, 4 * width)
    blocks = [
        Block(
            (
                Part("joint", layer, _linear(tokens, width, 4 * width) + scores, streams),
                Part("mlp", layer, mlp, streams[:1]),
                Part("mlp", layer, context_mlp, streams[1:]),
            ),
            streams,
        )
        for layer in range(dual)
    ]
    fused = _linear(tokens, width, 4 * width) + _linear(tokens, 5 * width, width)
    for layer in range(dual, dual + single):
        blocks.append(
            Block((Part("joint", layer, _linear(tokens, width, 3 * width) + scores, streams),), streams, fused)
        )
    return blocks


def _systems() -> dict[str, System]:
    open_sora = _spatial_temporal(1152, 28, 57, 30 * 53, 300, temporal_cross=True)
    plan = _spatial_temporal(1152, 28, 17, 32 * 32, 300)
    latte = _spatial_temporal(1152, 28, 16, 32 * 32, 120, texts=16)
    hunyuan = _hunyuan(3072, 20, 40, 33 * 45 * 80, 256)
    published = (
        System(
            "open-sora-1.2", "github.com/hpcaitech/Open-Sora, STDiT3-XL/2", "192 frames of 480x854", 30,
            sites_of(open_sora), math.prod((8, 57, 60, 106)), 1_208_000_000,
        ),
        System(
            "open-sora-plan-1.1", "github.com/PKU-YuanGroup/Open-Sora-Plan v1.1, LatteT2V-XL/122",
            "65 frames of 512x512", 159,
            sites_of(plan), math.prod((8, 17, 64, 64)), 1_057_000_000,
        ),
        System(
            "latte", "github.com/Vchitect/Latte, LatteT2V", "16 frames of 512x512", 50,
            sites_of(latte), math.prod((8, 16, 64, 64)), 1_057_000_000,
        ),
        System(
            "cogvideox-2b", "huggingface.co/THUDM/CogVideoX-2b, transformer/config.json", "49 frames of 480x720", 50,
            sites_of(_joint(1920, 30, 13 * 30 * 45, 226)), math.prod((16, 13, 60, 90)), 1_690_000_000,
        ),
        System(
            "vchitect-2.0", "huggingface.co/Vchitect/Vchitect-2.0-2B, transformer/config.json",
            "40 frames of 432x768", 100,
            sites_of(_vchitect(1536, 24, 40, 27 * 48, 77 + 256)), math.prod((16, 40, 54, 96)), 2_425_000_000,
        ),
        System(
            "cogvideox-5b", "huggingface.co/THUDM/CogVideoX-5b, transformer/config.json", "49 frames of 480x720", 50,
            sites_of(_joint(3072, 42, 13 * 30 * 45, 226)), math.prod((16, 13, 60, 90)), 5_570_000_000,
        ),
        System(
            "mochi", "huggingface.co/genmo/mochi-1-preview, transformer/config.json", "163 frames of 480x848", 64,
            sites_of(_mochi(3072, 1536, 48, 28 * 30 * 53, 256)), math.prod((12, 28, 60, 106)), 10_030_000_000,
        ),
        System(
            "hunyuan-video", "huggingface.co/tencent/HunyuanVideo, diffusers' default configuration",
            "129 frames of 720x1280", 50,
            sites_of(hunyuan), math.prod((16, 33, 90, 160)), 12_820_000_000, guided=False,
        ),
    )  # fmt: skip
    return {system.name: system for system in published}


SYSTEMS: dict[str, System] = _systems()
"""By name; the part of a preset's name before the slash is one of these."""
