"""Times of the forms of a case: taking turns, each over sets of tensors that together exceed the last level of cache
twice over."""

from __future__ import annotations

import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.op_cases import Case, Tensors

MOST_SETS = 64
SLEEP_CYCLES = 5_000_000
"""GPU clock cycles, about 2.5 ms: longer than the host mostly takes to queue a round behind it, so that no launch waits
for the host."""
LONGEST_SLEEP = 64 * SLEEP_CYCLES
Times = dict[str, list[float]]
"""Microseconds of a call, one figure for each round, of each form."""


def cache_bytes(device: str) -> int:
    """Size of the last-level cache; 64 MiB where the system does not tell."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    kib = [int(found[1]) for size in sizes if (found := re.fullmatch(r"(\d+)K", size))]
    return max(kib, default=64 * 1024) * 1024


def rotating_sets(case: Case, device: str) -> list[Tensors]:
    """Sets of tensors to take in turn: a call finds none of its own in the cache."""
    count = min(math.ceil(2 * cache_bytes(device) / case.moved) + 1, MOST_SETS)
    return [case.buffers() for _ in range(count)]


def round_us(calls: list[Callable[[], object]], device: str) -> float:
    """Microseconds of a call, the mean over one round of them.

    On a GPU the round is queued behind a sleep, and is queued again behind a longer one where the sleep was over too
    soon.

    Raises:
        RuntimeError: the host cannot queue the round before the GPU begins it, so the time would be the host's.
    """
    if device == "cpu":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls) * 1e6
    cycles = SLEEP_CYCLES
    while cycles <= LONGEST_SLEEP:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        before.record()
        for call in calls:
            call()
        after.record()
        queue_was_full = not before.query()  # still asleep: nothing of the round has begun
        after.synchronize()
        if queue_was_full:
            return before.elapsed_time(after) / len(calls) * 1e3
        cycles *= 4
    raise RuntimeError(
        f"{len(calls)} calls are not queued within {LONGEST_SLEEP:,} GPU cycles: what would be timed is the host"
    )


def time_case(case: Case, device: str, forms: Mapping[str, Callable], seconds: float, rounds: int = 100) -> Times:
    """Rounds of each form in turn, at most `rounds` and for about `seconds` (but at least 5), after one to warm up.

    `copy` is timed with them: a copy that moves the same bytes on the same device.
    """
    sets = rotating_sets(case, device)
    source, target = (
        torch.empty((len(sets), math.ceil(case.moved / 2)), dtype=torch.uint8, device=device) for _ in range(2)
    )
    source.random_(0, 256)
    calls: dict[str, list[Callable[[], object]]] = {
        name: [partial(form, tensors) for tensors in sets] for name, form in forms.items()
    }
    calls["copy"] = [partial(torch.Tensor.copy_, *pair) for pair in zip(target, source, strict=True)]
    times: Times = {name: [] for name in calls}
    for name in calls:
        round_us(calls[name], device)
    end = time.monotonic() + seconds
    for done in range(rounds):
        if done >= 5 and time.monotonic() > end:
            break
        for name in turned(list(calls), done):
            times[name].append(round_us(calls[name], device))
    return times


def turned(names: list[str], by: int) -> Iterator[str]:
    """The names from number `by` on, then those before it: no form always follows the same other."""
    return itertools.islice(itertools.cycle(names), by % len(names), by % len(names) + len(names))


def percentiles(values: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th."""
    low, middle, high = (float(x) for x in np.percentile(values, (20, 50, 80)))
    return low, middle, high


def dispatch_us(call: Callable[[], object], device: str, calls: int = 300, rounds: int = 15) -> float:
    """Microseconds that the host spends in a call on tensors too small to matter, the median over rounds of calls."""
    means = []
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()  # an empty queue: the host then never waits for room in it
        start = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(means)
