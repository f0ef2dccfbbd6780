"""What the arms of `bench.frontier` are set to, found on calibration prompts by each method's own procedure.

MagCache's ratios and TeaCache's changes are measured on uncached clips; a threshold is the one whose runs save the
operations that an arm is meant to save. Everything found is kept on disk as soon as it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import peers, report, shapes
from fastercache import policies
from fastercache.models.registry import family_of
from fastercache.schedule.branches import layout_of
from fastercache.schedule.policies import Policy
from fastercache.schedule.schedule import Schedule
from fastercache.shapes import PIPELINES

CLIPS = 2
"""Calibration clips that a measurement or a trial is made of."""
TRIALS = 6
"""Thresholds tried for one arm."""
NEAR = 1.03
"""A ratio of operations within this factor of the one wanted ends the search."""
THRESHOLDS = (0.003, 3.0)
"""The least and the greatest threshold tried."""
DEGREE = 4
"""Of the polynomial that TeaCache's authors fit."""


class Found:
    """Values by name, kept in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of that name: the one in the file, or else made now and kept."""
        if name not in self.values:
            shown = json.dumps(_without_ratios(name)) if name.startswith("{") else name
            print(f"finding {shown} on calibration prompts", flush=True)
            self.values[name] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            report.write_whole(self.path, (report.pretty(self.values) + "\n").encode())
        return self.values[name]


def found_for(pipeline: str, steps: int, clips: int, work: Path) -> Found:
    """What was found so far for runs of that many steps, on that many clips, with these weights and versions."""
    uncached = shapes.Variant("", pipeline=pipeline)
    facts = [shapes.identity(uncached, steps), shapes.identity(shapes.Variant("", peer=_DBCACHE), steps)["versions"]]
    rules = [clips, TRIALS, NEAR, THRESHOLDS, DEGREE, [vars(pair) for pair in shapes.calibration(clips, pipeline)]]
    name = hashlib.sha256(json.dumps([facts, rules], sort_keys=True).encode()).hexdigest()[:16]
    return Found(work / f"settings-{name}.json")


def _without_ratios(text: str) -> dict[str, Any]:
    """A setting without MagCache's ratios, which have a place of their own."""
    return {key: value for key, value in json.loads(text).items() if key != "mag_ratios"}


def reported(found: Found) -> dict[str, Any]:
    """What was found, for the results: lists with four digits, the trials of thresholds, and no distances."""

    def short(values: Sequence[float]) -> list[float]:
        return [float(f"{value:.4g}") for value in values]

    result: dict[str, Any] = {"trials": []}
    for name, value in found.values.items():
        if name.startswith("{"):
            result["trials"].append(_without_ratios(name) | {"flops_ratio": value})
        elif name == "changes":
            result |= {key: short(value[key]) for key in ("ratios", "changes")}
        else:
            result[name] = short(value) if isinstance(value, list) else value
    return result


_DBCACHE = peers.setting(peers.CACHE_DIT)


# ---- what changes from step to step ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """Of the conditional branch of uncached clips, means over the clips.

    ratios: `[steps]`, mean magnitude of the residual of all blocks over that of the step before; 1 at the first.
    changes: `[steps]`, TeaCache's: the relative L1 change of the timestep-modulated input, rescaled by a polynomial
        fitted to that of the residual; 0 at the first.
    distances: `[steps, steps]`, relative L1 distance of the residual of step i to that of step j > i.
    """

    ratios: list[float]
    changes: list[float]
    distances: list[list[float]]


def measure_changes(pipeline: str, steps: int, clips: int) -> dict[str, Any]:
    """`Changes` of so many calibration clips, as plain data."""
    pipe = shapes.pipeline(pipeline)
    ratios, inputs, outputs, distances = [], [], [], []
    for pair in shapes.calibration(clips, pipeline):
        residuals, modulated = _watched(pipe, pair, steps, pipeline)
        norms = [residual.norm(dim=-1) for residual in residuals]
        ratios.append([1.0] + [(b / (a + 1e-8)).mean().item() for a, b in itertools.pairwise(norms)])
        inputs.append([_change(a, b) for a, b in itertools.pairwise(modulated)])
        outputs.append([_change(a, b) for a, b in itertools.pairwise(residuals)])
        distances.append(
            [[_change(a, b) if j > i else 0.0 for j, b in enumerate(residuals)] for i, a in enumerate(residuals)]
        )
    degree = min(DEGREE, steps - 2)
    polynomial = np.polyfit(np.ravel(inputs), np.ravel(outputs), degree)
    changes = [0.0, *np.polyval(polynomial, np.mean(inputs, 0)).tolist()]
    return vars(Changes(np.mean(ratios, 0).tolist(), changes, np.mean(distances, 0).tolist()))


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Relative L1 change."""
    return ((after - before).abs().mean() / before.abs().mean()).item()


def _watched(pipe: Any, pair: shapes.Pair, steps: int, pipeline: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of an uncached clip's conditional branch at each step: the residual of all blocks, and the first block's input as
    the timestep modulates it (of a Wan the modulation alone, as TeaCache has it)."""
    model = pipe.transformer
    family = family_of(model)
    layout = layout_of(family.layout)
    paths = family.block_paths(model)
    first, last = model.get_submodule(paths[0]), model.get_submodule(paths[-1])
    entries: list[torch.Tensor] = []
    residuals: list[torch.Tensor] = []
    modulated: list[torch.Tensor] = []

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        entries.append(args[0] if args else kwargs["hidden_states"])

    def leave(module: Any, args: Any, output: Any) -> None:
        residuals.append(output - family.at_exit(entries.pop(), output.shape))

    def look(module: Any, args: Any, kwargs: Any) -> None:
        modulated.append(args[0] if args else kwargs["hidden_states"])

    handles = [first.register_forward_pre_hook(enter, with_kwargs=True), last.register_forward_hook(leave)]
    if hasattr(model, "condition_embedder"):
        handles.append(model.condition_embedder.register_forward_hook(lambda *all: modulated.append(all[-1][1])))
    else:
        handles.append(first.attn1.register_forward_pre_hook(look, with_kwargs=True))
    try:
        shapes.call(pipe, pair, steps, PIPELINES[pipeline].guidance_scale, pipeline)
    finally:
        for handle in handles:
            handle.remove()
    which = layout.order.index("cond")
    if layout.two_calls:
        return residuals[which::2], modulated[which::2]
    return [x.chunk(2)[which] for x in residuals], [x.chunk(2)[which] for x in modulated]


# ---- schedules -------------------------------------------------------------------------------------------------------


def ran(schedule: Schedule) -> int:
    """Steps at which all blocks run."""
    return sum(step.runs and "stack" not in step.reuse for step in schedule.steps)


def by_threshold(policy: Callable[..., Schedule], steps: int, ratio: float) -> Policy:
    """The policy with the threshold at which the share of steps that run is nearest to 1 / ratio."""
    candidates = np.geomspace(1e-4, 30.0, 400).tolist()
    best = min(candidates, key=lambda value: abs(ran(policy(steps, True, threshold=value)) - steps / ratio))
    return partial(policy, threshold=best)


def shortest_path(distances: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """Numbers of the steps that run, from 1: so many, such that the largest error of a gap is the least, and of those
    the sum. LeMiCa's graph, with the summed distances of the residuals of a gap for its error, where LeMiCa runs the
    end of 700 videos.
    """
    steps = len(distances)
    cost = [[sum(distances[i][i + 1 : j]) for j in range(steps + 1)] for i in range(steps)]
    best: list[dict[int, tuple[float, float, tuple[int, ...]]]] = [{0: (0.0, 0.0, (1,))}]
    for _ in range(count - 1):
        reached: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for i, (most, total, path) in best[-1].items():
            for j in range(i + 1, steps):
                option = (max(most, cost[i][j]), total + cost[i][j], (*path, j + 1))
                reached[j] = min(reached.get(j, option), option)
        best.append(reached)
    ends = [(max(most, cost[i][steps]), total + cost[i][steps], path) for i, (most, total, path) in best[-1].items()]
    return min(ends)[2]


def schedules(found: Found, pipeline: str, steps: int, clips: int, ratio: float) -> dict[str, Policy]:
    """The policies that need a list, each skipping whole steps, about as many as the ratio says."""
    measured = Changes(**found.get("changes", lambda: measure_changes(pipeline, steps, clips)))
    computed = shortest_path(measured.distances, max(2, round(steps / ratio)))
    return {
        "teacache": by_threshold(partial(policies.teacache, changes=measured.changes), steps, ratio),
        "magcache": by_threshold(
            partial(policies.magcache, ratios=measured.ratios, most_skipped=max(2, math.ceil(ratio))), steps, ratio
        ),
        "given": partial(policies.given, computed=computed),
    }


# ---- peers -----------------------------------------------------------------------------------------------------------


def flops_ratio(setting: str, pipeline: str, steps: int, clips: int) -> float:
    """Uncached over cached operations of the denoiser, under a peer's setting, over calibration clips."""
    pipe, scale = shapes.pipeline(pipeline), PIPELINES[pipeline].guidance_scale
    pairs = shapes.calibration(clips, pipeline)

    def run(pair: shapes.Pair, count: int) -> int:
        return peers.counted(pipe.transformer, lambda: shapes.call(pipe, pair, count, scale, pipeline))

    uncached = run(pairs[0], 2) / 2 * steps * len(pairs)
    with peers.enabled(pipe, setting, steps):
        return uncached / sum(run(pair, steps) for pair in pairs)


def threshold_for(
    found: Found, setting: Callable[[float], str], ratio: float, pipeline: str, steps: int, clips: int
) -> float:
    """The threshold of those tried by halving at which the ratio of operations is nearest to the one wanted; the first
    that is within `NEAR` ends the search."""
    low, high = (math.log(value) for value in THRESHOLDS)
    tried: dict[float, float] = {}
    for _ in range(TRIALS):
        middle = (low + high) / 2
        value = float(f"{math.exp(middle):.3g}")
        text = setting(value)
        tried[value] = found.get(text, lambda text=text: flops_ratio(text, pipeline, steps, clips))
        if 1 / NEAR < tried[value] / ratio < NEAR:
            break
        low, high = (middle, high) if tried[value] < ratio else (low, middle)
    return min(tried, key=lambda value: abs(math.log(tried[value] / ratio)))


def magcache_ratios(pipeline: str, steps: int) -> list[float]:
    """What the calibration of diffusers' MagCache prints for the first branch of a calibration clip: its users copy
    it."""
    pipe, printed = shapes.pipeline(pipeline), io.StringIO()
    scale = PIPELINES[pipeline].guidance_scale
    with contextlib.redirect_stdout(printed), peers.enabled(pipe, peers.setting("MagCache", calibrate=True), steps):
        shapes.call(pipe, shapes.calibration(1, pipeline)[0], steps, scale, pipeline)
    lists = re.findall(r"^\[[-\d., e]+\]$", printed.getvalue(), re.MULTILINE)
    return json.loads(lists[0])
