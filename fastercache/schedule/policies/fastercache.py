"""FasterCache, as its paper describes it (arXiv 2410.19355, ICLR 2025), and each half of it alone."""

from __future__ import annotations

from fastercache.schedule.policies.arguments import finite, selectors, whole_number
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.step import Step


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

    With s = `start` (default: floor(N/3) + 1), a site is computed on every step up to s and then at s, s +
    `reuse_interval`, ...; between them it is extrapolated from its two newest computed outputs A and B as A + w (A -
    B), w(i) = (i - s) / (N - s) (Eq. 5). Guidance runs both branches up to s and then at s, s + `cfg_interval`, ...;
    between them the unconditional branch is rebuilt with w1 = 1 + `low_gain` in the first half of [s, N] and w2 = 1 +
    `high_gain` in the second (Eq. 9, 10). A step that runs both branches after s computes every site, because the
    unconditional features in the cache would be too old.

    reuse_interval, cfg_interval: `None` turns that half of the method off. dynamic: `False` reuses A unchanged (w = 0,
    one tap).
    """
    whole_number("steps", steps)
    for label, interval in (("reuse_interval", reuse_interval), ("cfg_interval", cfg_interval)):
        if interval is not None:
            whole_number(label, interval, "or None to turn it off")
    finite("low_gain", low_gain)
    finite("high_gain", high_gain)
    reused = selectors("site", (site,))
    first = steps // 3 + 1 if start is None else whole_number("start", start, "as steps are numbered from 1")
    middle = (first + steps) / 2
    taps_needed = 2 if dynamic else 1
    rows: list[Step] = []
    computed = 0
    for i in range(1, steps + 1):
        past = i - first
        single = guidance and cfg_interval is not None and past > 0 and past % cfg_interval != 0
        too_old = not single and any(row.branches == "cond" for row in rows)
        reuse = (
            reuse_interval is not None
            and past > 0
            and past % reuse_interval != 0
            and computed >= taps_needed
            and not too_old
        )
        w = past / (steps - first) if steps > first else 0.0
        rows.append(
            Step(
                branches="cond" if single else "both",
                reuse=reused if reuse else (),
                taps=() if not reuse else (1.0 + w, -w) if dynamic else (1.0,),
                low=1.0 + low_gain if single and i < middle else 1.0,
                high=1.0 + high_gain if single and i >= middle else 1.0,
            )
        )
        computed += not reuse
    return Schedule(tuple(rows), name=name)


def plain(
    steps: int, guidance: bool = True, *, reuse_interval: int | None = 2, cfg_interval: int | None = 5
) -> Schedule:
    """The paper's schedule with plain reuse: a skipped site repeats its newest computed output (the paper's baseline in
    section 3).
    """
    return paper(steps, guidance, reuse_interval=reuse_interval, cfg_interval=cfg_interval, dynamic=False, name="plain")


def cfg_only(steps: int, guidance: bool = True, *, cfg_interval: int = 5) -> Schedule:
    """CFG-Cache alone: every site is computed, the unconditional branch is rebuilt between full steps."""
    return paper(steps, guidance, reuse_interval=None, cfg_interval=cfg_interval, name="cfg-only")


def dynamic_only(steps: int, guidance: bool = True, *, reuse_interval: int = 2) -> Schedule:
    """Dynamic feature reuse alone: both branches run on every step, each extrapolates from its own cache."""
    return paper(steps, guidance, reuse_interval=reuse_interval, cfg_interval=None, name="dynamic-only")
