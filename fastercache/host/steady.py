"""Settings of this process for steady times on a CPU: as many threads as there are free cores, and memory that stays
with the process.

For programs (`fastercache demo`, `fastercache sample`, the benchmarks), at their beginning. An import of fastercache
sets nothing.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastercache.host import environment

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""`M_TRIM_THRESHOLD` and `M_MMAP_THRESHOLD` of glibc's malloc.h."""
LARGEST = 32 << 20
"""Bytes of the largest allocations that the heap can serve; glibc takes no higher threshold."""
KEPT = 512 << 20
"""Bytes of free memory at the end of the heap beyond which it goes back to the system."""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(LARGEST), "MALLOC_TRIM_THRESHOLD_": str(KEPT)}
"""What glibc reads the same settings from as a process begins: for processes that run code of another revision."""
LOOK = 0.3
"""Seconds for which the load of the cores is looked at."""


def steady_allocator() -> bool:
    """Keep freed memory in the process, for the next tensors; whether that could be set.

    By default glibc gives a tensor of megabytes back to the system when it is freed, and a new one is cleared page by
    page again: a clip of "shapes" makes 100,000 page faults on one thread, and 4,000 with this.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, KEPT))


def idle_cores(
    proc: Path = Path("/proc"), cores: set[int] | None = None, wait: Callable[[float], None] = time.sleep
) -> float | None:
    """How many of the cores this process may use do nothing just now; `None` where the system does not say."""
    mine = (
        cores
        if cores is not None
        else os.sched_getaffinity(0)
        if hasattr(os, "sched_getaffinity")
        else set(range(environment.cores()))
    )
    before = _times(proc, mine)
    wait(LOOK)
    after = _times(proc, mine)
    if not before or before.keys() != after.keys():
        return None
    idle = 0.0
    for core, (was_idle, was_all) in before.items():
        now_idle, now_all = after[core]
        if now_all <= was_all:
            return None
        idle += (now_idle - was_idle) / (now_all - was_all)
    return idle


def _times(proc: Path, cores: set[int]) -> dict[int, tuple[int, int]]:
    """Ticks that each of the cores was idle, and in all, since the system began."""
    try:
        lines = [line.split() for line in (proc / "stat").read_text().splitlines()]
    except OSError:
        return {}
    found = {}
    for name, *ticks in (line for line in lines if line):
        number = name.removeprefix("cpu")
        if name.startswith("cpu") and number.isdigit() and int(number) in cores:
            counts = [int(tick) for tick in ticks[:8]]  # what comes after is counted in `user` already
            found[int(number)] = counts[3] + counts[4], sum(counts)
    return found


def choose_threads() -> str:
    """Give torch one thread for each free core, and say so in a sentence.

    More threads than free cores are far slower than one: those of OpenMP wait for one another at the end of every
    operation. On two cores with eight busy processes a clip took 216 s on two threads and 21 s on one.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return f"{torch.get_num_threads()} CPU threads, as OMP_NUM_THREADS says"
    cores = environment.cores()
    idle = idle_cores()
    if idle is None:
        idle = cores - os.getloadavg()[0] if hasattr(os, "getloadavg") else cores
    threads = max(1, min(cores, math.floor(idle + 0.5), torch.get_num_threads()))
    torch.set_num_threads(threads)
    others = (
        ""
        if threads >= cores
        else f", of which about {max(0.0, idle):.1f} are free; OMP_NUM_THREADS sets another number"
    )
    return f"{threads} CPU thread{'s' * (threads > 1)} on {cores} core{'s' * (cores > 1)}{others}"
