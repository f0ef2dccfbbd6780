"""Schedules: what happens at each denoising step, decided before the first one.

A `Schedule` is plain data: one `Step` for each call of the denoiser, in order. It knows no model and no tensor, prints as a chart, and
travels as JSON. Policies (`fastercache.policies`) build schedules; the engine runs them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastercache.errors import ScheduleError
from fastercache.triton_kernels.row import MAX_TAPS

SITE_KINDS = ("spatial", "temporal", "joint", "mlp", "block", "stack")
"""Kinds of place in a model whose output can be cached."""
ATTENTION_KINDS = ("spatial", "temporal", "joint")
"""What the selector `attention` stands for."""

Branches = Literal["both", "cond"]


@dataclass(frozen=True)
class Selector:
    """Names sites by kind, and optionally by layer: `attention`, `mlp`, `mlp[14:43]` (layers 14 to 42)."""

    kind: str
    first: int = 0
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Selector:
        match = re.fullmatch(r"([a-z]+)(?:\[(\d*):(\d*)\])?", text) if isinstance(text, str) else None
        if match is None or match[1] not in ("attention", *SITE_KINDS):
            known = ", ".join(("attention", *SITE_KINDS))
            raise ScheduleError(f"unknown site {text!r}; known are {known}, each optionally with a range of layers as in 'mlp[14:43]'")
        return cls(match[1], int(match[2] or 0), int(match[3]) if match[3] else None)

    def matches(self, kind: str, layer: int) -> bool:
        kinds = ATTENTION_KINDS if self.kind == "attention" else (self.kind,)
        return kind in kinds and layer >= self.first and (self.stop is None or layer < self.stop)


@dataclass(frozen=True)
class Step:
    """One call of the denoiser.

    branches: `both` runs the conditional and the unconditional branch; `cond` runs the conditional one and rebuilds the other from the
        last step that ran both (CFG-Cache, Eq. 11). A run without guidance has one branch and ignores this.
    reuse: selectors of the sites that are not computed but blended from cached outputs (Eq. 5).
    taps: coefficients of the newest computed outputs of those sites, newest first: `(1 + w, -w)` for FasterCache, `(1,)` for plain reuse.
    low, high: weights w1 and w2 of the low- and high-frequency difference on a `cond` step.
    own_taps: pairs of a selector of `reuse` and its coefficients, for selectors that are not blended with `taps`.
    """

    branches: Branches = "both"
    reuse: tuple[str, ...] = ()
    taps: tuple[float, ...] = ()
    low: float = 1.0
    high: float = 1.0
    own_taps: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def taps_of(self, selector: str) -> tuple[float, ...]:
        """The coefficients a selector of `reuse` is blended with."""
        return dict(self.own_taps).get(selector, self.taps)


@dataclass(frozen=True)
class Schedule:
    """What every step of a run does. Validated on construction; raises `ScheduleError` that names the step and the remedy.

    steps: one `Step` for each call of the denoiser, in order. Messages and charts count from 1.
    name: for people; the summary prints it.
    radius_divisor: the low-pass keeps the frequencies within `min(H, W) // radius_divisor` of each latent plane (5 in the paper).
    """

    steps: tuple[Step, ...]
    name: str = "custom"
    radius_divisor: int = 5
    _selectors: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "_selectors", _validate(self))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def selectors(self) -> tuple[str, ...]:
        """The distinct selectors that any step reuses, in order of first use."""
        return self._selectors

    @property
    def skips_nothing(self) -> bool:
        return all(step.branches == "both" and not step.reuse for step in self.steps)

    def without_guidance(self) -> Schedule:
        """The same schedule for a run that has one branch only: feature reuse stays, CFG-Cache goes."""
        return replace(self, steps=tuple(replace(step, branches="both", low=1.0, high=1.0) for step in self.steps))

    def part(self, start: int, stop: int) -> Schedule:
        """Steps `start` (from 0) up to `stop` (exclusive), for a model that runs no others, such as one of two experts.

        Nothing is read from before them: both branches run until they have, and a site is computed until there are outputs to blend.
        """
        rows: list[Step] = []
        computed = dict.fromkeys(self.selectors, 0)
        for step in self.steps[start:stop]:
            branches = step.branches if rows else "both"
            reuse = tuple(text for text in step.reuse if computed[text] >= len(step.taps_of(text)))
            weights = (step.low, step.high) if branches == "cond" else (1.0, 1.0)
            own = tuple(pair for pair in step.own_taps if pair[0] in reuse)
            rows.append(Step(branches, reuse, step.taps if reuse else (), *weights, own))
            for text in computed:
                computed[text] += text not in reuse
        return replace(self, steps=tuple(rows))

    # ---- text ---------------------------------------------------------------------------------------------------------------------

    def to_json(self, path: str | Path | None = None) -> str:
        """The schedule as JSON text, also written to `path` if given."""
        default = asdict(Step())
        rows = [{key: value for key, value in asdict(step).items() if value != default[key]} for step in self.steps]
        document = {"format": "fastercache-schedule-1", "name": self.name, "radius_divisor": self.radius_divisor}
        text = json.dumps(document)[:-1] + ',\n "steps": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n]}\n"
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Schedule:
        """Read a schedule from JSON text or from a file. `ScheduleError` says what is wrong and where."""
        where = "the schedule"
        if isinstance(source, Path) or not source.lstrip().startswith("{"):
            where = f"schedule file {str(source)!r}"
            try:
                source = Path(source).read_text()
            except (OSError, UnicodeDecodeError) as error:
                raise ScheduleError(f"{where} cannot be read: {error}") from error
        try:
            document = json.loads(source)
        except json.JSONDecodeError as error:
            raise ScheduleError(f"{where} is not JSON: {error}; write one with Schedule.to_json to see the form") from error
        if not isinstance(document, dict) or not isinstance(document.get("steps"), list):
            raise ScheduleError(f"{where} has no list 'steps'; write one with Schedule.to_json to see the form")
        if document.get("format", "fastercache-schedule-1") != "fastercache-schedule-1":
            raise ScheduleError(f"{where} has format {document['format']!r}; this version reads 'fastercache-schedule-1'")
        _only_known(document, {"format", "name", "radius_divisor", "steps"}, where)
        steps = tuple(_step_from(row, f"{where}, step {number}") for number, row in enumerate(document["steps"], 1))
        return cls(steps, name=str(document.get("name", "custom")), radius_divisor=document.get("radius_divisor", 5))

    def chart(self) -> str:
        """Two rows of one character a step: `#` computed, `~` blended, `.` not run; the conditional branch above, the other below."""
        cond = "".join("~" if step.reuse else "#" for step in self.steps)
        uncond = "".join("." if step.branches == "cond" else "~" if step.reuse else "#" for step in self.steps)
        return f"cond   {cond}\nuncond {uncond}"


def _only_known(row: dict[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise ScheduleError(f"{where} has unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _step_from(row: Any, where: str) -> Step:
    if not isinstance(row, dict):
        raise ScheduleError(f"{where} is {row!r}, not an object")
    _only_known(row, Step.__dataclass_fields__, where)
    values = dict(row)
    for key in ("reuse", "taps"):
        if key in values:
            if not isinstance(values[key], list):
                raise ScheduleError(f"{where}: {key!r} is {values[key]!r}, not a list")
            values[key] = tuple(values[key])
    try:
        values["own_taps"] = tuple((str(selector), tuple(taps)) for selector, taps in values.get("own_taps", ()))
    except (TypeError, ValueError) as error:
        raise ScheduleError(f"{where}: 'own_taps' is {values['own_taps']!r}, not a list of pairs [selector, [coefficients]]") from error
    return Step(**values)


def _validate(schedule: Schedule) -> tuple[str, ...]:
    """Check that the schedule can be run as method and semantics demand; returns the distinct selectors."""
    name = schedule.name
    if not schedule.steps:
        raise ScheduleError(f"schedule {name!r} has no steps; a run has at least one")
    divisor = schedule.radius_divisor
    if not isinstance(divisor, int) or isinstance(divisor, bool) or divisor < 3:
        raise ScheduleError(f"schedule {name!r}: radius_divisor is {divisor!r}; it must be an integer of at least 3")

    computed: dict[str, int] = {}
    selectors = tuple(dict.fromkeys(text for step in schedule.steps for text in step.reuse))
    for text in selectors:
        Selector.parse(text)
    full_steps = single_steps = 0
    for number, step in enumerate(schedule.steps, 1):
        where = f"schedule {name!r}, step {number}"
        if step.branches not in ("both", "cond"):
            raise ScheduleError(f"{where}: branches is {step.branches!r}; it must be 'both' or 'cond'")
        for selector, _ in step.own_taps:
            if selector not in step.reuse:
                raise ScheduleError(f"{where}: own_taps for {selector!r}, which is not among its reused sites {list(step.reuse)}")
        blends = [("taps", step.taps), *((f"own_taps of {selector!r}", taps) for selector, taps in step.own_taps)]
        coefficients = [(f"{label}[{k}]", tap) for label, taps in blends for k, tap in enumerate(taps)]
        for label, value in (("low", step.low), ("high", step.high), *coefficients):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ScheduleError(f"{where}: {label} is {value!r}; coefficients must be finite numbers")
        if bool(step.reuse) != bool(step.taps):
            raise ScheduleError(f"{where}: reuse {list(step.reuse)} with taps {list(step.taps)}; give both or neither")
        for label, taps in blends:
            if len(taps) > MAX_TAPS:
                raise ScheduleError(f"{where}: {label} has {len(taps)} coefficients; at most {MAX_TAPS} outputs can be blended")
            if label != "taps" and not taps:
                raise ScheduleError(f"{where}: {label} is empty; give at least one coefficient, or leave the selector out of own_taps")
        if step.branches == "cond" and not full_steps:
            raise ScheduleError(f"{where} runs the conditional branch alone, but no earlier step ran both; make step 1 'both'")
        if step.branches == "both" and single_steps and step.reuse:
            raise ScheduleError(
                f"{where} runs both branches and reuses {list(step.reuse)} after conditional-only steps have begun: the unconditional "
                "features are too old to extrapolate; let it compute every site (reuse: [])"
            )
        for text in selectors:
            if text in step.reuse:
                needed = len(step.taps_of(text))
                if computed.get(text, 0) < needed:
                    raise ScheduleError(
                        f"{where} blends {needed} outputs of {text!r}, but only {computed.get(text, 0)} were computed before; "
                        f"let {needed} steps compute it first"
                    )
            else:
                computed[text] = computed.get(text, 0) + 1
        full_steps += step.branches == "both"
        single_steps += step.branches == "cond"
    return selectors
