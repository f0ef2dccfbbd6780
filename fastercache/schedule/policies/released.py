"""The schedules in the scripts that the authors of FasterCache released."""

from __future__ import annotations

from fastercache.errors import ScheduleError
from fastercache.schedule.policies.arguments import whole_number
from fastercache.schedule.presets import Released
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.step import Step


def released(steps: int, guidance: bool = True, *, rule: Released, name: str = "released") -> Schedule:
    """The schedule of an authors' script, with the branches kept apart.

    At the script's own number of calls the counters are its own; at another they are moved in proportion, and the
    intervals stay. Two things differ from the script, which blends features of one branch into the other: a call that
    runs both branches after single-branch calls have begun computes every site, and the multipliers of the stored
    differences are absolute numbers (their running products).
    """
    whole_number("steps", steps)
    if not isinstance(rule, Released):
        raise ScheduleError(
            f"rule is {rule!r}; pass one of fastercache.schedule.presets.RELEASED, as in RELEASED['latte']"
        )
    scale = steps / rule.calls

    def moved(counter: int) -> int:
        return rule.first + round((counter - rule.first) * scale)

    last = rule.first + steps - 1
    low = high = 1.0
    rows: list[Step] = []
    computed = 0
    for counter in range(rule.first, last + 1):
        full = (
            counter < moved(rule.single_from) or counter % rule.full_every == 0 or (rule.last_full and counter == last)
        )
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
