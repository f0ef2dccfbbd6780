"""The rows of `bench.models` for diffusers' own hooks, on the same models and calls as this package's.

A peer is timed over a window of steps in which it does all that it does, and the seconds of a run follow from the
medians of the kinds of steps: FasterCache at the paper's schedule, MagCache and FirstBlockCache at the steps that
"whole steps" runs. MagCache's ratios and FirstBlockCache's threshold decide what is skipped, so they are chosen such
that it is these steps; with random weights nothing could be calibrated. Eager, and with every block compiled as far as
the hooks let it be: what they do at each step breaks graphs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench import peers
from bench.model_runs import (
    ERROR_FACTOR,
    Case,
    Configuration,
    Row,
    Stopwatch,
    difference,
    free,
    synchronize,
    whole_steps,
)

FORMATS = {"cogvideox-2b": "BFCHW", "cogvideox-5b": "BFCHW"}
"""Where a model's latents do not have the channels before the frames."""
ATTENTION_EVERY, BRANCH_EVERY = 2, 5
"""The intervals of the paper's schedule."""
COMPUTED, SKIPPED = "computed", "skipped"


@dataclass(frozen=True)
class Window:
    """Steps that are timed in one run: the first of them (from 0), the kind of each, and the arguments of the
    configuration."""

    first: int
    kinds: tuple[str, ...]
    arguments: dict[str, Any]


class Clock:
    """What the timestep callbacks of the hooks read."""

    now = 0.0


def time_of(index: int, steps: int) -> int:
    """The timestep of a step from 0, as `Case.calls` has it."""
    return round(999 * (1 - index / steps))


def faster_cache(case: Case, clock: Clock) -> tuple[list[Window], list[str]]:
    """FasterCache at the paper's schedule: its windows, and the kind of every step of a run.

    The hooks count the calls from 0: a call runs both branches where 5 divides its number, and one that runs the
    conditional branch alone computes attention where 2 does.
    """
    start = case.steps // 3  # the paper's s, from 0

    def kind(number: int, index: int) -> str:
        if index <= start or number % BRANCH_EVERY == 0:
            return "both"
        return "cond" if number % ATTENTION_EVERY == 0 else "cond, blended"

    until = [-1, time_of(start, case.steps)]
    arguments = {
        "spatial_attention_block_skip_range": ATTENTION_EVERY,
        "temporal_attention_block_skip_range": ATTENTION_EVERY,
        "unconditional_batch_skip_range": BRANCH_EVERY,
        "spatial_attention_timestep_skip_range": until,
        "temporal_attention_timestep_skip_range": until,
        "unconditional_batch_timestep_skip_range": until,
        "attention_weight_callback": peers.rising(lambda: clock.now, float(max(until[1], 1))),
        "current_timestep_callback": lambda: clock.now,
        "tensor_format": FORMATS.get(case.system, "BCFHW"),
        "is_guidance_distilled": not case.layout.guided,
    }
    length = min(2 * BRANCH_EVERY + 1, case.steps - start)
    window = Window(start, tuple(kind(number, start + number) for number in range(length)), arguments)
    return [window], [kind(index, index) for index in range(case.steps)]


def mag_cache(case: Case, clock: Clock) -> tuple[list[Window], list[str]]:
    """MagCache at the steps of "whole steps": a ratio of 1 adds no error, and one of 100 is over any threshold."""
    kinds = _whole(case.steps)
    length = min(8, case.steps)
    window = tuple(COMPUTED if index in (0, 1, 4, 7) else SKIPPED for index in range(length))
    arguments = {
        "mag_ratios": [100.0 if kind == COMPUTED else 1.0 for kind in window],
        "threshold": 0.1,
        "max_skip_steps": case.steps,
        "retention_ratio": 0.0,
        "num_inference_steps": length,
    }
    return [Window(0, window, arguments)], kinds


def first_block_cache(case: Case, clock: Clock) -> tuple[list[Window], list[str]]:
    """FirstBlockCache at the steps of "whole steps": under a threshold of -1 every step is computed, and under an
    infinite one every step but the first is skipped."""
    return [
        Window(0, (COMPUTED,) * 4, {"threshold": -1.0}),
        Window(0, (COMPUTED, *(SKIPPED,) * 3), {"threshold": math.inf}),
    ], _whole(case.steps)


def _whole(steps: int) -> list[str]:
    ran = whole_steps(steps)
    return [COMPUTED if number in ran else SKIPPED for number in range(1, steps + 1)]


WINDOWS: dict[str, Callable[[Case, Clock], tuple[list[Window], list[str]]]] = {
    "FasterCache": faster_cache,
    "MagCache": mag_cache,
    "FirstBlockCache": first_block_cache,
}


@contextmanager
def hooked(case: Case, peer: str, arguments: dict[str, Any], compiled: bool, backend: str) -> Iterator[None]:
    """The model has a peer's hooks inside the block, and each of its blocks compiled around them."""
    model: Any = case.model
    blocks = [model.get_submodule(path) for path in case.family.block_paths(model)] if compiled else []
    peers.enable_diffusers(model, peer, arguments)
    try:
        for block in blocks:
            block.compile(backend=backend, dynamic=False)
        yield
    finally:
        peers.disable_diffusers(model)
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
        free()


def predictions(case: Case, calls: Sequence[dict[str, Any]]) -> torch.Tensor:
    """What the calls of a step predict, each in a cache context of its own, as diffusers' pipelines make them."""
    model: Any = case.model
    found = []
    for number, call in enumerate(calls):
        with model.cache_context(f"call {number}"):
            found.append(case.family.prediction(model(**call)))
    return torch.cat(found)


def walk(case: Case, window: Window, clock: Clock, look: bool = False) -> tuple[list[float], torch.Tensor, int]:
    """Seconds of each step of a window, the last prediction, and the most bytes kept between two steps, where `look`
    spends the time to see."""
    model: Any = case.model
    model._reset_stateful_cache()
    latents, watch, found, most = case.first, Stopwatch(case.device), None, 0
    watch.lap()
    for index in range(window.first, window.first + len(window.kinds)):
        clock.now = float(time_of(index, case.steps))
        found = predictions(case, case.calls(latents, index, case.steps))
        latents = latents - case.guided(found) / case.steps
        watch.lap()
        most = max(most, peers.cache_bytes(case.model) if look else 0)
    assert found is not None
    return watch.seconds(), found, most


def measure_peer(case: Case, configuration: Configuration, backend: str, row: Row) -> None:
    """Fill the row of a peer. What was found before an error, or before the time was up, stays in it."""
    peer, clock = str(configuration.peer), Clock()
    windows, kinds = WINDOWS[peer](case, clock)
    row["error_limit"] = ERROR_FACTOR * case.eager_error
    row["attention"] = "PyTorch's choice"
    spent: dict[str, list[float]] = {}
    errors, last = [], None
    for window in windows:
        with case.attention("default"), hooked(case, peer, window.arguments, configuration.compiled, backend):
            start = time.perf_counter()
            clock.now = float(time_of(0, case.steps))
            errors.append(difference(predictions(case, case.first_calls), case.exact))  # the first step computes all
            row["error"] = max(errors)
            kept = walk(case, window, clock, look=True)[2]
            walk(case, window, clock)
            synchronize(case)
            if configuration.compiled:
                row["compile_s"] = row.get("compile_s", 0.0) + time.perf_counter() - start
            if case.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            seconds, last, _ = walk(case, window, clock)
            if case.device == "cuda":
                row["peak_bytes"] = max(row.get("peak_bytes", 0), torch.cuda.max_memory_allocated())
            row["cache_bytes"] = max(row.get("cache_bytes", 0), kept)
            row["recompiles"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
            case.model._reset_stateful_cache()  # type: ignore[operator]
        for kind, one in zip(window.kinds, seconds, strict=True):
            spent.setdefault(kind, []).append(one)
    row["phase_s"] = {kind: float(np.median(values)) for kind, values in spent.items()}
    row["composed_s"] = row["seconds"] = sum(row["phase_s"][kind] for kind in kinds)
    finite = last is not None and bool(last.isfinite().all())
    row["correct"] = row["error"] <= row["error_limit"] and finite
    row["outcome"] = (
        "measured" if row["correct"] else "WRONG: the first step is not the model's, or the last not finite"
    )
    if row["recompiles"]:
        row["notes"].append(f"{row['recompiles']} recompilations after two runs of the same steps")
