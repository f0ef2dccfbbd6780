"""Builders of published schedules: `policy(steps, guidance) -> Schedule`.

Each is a plain function whose keyword parameters are the method's; fix some with `functools.partial` and pass the result to
`fastercache.compile(..., schedule=...)`. Steps are numbered 1..N. Sources: FasterCache, arXiv 2410.19355 (equations and section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

from fastercache.errors import ScheduleError
from fastercache.presets import OPEN_SORA_MLP, RELEASED, Released
from fastercache.schedule import Schedule, Step

Policy: TypeAlias = Callable[[int, bool], Schedule]
"""Builds the schedule of a run of that many steps, with (`True`) or without classifier-free guidance."""


def paper(
    steps: int,
    guidance: bool = True,
    *,
    reuse_interval: int | None = 2,
    cfg_interval: int | None = 5,
    dynamic: bool = True,
    low_gain: float = 0.2,
    high_gain: float = 0.2,
    start: int | None = None,
    site: str = "attention",
    name: str = "paper",
) -> Schedule:
    """FasterCache as the paper describes it.

    With s = `start` (default: floor(N/3) + 1), a site is computed on every step up to s and then at s, s + `reuse_interval`, ...; between
    them it is extrapolated from its two newest computed outputs A and B as A + w (A - B), w(i) = (i - s) / (N - s) (Eq. 5).
    Guidance runs both branches up to s and then at s, s + `cfg_interval`, ...; between them the unconditional branch is rebuilt with
    w1 = 1 + `low_gain` in the first half of [s, N] and w2 = 1 + `high_gain` in the second (Eq. 9, 10). A step that runs both branches
    after s computes every site, because the unconditional features in the cache would be too old.

    reuse_interval, cfg_interval: `None` turns that half of the method off. dynamic: `False` reuses A unchanged (w = 0, one tap).
    """
    if steps < 1:
        raise ScheduleError(f"a run has at least one step, not {steps}")
    for label, interval in (("reuse_interval", reuse_interval), ("cfg_interval", cfg_interval)):
        if interval is not None and interval < 1:
            raise ScheduleError(f"{label} is {interval}; it must be at least 1, or None to turn it off")
    first = steps // 3 + 1 if start is None else start
    if first < 1:
        raise ScheduleError(f"start is {first}; steps are numbered from 1")
    middle = (first + steps) / 2
    taps_needed = 2 if dynamic else 1
    rows: list[Step] = []
    computed = 0
    for i in range(1, steps + 1):
        past = i - first
        single = guidance and cfg_interval is not None and past > 0 and past % cfg_interval != 0
        too_old = not single and any(row.branches == "cond" for row in rows)
        reuse = reuse_interval is not None and past > 0 and past % reuse_interval != 0 and computed >= taps_needed and not too_old
        w = past / (steps - first) if steps > first else 0.0
        rows.append(
            Step(
                branches="cond" if single else "both",
                reuse=(site,) if reuse else (),
                taps=() if not reuse else (1.0 + w, -w) if dynamic else (1.0,),
                low=1.0 + low_gain if single and i < middle else 1.0,
                high=1.0 + high_gain if single and i >= middle else 1.0,
            )
        )
        computed += not reuse
    return Schedule(tuple(rows), name=name)


def plain(steps: int, guidance: bool = True, *, reuse_interval: int | None = 2, cfg_interval: int | None = 5) -> Schedule:
    """The paper's schedule with plain reuse: a skipped site repeats its newest computed output (the paper's baseline in section 3)."""
    return paper(steps, guidance, reuse_interval=reuse_interval, cfg_interval=cfg_interval, dynamic=False, name="plain")


def cfg_only(steps: int, guidance: bool = True, *, cfg_interval: int = 5) -> Schedule:
    """CFG-Cache alone: every site is computed, the unconditional branch is rebuilt between full steps."""
    return paper(steps, guidance, reuse_interval=None, cfg_interval=cfg_interval, name="cfg-only")


def dynamic_only(steps: int, guidance: bool = True, *, reuse_interval: int = 2) -> Schedule:
    """Dynamic feature reuse alone: both branches run on every step, each extrapolates from its own cache."""
    return paper(steps, guidance, reuse_interval=reuse_interval, cfg_interval=None, name="dynamic-only")


def none(steps: int, guidance: bool = True) -> Schedule:
    """Skip nothing: the model's own output, bit for bit."""
    return Schedule((Step(),) * steps, name="none")


def released(steps: int, guidance: bool = True, *, rule: Released, name: str = "released") -> Schedule:
    """The schedule of an authors' script, with the branches kept apart.

    At the script's own number of calls the counters are its own; at another they are moved in proportion, and the intervals stay. Two
    things differ from the script, which blends features of one branch into the other: a call that runs both branches after single-branch
    calls have begun computes every site, and the multipliers of the stored differences are absolute numbers (their running products).
    """
    if steps < 1:
        raise ScheduleError(f"a run has at least one step, not {steps}")
    scale = steps / rule.calls

    def moved(counter: int) -> int:
        return rule.first + round((counter - rule.first) * scale)

    last = rule.first + steps - 1
    low = high = 1.0
    rows: list[Step] = []
    computed = 0
    for counter in range(rule.first, last + 1):
        full = counter < moved(rule.single_from) or counter % rule.full_every == 0 or (rule.last_full and counter == last)
        single = guidance and bool(rows) and not full
        low = low * (rule.low_gain if counter <= moved(rule.low_until) else 1.0) if single else 1.0
        high = high * (rule.high_gain if counter >= moved(rule.high_from) else 1.0) if single else 1.0
        w = None if rule.w_floor is None else max(rule.w_floor, rule.w_slope / scale * (counter - moved(rule.w_origin)))
        taps = (1.0,) if w is None else (1.0 + w, -w)
        too_old = not single and any(row.branches == "cond" for row in rows)
        asked = counter >= moved(rule.reuse_from) and counter % rule.compute_every != rule.compute_at
        reuse = asked and computed >= len(taps) and not too_old
        sites = ("attention",) if rule.plain_site is None else ("attention", rule.plain_site)
        rows.append(
            Step(
                branches="cond" if single else "both",
                reuse=sites if reuse else (),
                taps=taps if reuse else (),
                low=low,
                high=high,
                own_taps=((rule.plain_site, (1.0,)),) if reuse and rule.plain_site is not None else (),
            )
        )
        computed += not reuse
    return Schedule(tuple(rows), name=name, radius_divisor=rule.radius_divisor)


BY_NAME: dict[str, Policy] = {"paper": paper, "plain": plain, "cfg-only": cfg_only, "dynamic-only": dynamic_only, "none": none}
"""The policies that `fastercache.compile(schedule="...")` and the command line know by name."""

PRESETS: dict[str, Policy] = {
    **{f"{system}/paper": partial(paper, name=f"{system}/paper") for system in RELEASED},
    **{f"{system}/released": partial(released, rule=rule, name=f"{system}/released") for system, rule in RELEASED.items()},
    "hunyuan-video/paper": partial(paper, name="hunyuan-video/paper"),
    "open-sora-1.2/released-mlp": partial(released, rule=OPEN_SORA_MLP, name="open-sora-1.2/released-mlp"),
}
"""A system's name and `/paper`, `/released` or `/released-mlp`, known by name like the policies."""


def get(name: str) -> Policy:
    """The policy or preset of that name; `ScheduleError` lists the names."""
    known = BY_NAME | PRESETS
    if name not in known:
        raise ScheduleError(f"unknown policy {name!r}; known are {', '.join(known)} (or give a schedule's JSON file)")
    return known[name]


def resolve(schedule: Schedule | Policy | str | Path | None) -> Schedule | Policy:
    """What a user may name a schedule by: `None` (the paper's policy), a policy or its name, a `Schedule`, or the path of a JSON file."""
    if schedule is None:
        return paper
    if isinstance(schedule, Path) or (isinstance(schedule, str) and schedule.endswith(".json")):
        return Schedule.from_json(Path(schedule))
    if isinstance(schedule, str):
        return get(schedule)
    if isinstance(schedule, Schedule) or callable(schedule):
        return schedule
    raise ScheduleError(f"schedule is a {type(schedule).__name__}; pass a policy or its name, a Schedule, or the path of a JSON file")
