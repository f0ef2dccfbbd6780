"""Schedules: what happens at each denoising step, decided before the first one.

A `Schedule` is plain data: one `Step` for each step of the sampler, in order. It knows no model and no tensor, prints
as a chart, and travels as JSON. Policies (`fastercache.policies`) build schedules; a plan (`fastercache.schedule.plan`)
says what one means for a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fastercache.errors import ScheduleError
from fastercache.schedule.step import Prediction, Step, check_step, shown

FORMATS = ("fastercache-schedule-1", "fastercache-schedule-2")
"""Of the JSON document, by what its steps say: the first knows neither steps that run nothing nor what else came with
them."""
_SINCE_FORMAT_2 = ("previous", "prediction")


@dataclass(frozen=True)
class Schedule:
    """What every step of a run does. Validated on construction; raises `ScheduleError` that names the step and the
    remedy.

    steps: one `Step` for each step of the sampler, in order. Messages and charts count from 1.
    name: for people; the summary prints it.
    radius_divisor: the low-pass keeps the frequencies within `min(H, W) // radius_divisor` of each latent plane (5 in
        the paper).
    """

    steps: tuple[Step, ...]
    name: str = "custom"
    radius_divisor: int = 5

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "steps", tuple(self.steps))
        except TypeError as error:
            raise ScheduleError(
                f"steps is {self.steps!r}; pass the steps of the run, as in (Step(), Step('cond'))"
            ) from error
        _validate(self)

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def selectors(self) -> tuple[str, ...]:
        """The distinct selectors that any step reuses, in order of first use."""
        return tuple(dict.fromkeys(text for step in self.steps for text in step.reuse))

    @property
    def skips_nothing(self) -> bool:
        return all(step.branches == "both" and not step.reuse for step in self.steps)

    def without_guidance(self) -> Schedule:
        """The same schedule for a run that has one branch only: reused sites and skipped steps stay, CFG-Cache goes."""
        return replace(self, steps=tuple(_with_one_branch(step) for step in self.steps))

    def part(self, start: int, stop: int) -> Schedule:
        """Steps `start` (from 0) up to `stop` (exclusive), for a model that runs no others, such as one of two experts.

        Nothing is read from before them: both branches run until they have, a site is computed until there are results
        to blend, and the denoiser is called until there are predictions to stand in for it.
        """
        steps: list[Step] = []
        computed = dict.fromkeys(self.selectors, 0)
        for step in self.steps[start:stop]:
            full = sum(earlier.branches == "both" for earlier in steps)
            known = sum(earlier.runs for earlier in steps)
            if step.terms is not None and len(step.terms.taps) > known:
                step = replace(step, branches="both" if not step.runs else step.branches, prediction=None)
            if step.branches == "cond" and not full:
                step = replace(step, branches="both", low=1.0, high=1.0, previous=0.0)
            if full < 2:
                step = replace(step, previous=0.0)
            own = [(text, taps) for text, taps in step.own_taps]
            reuse = tuple(
                text for text in step.reuse if computed[text] >= max(map(len, (step.taps, *dict(own).values())))
            )
            kept = tuple(
                (text, taps)
                for text, taps in own
                if text.partition("@")[0].partition("[")[0] in {r.partition("[")[0] for r in reuse}
            )
            step = replace(step, reuse=reuse, taps=step.taps if reuse else (), own_taps=kept if reuse else ())
            steps.append(step)
            for text in computed:
                computed[text] += step.runs and text not in reuse
        return replace(self, steps=tuple(steps))

    # ---- text --------------------------------------------------------------------------------------------------------

    def to_json(self, path: str | Path | None = None) -> str:
        """The schedule as JSON text, also written to `path` if given."""
        rows = [_without_defaults(step) for step in self.steps]
        newer = any(key in row for row in rows for key in _SINCE_FORMAT_2) or any(not step.runs for step in self.steps)
        document = {"format": FORMATS[newer], "name": self.name, "radius_divisor": self.radius_divisor}
        text = (
            json.dumps(document)[:-1] + ',\n "steps": [\n  ' + ",\n  ".join(json.dumps(row) for row in rows) + "\n]}\n"
        )
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
                source = Path(source).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:  # a path with a NUL, or text that is not UTF-8, is a ValueError
                raise ScheduleError(f"{where} cannot be read: {error}") from error
        try:
            document = json.loads(source, object_pairs_hook=once_each)
        except (ValueError, RecursionError) as error:
            raise ScheduleError(
                f"{where} is not JSON: {error}; write one with Schedule.to_json to see the form"
            ) from error
        if not isinstance(document, dict) or not isinstance(document.get("steps"), list):
            raise ScheduleError(f"{where} has no list 'steps'; write one with Schedule.to_json to see the form")
        if document.get("format", FORMATS[0]) not in FORMATS:
            raise ScheduleError(
                f"{where} has format {document['format']!r}; this version reads {' and '.join(map(repr, FORMATS))}"
            )
        _only_known(document, {"format", "name", "radius_divisor", "steps"}, where)
        steps = tuple(_step_from(row, f"{where}, step {number}") for number, row in enumerate(document["steps"], 1))
        return cls(steps, name=document.get("name", "custom"), radius_divisor=document.get("radius_divisor", 5))

    def chart(self) -> str:
        """Two lines of one character a step: `#` computed, `~` some sites blended, `.` not run; the conditional branch
        above."""
        cond = "".join("." if not step.runs else "~" if step.reuse else "#" for step in self.steps)
        uncond = "".join("." if step.branches != "both" else "~" if step.reuse else "#" for step in self.steps)
        return f"cond   {cond}\nuncond {uncond}"


def _with_one_branch(step: Step) -> Step:
    if not step.runs:
        return step
    own = tuple((text.removesuffix("@cond"), taps) for text, taps in step.own_taps if not text.endswith("@uncond"))
    return replace(step, branches="both", low=1.0, high=1.0, previous=0.0, own_taps=own)


def _without_defaults(step: Step) -> dict[str, Any]:
    kept = {
        field.name: getattr(step, field.name) for field in fields(step) if getattr(step, field.name) != field.default
    }
    if step.prediction is not None:
        default = asdict(Prediction())
        kept["prediction"] = {name: value for name, value in asdict(step.prediction).items() if value != default[name]}
    return kept


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which no key may stand twice: the first would be lost without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _only_known(row: dict[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(set(row) - set(known))
    if unknown:
        raise ScheduleError(f"{where} has unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")


def _list_in(values: dict[str, Any], key: str, where: str) -> None:
    """Turn a JSON list of the object into a tuple."""
    if key in values:
        if not isinstance(values[key], list):
            raise ScheduleError(f"{where}: {key!r} is {values[key]!r}, not a list")
        values[key] = tuple(values[key])


def _step_from(row: Any, where: str) -> Step:
    if not isinstance(row, dict):
        raise ScheduleError(f"{where} is {row!r}, not an object")
    _only_known(row, Step.__dataclass_fields__, where)
    values = dict(row)
    for key in ("reuse", "taps"):
        _list_in(values, key, where)
    try:
        values["own_taps"] = tuple((str(selector), tuple(taps)) for selector, taps in values.get("own_taps", ()))
    except (TypeError, ValueError) as error:
        raise ScheduleError(
            f"{where}: 'own_taps' is {values['own_taps']!r}, not a list of pairs [selector, [coefficients]]"
        ) from error
    if values.get("prediction") is not None:
        terms = values["prediction"]
        if not isinstance(terms, dict):
            raise ScheduleError(f"{where}: 'prediction' is {terms!r}, not an object")
        _only_known(terms, Prediction.__dataclass_fields__, f"{where}, prediction,")
        terms = dict(terms)
        _list_in(terms, "taps", f"{where}, prediction")
        values["prediction"] = Prediction(**terms)
    return Step(**values)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name or len(name) > 200 or not name.isprintable():
        raise ScheduleError(
            f"a schedule's name is {str(name)[:60]!a}; it must be printable text of 1 to 200 characters"
        )


def _validate(schedule: Schedule) -> None:
    """Check what can be checked without a model: that no step reads what no earlier step computed."""
    name = schedule.name
    _check_name(name)
    if not schedule.steps:
        raise ScheduleError(f"schedule {name!r} has no steps; a run has at least one")
    divisor = schedule.radius_divisor
    if not isinstance(divisor, int) or isinstance(divisor, bool) or divisor < 3:
        raise ScheduleError(
            f"schedule {name!r}: radius_divisor is {shown(divisor)}; it must be an integer of at least 3"
        )
    for number, step in enumerate(schedule.steps, 1):
        if not isinstance(step, Step):
            raise ScheduleError(f"schedule {name!r}, step {number} is {step!r}, not a Step")
        check_step(step, f"schedule {name!r}, step {number}")
    _check_history(schedule)


def _check_history(schedule: Schedule) -> None:
    # For each selector the steps that computed it, for each branch: more than a model's site has, where an outer site
    # was reused.
    computed: dict[str, dict[str, list[int]]] = {text: {"cond": [], "uncond": []} for text in schedule.selectors}
    full = known = 0
    for number, step in enumerate(schedule.steps, 1):
        where = f"schedule {schedule.name!r}, step {number}"
        if step.branches == "cond" and full < (2 if step.previous else 1):
            alone = (
                "runs the conditional branch alone"
                if not full
                else f"adds {step.previous:g} of the difference before the newest"
            )
            raise ScheduleError(
                f"{where} {alone}, but {full or 'no'} earlier step{' ran' if full != 1 else ' alone ran'} both; let "
                f"{'step 1' if not full else 'two steps before it'} run 'both'"
            )
        if step.terms is not None and len(step.terms.taps) > known:
            raise ScheduleError(
                f"{where} is made of {len(step.terms.taps)} predictions, but only {known} steps before it ran; let "
                f"{len(step.terms.taps)} steps run first"
            )
        branches = {"both": ("cond", "uncond"), "cond": ("cond",), "none": ()}[step.branches]
        for text, steps in computed.items():
            if text in step.reuse:
                _check_sources(where, text, step, [steps[branch] for branch in branches])
            else:
                for branch in branches:
                    steps[branch].append(number)
        full += step.branches == "both"
        known += step.runs


def _check_sources(where: str, text: str, step: Step, computed: list[list[int]]) -> None:
    own = {selector.partition("@")[0]: taps for selector, taps in step.own_taps}
    needed = len(own.get(text, step.taps))
    if len(computed[0]) < needed:
        raise ScheduleError(
            f"{where} blends {needed} outputs of {text!r}, but only {len(computed[0])} were computed before; let "
            f"{needed} steps compute it first"
        )
    if len(computed) > 1 and computed[0][-needed:] != computed[1][-needed:]:
        raise ScheduleError(
            f"{where} runs both branches and reuses {text!r}, which steps {computed[0][-needed:]} computed for the "
            f"conditional branch and {computed[1][-needed:]} for the other: the unconditional features are too old to "
            "extrapolate; let it compute every site (reuse: [])"
        )
