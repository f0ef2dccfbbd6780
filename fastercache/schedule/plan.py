"""From a schedule to what each site of a model does at each step: compute, blend or idle, and which results are kept
where.

Pure Python, decided before the first step; the runtime, the cache, the FLOPs and the summary all read this one answer
and decide nothing.
Kept is what a later step reads: where the schedule never blends the unconditional branch, its results are not cached at
all. A phase, though, does the same on each of its steps, so that one compiled graph serves it: if one of its steps
stores a result, all do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fastercache.errors import ScheduleError
from fastercache.schedule.branches import Branch
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.sites import Selector, SiteNode, SiteTree
from fastercache.schedule.step import Step
from fastercache.triton_kernels.coefficients import COEFFICIENT_COUNT, Coefficient

Action = Literal["compute", "blend", "idle"]
"""What a site does at a step: its own computation; giving a sum of what it computed before; nothing, as a site around
it is blended, or as the step runs nothing at all."""
BOTH: tuple[Branch, ...] = ("cond", "uncond")


@dataclass(frozen=True)
class SiteMode:
    """What a site does on every step of a phase. `push`: the branches whose results it stores."""

    action: Action
    push: tuple[Branch, ...] = ()


@dataclass(frozen=True)
class Phase:
    """Steps that one compiled graph serves: the branches that run, and the mode of every cadence."""

    branches: tuple[Branch, ...]
    modes: tuple[SiteMode, ...]


@dataclass(frozen=True)
class Cadence:
    """What the sites have in common that do the same at every step, with the same coefficients.

    slots: results kept. branches: those whose rows are kept (none where nothing is ever blended). coefficients: where
        in each step's table
    theirs are: one index, or one for each branch, conditional first, where a step blends the two differently.
    """

    slots: int
    branches: tuple[Branch, ...]
    coefficients: tuple[int, ...]


@dataclass(frozen=True)
class PlannedStep:
    """One step of the sampler.

    branches: those that run. phase: its index in `Plan.phases`, `None` where the model is not called. split: store the
    difference of the branches, because a later step rebuilds one from it. rebuild: one branch is rebuilt.
    sum_prediction: the output is a sum of cached predictions, alone or with the step's own. push_prediction: the step's
        own prediction is stored.
    """

    branches: tuple[Branch, ...]
    phase: int | None
    split: bool
    rebuild: bool
    sum_prediction: bool
    push_prediction: bool


@dataclass(frozen=True, eq=False)
class Plan:
    """A schedule on the sites of a model, in a run with or without guidance. A plan equals itself alone, so that what
    is worked out from it can be kept.

    cadence_of: the cadence of each site, by index. maps: kept of the difference of the branches: 0, 2 (its low and high
    frequencies), or 3 (and the whole difference before it). predictions: kept predictions. keeps_latents: whether the
    latents of the newest one are kept too.
    table: `[step][index][COEFFICIENT_COUNT]`, the coefficients; the last index of a step holds those of the rebuilt
        branch and prediction.
    """

    schedule: Schedule
    guided: bool
    sites: tuple[SiteNode, ...]
    cadences: tuple[Cadence, ...]
    cadence_of: tuple[int, ...]
    phases: tuple[Phase, ...]
    steps: tuple[PlannedStep, ...]
    maps: int
    predictions: int
    keeps_latents: bool
    table: tuple[tuple[tuple[float, ...], ...], ...]

    @property
    def branches(self) -> tuple[Branch, ...]:
        return BOTH if self.guided else ("cond",)

    def action(self, site: int, step: int) -> Action:
        """What a site does at a step."""
        phase = self.steps[step].phase
        return "idle" if phase is None else self.phases[phase].modes[self.cadence_of[site]].action

    @cached_property
    def chart(self) -> str:
        """The schedule's chart, of the branches that there are."""
        chart = self.schedule.chart()
        return chart if self.guided else chart.splitlines()[0]

    @cached_property
    def reads_latents(self) -> bool:
        """Whether a prediction is made of latents, too."""
        terms = (step.terms for step in self.schedule.steps)
        return any(one is not None and bool(one.now or one.newest) for one in terms)

    @cached_property
    def skips_nothing(self) -> bool:
        blends = any(mode.action == "blend" for phase in self.phases for mode in phase.modes)
        return not blends and not any(step.rebuild or step.phase is None for step in self.steps)


def make_plan(schedule: Schedule, guided: bool, sites: SiteTree, model: str = "this model") -> Plan:
    """What `schedule` means for a model with these sites.

    guided: whether the run has two branches. model: what messages call it.

    Raises:
        ScheduleError: a selector that names no site, a site reused inside a reused one, or before enough of its results
            were computed. It names the site, the step and the remedy.
    """
    schedule = schedule if guided else schedule.without_guidance()
    _check_selectors(schedule, sites, model)
    actions = _actions(schedule, sites)
    running = [_running(step, guided) for step in schedule.steps]

    found: dict[tuple, int] = {}
    drafts: list[_Draft] = []
    cadence_of = []
    for site, node in enumerate(sites):
        own = tuple(column[site] for column in actions)
        taps = tuple(
            tuple(step.taps_of(node, branch) for branch in ran) if action == "blend" else ()
            for step, ran, action in zip(schedule.steps, running, own, strict=True)
        )
        key = own, taps
        if key not in found:
            found[key] = len(drafts)
            drafts.append(_Draft(schedule, node, own, taps, running))
        cadence_of.append(found[key])

    keys = [(ran, tuple(draft.actions[i] for draft in drafts)) if ran else None for i, ran in enumerate(running)]
    numbers: dict[tuple, int] = {
        key: number for number, key in enumerate(dict.fromkeys(key for key in keys if key is not None))
    }
    phase_of = [None if key is None else numbers[key] for key in keys]
    stored = [draft.stored(phase_of) for draft in drafts]
    phases = tuple(
        Phase(
            ran, tuple(SiteMode(action, wanted.get(number, ())) for action, wanted in zip(column, stored, strict=True))
        )
        for (ran, column), number in numbers.items()
    )
    cadences: list[Cadence] = []
    columns: list[list[tuple[float, ...]]] = []
    for draft, wanted in zip(drafts, stored, strict=True):
        rows = draft.coefficients(phase_of, wanted)
        cadences.append(
            Cadence(
                draft.slots,
                _in_order(branch for push in wanted.values() for branch in push),
                tuple(range(len(columns), len(columns) + len(rows))),
            )
        )
        columns += rows
    outputs = _Outputs(schedule, guided)
    table = tuple((*(column[i] for column in columns), tuple(outputs.coefficients[i])) for i in range(len(schedule)))
    steps = tuple(
        PlannedStep(
            running[i],
            phase_of[i],
            outputs.split[i],
            outputs.rebuild[i],
            step.terms is not None,
            bool(outputs.predictions) and step.runs,
        )
        for i, step in enumerate(schedule.steps)
    )
    return Plan(
        schedule,
        guided,
        tuple(sites),
        tuple(cadences),
        tuple(cadence_of),
        phases,
        steps,
        outputs.maps,
        outputs.predictions,
        outputs.keeps_latents,
        table,
    )


def _running(step: Step, guided: bool) -> tuple[Branch, ...]:
    if not step.runs:
        return ()
    return BOTH if guided and step.branches == "both" else ("cond",)


def _in_order(branches) -> tuple[Branch, ...]:
    wanted = set(branches)
    return tuple(branch for branch in BOTH if branch in wanted)


def _check_selectors(schedule: Schedule, sites: SiteTree, model: str) -> None:
    for text in schedule.selectors:
        if not any(Selector.parse(text).matches(site) for site in sites):
            layers: dict[str, int] = {}
            for site in sites:
                layers[site.kind] = max(layers.get(site.kind, 0), site.layer + 1)
            has = ", ".join(
                f"{kind} (layers 0 to {count - 1})" if kind != "stack" else kind for kind, count in layers.items()
            )
            step = next(number for number, step in enumerate(schedule.steps, 1) if text in step.reuse)
            raise ScheduleError(
                f"schedule {schedule.name!r}, step {step} reuses {text!r}, but {model} has no such site; it has "
                f"{has or 'none'}"
            )


def _actions(schedule: Schedule, sites: SiteTree) -> list[list[Action]]:
    """What every site does, `[step][site]`: the sites inside a blended one idle."""
    by_reuse: dict[tuple[str, ...], list[Action]] = {}
    result: list[list[Action]] = []
    for number, step in enumerate(schedule.steps, 1):
        if not step.runs:
            result.append(["idle"] * len(sites))
            continue
        if step.reuse not in by_reuse:
            by_reuse[step.reuse] = _actions_of(step, sites, f"schedule {schedule.name!r}, step {number}")
        result.append(by_reuse[step.reuse])
    return result


def _actions_of(step: Step, sites: SiteTree, where: str) -> list[Action]:
    selectors = [(text, Selector.parse(text)) for text in step.reuse]
    actions: list[Action] = []
    for site in sites:
        naming = [text for text, selector in selectors if selector.matches(site)]
        if len(naming) > 1:
            raise ScheduleError(
                f"{where}: {naming[0]!r} and {naming[1]!r} both name the {site.kind} site of layer {site.layer}; leave "
                "one out of reuse"
            )
        inside = site.parent is not None and actions[site.parent] != "compute"
        if inside and naming:
            outer = site.parent
            while outer is not None and actions[outer] != "blend":
                outer = sites[outer].parent
            assert outer is not None
            raise ScheduleError(
                f"{where} reuses the {site} inside the {sites[outer]}, which it reuses as well, so that the inner one "
                f"never runs; leave {naming[0]!r} out of this step's reuse, or the selector of the outer one"
            )
        actions.append("idle" if inside else "blend" if naming else "compute")
    return actions


class _Draft:
    """A cadence in the making: which results its blends read, and from that which are stored, and in which slot."""

    def __init__(
        self,
        schedule: Schedule,
        site: SiteNode,
        actions: Sequence[Action],
        taps: Sequence[tuple],
        running: Sequence[tuple],
    ):
        self.actions, self.taps, self.running = actions, taps, running
        self.slots = max((len(one) for step in taps for one in step), default=0)
        self.by_branch = any(len(set(step)) > 1 for step in taps)
        self.needed: list[set[Branch]] = [set() for _ in actions]
        history: dict[Branch, list[int]] = {"cond": [], "uncond": []}
        for i, action in enumerate(actions):
            if action == "compute":
                for branch in running[i]:
                    history[branch].append(i)
            elif action == "blend":
                where = f"schedule {schedule.name!r}, step {i + 1}"
                for branch, coefficients in zip(running[i], taps[i], strict=True):
                    self._read(where, site, branch, history[branch], len(coefficients))
                sources = [history[branch][-self.slots_of(i) :] for branch in running[i]]
                if len(sources) > 1 and sources[0] != sources[1]:
                    raise ScheduleError(
                        f"{where} runs both branches and reuses the {site}, whose newest results are not of the same "
                        "steps in both; let this step compute it"
                    )

    def slots_of(self, i: int) -> int:
        return max(len(one) for one in self.taps[i])

    def _read(self, where: str, site: SiteNode, branch: Branch, history: list[int], count: int) -> None:
        if len(history) < count:
            names = {"cond": "conditional", "uncond": "unconditional"}
            raise ScheduleError(
                f"{where} blends {count} results of the {site} in the {names[branch]} branch, but only {len(history)} "
                f"of its results were computed before; let {count} steps compute it first (a site does not run while "
                "one around it is reused)"
            )
        for source in history[-count:]:
            self.needed[source].add(branch)

    def stored(self, phase_of: Sequence[int | None]) -> dict[int, tuple[Branch, ...]]:
        """The branches that are stored in each phase, where any is."""
        wanted: dict[int, set[Branch]] = {}
        for phase, branches in zip(phase_of, self.needed, strict=True):
            if branches and phase is not None:
                wanted.setdefault(phase, set()).update(branches)
        return {phase: _in_order(branches) for phase, branches in wanted.items()}

    def coefficients(
        self, phase_of: Sequence[int | None], stored: dict[int, tuple[Branch, ...]]
    ) -> list[list[tuple[float, ...]]]:
        """The coefficients of every step: one list, or one for each branch; none where nothing is ever blended."""
        if not self.slots:
            return []
        filled: list[int] = []
        result: list[list[tuple[float, ...]]] = [[] for _ in range(2 if self.by_branch else 1)]
        for i, action in enumerate(self.actions):
            vectors = [[0.0] * COEFFICIENT_COUNT for _ in result]
            if action == "blend":
                for number, vector in enumerate(vectors):
                    write_taps(vector, self.taps[i][min(number, len(self.taps[i]) - 1)], filled)
            elif action == "compute" and phase_of[i] in stored:
                filled.append(len(filled) % self.slots)
                for vector in vectors:
                    vector[Coefficient.WRITE_SLOT] = float(filled[-1])
            for column, vector in zip(result, vectors, strict=True):
                column.append(tuple(vector))
        return result


def write_taps(vector: list[float], taps: Sequence[float], filled: Sequence[int]) -> None:
    """Coefficients and the slots they are for: the newest tap is in the slot that was filled last."""
    vector[Coefficient.TAPS] = float(len(taps))
    for tap, coefficient in enumerate(taps):
        vector[Coefficient.OF_TAP + tap] = float(coefficient)
        vector[Coefficient.READ_SLOT + tap] = float(filled[-1 - tap])


class _Outputs:
    """What becomes of the denoiser's output: which differences and predictions are kept, and with what coefficients
    they are used."""

    def __init__(self, schedule: Schedule, guided: bool):
        steps = schedule.steps
        self.rebuild = [guided and step.branches == "cond" for step in steps]
        self.split = [False] * len(steps)
        self.maps = 3 if any(step.previous for step in steps) and guided else 2 if any(self.rebuild) else 0
        full: list[int] = []
        for i, step in enumerate(steps):
            if step.branches == "both":
                full.append(i)
            elif self.rebuild[i]:
                for source in full[-2:] if step.previous else full[-1:]:
                    self.split[source] = True
        terms = [step.terms for step in steps]
        self.predictions = max((len(one.taps) for one in terms if one is not None), default=0)
        self.keeps_latents = any(one is not None and one.newest for one in terms)
        if self.keeps_latents:
            self.predictions = max(self.predictions, 1)
        self.coefficients = []
        filled: list[int] = []
        for step, rebuild in zip(steps, self.rebuild, strict=True):
            vector = [0.0] * COEFFICIENT_COUNT
            vector[Coefficient.LOW], vector[Coefficient.HIGH] = (step.low, step.high) if rebuild else (1.0, 1.0)
            vector[Coefficient.PREVIOUS] = step.previous if rebuild else 0.0
            if step.terms is not None:
                write_taps(vector, step.terms.taps, filled)
                vector[Coefficient.NOW], vector[Coefficient.NEWEST] = float(step.terms.now), float(step.terms.newest)
                vector[Coefficient.FRESH] = float(step.terms.fresh) if step.runs else 0.0
            if self.predictions and step.runs:
                filled.append(len(filled) % self.predictions)
                vector[Coefficient.WRITE_SLOT] = float(filled[-1])
            self.coefficients.append(vector)
