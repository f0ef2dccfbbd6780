"""What a device has room for: its free memory, less what a step of the model takes, less a margin.

Read once a run, where no limit was given. What a step takes is counted on shapes alone (a second or two for a large
model), and only where the caches would take more than a quarter of what is free: a small run pays some reads of
counters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastercache.cache.budget import Limit
from fastercache.models.skeleton import AllTokensCount, on_shapes

SMALL = 16_000_000
"""Bytes of caches up to which nothing is asked: on the CPU the question alone takes a millisecond, as much as 20 steps
of the engine."""
FREELY = 0.25
"""Share of what is free that caches take without a count of the activations."""
MARGIN = 0.05
"""Share of the whole memory that is left alone: the workspaces of kernels, fragments, the weights that offloading
brings in."""
UNLIMITED = 1 << 60
"""Bytes from which a number in a control group's file means that it sets no limit."""


def room(device: torch.device, wanted: int, kept: int, activations: Callable[[], tuple[int, str]]) -> Limit | None:
    """How much caches may take on a device, for `wanted` bytes; `None` where the device does not say what it has.

    kept: bytes of caches that could be freed first. activations: gives what a step takes, with a word on where that
        comes from.
    """
    found = memory_of(device) if wanted > SMALL else None
    if found is None:
        return None
    free, total = found[0] + kept, found[1]
    if wanted <= FREELY * free:
        return Limit(free, f"the {gigabytes(free)} free on {device}")
    needed, source = activations()
    margin = int(MARGIN * total)
    left = max(0, free - needed - margin)
    return Limit(
        left,
        f"the {gigabytes(left)} left on {device} ({gigabytes(free)} are free; a step takes {gigabytes(needed)}, "
        f"{source}; {gigabytes(margin)} are a margin)",
    )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def memory_of(device: torch.device) -> tuple[int, int] | None:
    """Bytes that a device has free for torch, and in all; `None` where it does not say."""
    if device.type == "cpu":
        return host_memory()
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(device)
    allocated = module.memory_allocated(device)
    free += module.memory_reserved(device) - allocated  # torch's own, between tensors
    if hasattr(module, "get_per_process_memory_fraction"):
        free = min(free, int(module.get_per_process_memory_fraction(device) * total) - allocated)
    return max(0, free), total


def host_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes of main memory that are available to this process, and that it may have in all: the least that the machine
    and the control groups around the process allow. `None` where there is no /proc/meminfo."""
    try:
        fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines() if ":" in line)
        machine = tuple(1024 * int(fields[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return None
    found = [machine, *_control_groups(root)]
    return max(0, min(free for free, _ in found)), min(total for _, total in found)


def _control_groups(root: Path) -> list[tuple[int, int]]:
    """Free and allowed bytes of each control group with a limit: the process's own and those above it, of either
    version."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        limit, usage, idle = (
            ("memory.max", "memory.current", "inactive_file")
            if not controllers
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        own = base / path.lstrip("/")
        # In a container the path may be the host's, and its own group is at the root of what is mounted.
        for group in (own, *own.parents):
            allowed, used = _number(group / limit), _number(group / usage)
            if allowed is not None and used is not None and allowed < UNLIMITED:
                found.append((allowed - used + _reclaimable(group / "memory.stat", idle), allowed))
            if group == base:
                break
    return found


def _number(path: Path) -> int | None:
    """The number in a file; `None` if there is no such file, or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _reclaimable(path: Path, name: str) -> int:
    """Bytes of files in memory that the system gives up when asked: a line of `memory.stat`."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(line[1]) for line in lines if len(line) == 2 and line[0] == name), 0)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside have made and that are still there; `most`: at the worst
    moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = function(*args, **(kwargs or {}))
        if not function.is_view:  # a view of a weight is of memory that was there before
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor):
                    self._add(leaf.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def activation_bytes(model: nn.Module, arguments: Mapping[str, Any]) -> int:
    """The most that the tensors of one call take at once, inputs and weights apart: counted on shapes, nothing is
    computed."""
    live = _LiveBytes()
    with on_shapes(model) as (hollow, shapes_of), torch.no_grad(), AllTokensCount():
        inputs = shapes_of(arguments)
        with live:
            hollow(**inputs)
    return live.most
