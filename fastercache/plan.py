"""From a schedule to what the engine does: which outputs are kept, in which slot, and when they are read.

Pure Python, decided before the first step. Kept is what a later step reads: where the schedule never blends the unconditional branch, its
features are not cached at all. A phase, though, does the same on each of its steps, so that one compiled graph serves it: if one of its
steps stores an output, all do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastercache.errors import ScheduleError
from fastercache.schedule import Schedule, Selector
from fastercache.triton_kernels.row import ROW_SIZE, Row

Branch = str
"""`cond` or `uncond`."""
Phase = tuple[tuple[Branch, ...], tuple[bool, ...]]
"""The branches that run, and for each group whether it blends."""


@dataclass(frozen=True)
class GroupStep:
    """What the sites of one group do at one step: blend, or compute and store the rows of `push`. The same on all steps of a phase."""

    blend: bool
    push: tuple[Branch, ...]
    row: tuple[float, ...]


@dataclass(frozen=True)
class PlannedStep:
    """One call of the denoiser. `split`: store the difference of the branches, because the next step rebuilds one from it."""

    branches: tuple[Branch, ...]
    split: bool
    rebuild: bool
    groups: tuple[GroupStep, ...]
    low: float
    high: float

    @property
    def phase(self) -> Phase:
        """What distinguishes one graph from another: the branches that run and the groups that blend."""
        return self.branches, tuple(group.blend for group in self.groups)


@dataclass(frozen=True)
class Group:
    """The sites of one selector. They share a cadence, so one row of coefficients serves them all.

    slots: outputs kept. branches: those whose rows are kept (empty where nothing is ever blended).
    """

    selector: str
    slots: int
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class Plan:
    schedule: Schedule
    guidance: bool
    groups: tuple[Group, ...]
    steps: tuple[PlannedStep, ...]

    @property
    def branches(self) -> tuple[Branch, ...]:
        return ("cond", "uncond") if self.guidance else ("cond",)

    @property
    def phases(self) -> tuple[tuple, ...]:
        return tuple(dict.fromkeys(step.phase for step in self.steps))

    @property
    def skips_nothing(self) -> bool:
        return not any(step.rebuild or any(group.blend for group in step.groups) for step in self.steps)

    def table(self) -> list[list[list[float]]]:
        """Coefficient rows `[step][row][ROW_SIZE]`: one for each group, and a last one for the guidance weights."""
        rows = []
        for step in self.steps:
            guidance = [0.0] * ROW_SIZE
            guidance[Row.LOW], guidance[Row.HIGH] = step.low, step.high
            rows.append([*(list(group.row) for group in step.groups), guidance])
        return rows


def group_of(groups: Iterable[Group], kind: str, layer: int) -> int | None:
    """Index of the group a site belongs to, or `None`. `ScheduleError` if two selectors of the schedule name the same site."""
    found = [i for i, group in enumerate(groups) if Selector.parse(group.selector).matches(kind, layer)]
    if len(found) > 1:
        names = " and ".join(repr(group.selector) for i, group in enumerate(groups) if i in found)
        raise ScheduleError(f"selectors {names} both name the {kind} site of layer {layer}; give each site to one selector")
    return found[0] if found else None


def make_plan(schedule: Schedule, guidance: bool) -> Plan:
    """Plan a run. Without guidance the schedule's conditional-only steps are ordinary steps of the single branch."""
    if not guidance:
        schedule = schedule.without_guidance()
    branches: list[tuple[Branch, ...]] = [
        ("cond",) if not guidance or step.branches == "cond" else ("cond", "uncond") for step in schedule.steps
    ]
    rebuild = [guidance and step.branches == "cond" for step in schedule.steps]
    phases = [(branches[i], tuple(selector in step.reuse for selector in schedule.selectors)) for i, step in enumerate(schedule.steps)]
    planned = [_plan_group(schedule, selector, branches, phases) for selector in schedule.selectors]
    steps = []
    for i, step in enumerate(schedule.steps):
        split = guidance and not rebuild[i] and i + 1 < len(rebuild) and rebuild[i + 1]
        low, high = (step.low, step.high) if rebuild[i] else (1.0, 1.0)
        steps.append(PlannedStep(branches[i], split, rebuild[i], tuple(rows[i] for _, rows in planned), low, high))
    return Plan(schedule, guidance, tuple(group for group, _ in planned), tuple(steps))


def _plan_group(
    schedule: Schedule, selector: str, branches: list[tuple[Branch, ...]], phases: list[Phase]
) -> tuple[Group, list[GroupStep]]:
    needed: list[set[Branch]] = [set() for _ in schedule.steps]
    history: list[int] = []
    for i, step in enumerate(schedule.steps):
        if selector in step.reuse:
            for source in history[-len(step.taps_of(selector)) :]:
                needed[source].update(branches[i])
        else:
            history.append(i)
    stored: dict[Phase, set[Branch]] = {}
    for phase, wanted in zip(phases, needed, strict=True):
        stored.setdefault(phase, set()).update(wanted)

    slots = max((len(step.taps_of(selector)) for step in schedule.steps if selector in step.reuse), default=0)
    rows: list[GroupStep] = []
    filled: list[int] = []
    for i, step in enumerate(schedule.steps):
        row = [0.0] * ROW_SIZE
        blend = selector in step.reuse
        push: tuple[Branch, ...] = ()
        if blend:
            taps = step.taps_of(selector)
            row[Row.TAPS] = float(len(taps))
            for tap, coefficient in enumerate(taps):
                row[Row.COEFFICIENT + tap] = float(coefficient)
                row[Row.READ_SLOT + tap] = float(filled[-1 - tap])
        elif stored[phases[i]]:
            push = tuple(branch for branch in ("cond", "uncond") if branch in stored[phases[i]])
            filled.append(len(filled) % slots)
            row[Row.WRITE_SLOT] = float(filled[-1])
        rows.append(GroupStep(blend, push, tuple(row)))
    kept = tuple(branch for branch in ("cond", "uncond") if any(branch in step.push for step in rows))
    return Group(selector, slots, kept), rows
