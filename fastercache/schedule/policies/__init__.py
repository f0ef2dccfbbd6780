"""Policies: builders of schedules, `policy(steps, guidance) -> Schedule`, one published method a file.

Each is a plain function whose keyword parameters are the method's; fix some with `functools.partial` and pass the
result to `fastercache.compile(..., schedule=...)`. Steps are numbered 1..N.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

from fastercache.errors import ScheduleError
from fastercache.schedule.carried import Carried
from fastercache.schedule.policies.fastercache import cfg_only, dynamic_only, paper, plain
from fastercache.schedule.policies.fora import fora
from fastercache.schedule.policies.given import given
from fastercache.schedule.policies.magcache import magcache
from fastercache.schedule.policies.none import none
from fastercache.schedule.policies.pab import pab
from fastercache.schedule.policies.released import released
from fastercache.schedule.policies.taylorseer import taylorseer
from fastercache.schedule.policies.teacache import teacache
from fastercache.schedule.policies.uniform import uniform
from fastercache.schedule.presets import OPEN_SORA_MLP, RELEASED
from fastercache.schedule.schedule import Schedule

__all__ = [
    "BY_NAME",
    "PRESETS",
    "Policy",
    "built",
    "cfg_only",
    "dynamic_only",
    "fora",
    "get",
    "given",
    "magcache",
    "means_to_skip",
    "none",
    "pab",
    "paper",
    "plain",
    "register",
    "released",
    "resolve",
    "taylorseer",
    "teacache",
    "uniform",
]

Policy: TypeAlias = Callable[[int, bool], Schedule]
"""Builds the schedule of a run of that many steps, with (`True`) or without classifier-free guidance."""

BY_NAME: dict[str, Policy] = {
    "paper": paper,
    "plain": plain,
    "cfg-only": cfg_only,
    "dynamic-only": dynamic_only,
    "fora": fora,
    "pab": pab,
    "taylorseer": taylorseer,
    "uniform": uniform,
    "none": none,
}
"""The policies that `fastercache.compile(schedule="...")` and the command line know by name."""
_WITH_ARGUMENTS = {"given": "computed", "magcache": "ratios", "released": "rule", "teacache": "changes"}
"""Policies that cannot go by name, and the argument that each needs."""

PRESETS: dict[str, Policy] = {
    **{f"{system}/paper": partial(paper, name=f"{system}/paper") for system in RELEASED},
    **{
        f"{system}/released": partial(released, rule=rule, name=f"{system}/released")
        for system, rule in RELEASED.items()
    },
    "hunyuan-video/paper": partial(paper, name="hunyuan-video/paper"),
    "open-sora-1.2/released-mlp": partial(released, rule=OPEN_SORA_MLP, name="open-sora-1.2/released-mlp"),
}
"""A system's name and `/paper`, `/released` or `/released-mlp`, known by name like the policies."""


def get(name: str) -> Policy:
    """The policy or preset of that name; `ScheduleError` lists the names."""
    known = BY_NAME | PRESETS
    if name not in known and name in _WITH_ARGUMENTS:
        argument = _WITH_ARGUMENTS[name]
        raise ScheduleError(
            f"policy {name!r} needs {argument}; pass functools.partial(fastercache.policies.{name}, {argument}=...)"
        )
    if name not in known:
        raise ScheduleError(f"unknown policy {name!r}; known are {', '.join(known)} (or give a schedule's JSON file)")
    return known[name]


def resolve(schedule: Schedule | Policy | str | Path | None) -> Schedule | Policy:
    """What a user may name a schedule by: `None` (the paper's policy), a policy or its name, a `Schedule`, or the path
    of a JSON file.
    """
    if schedule is None:
        return paper
    if isinstance(schedule, Path) or (isinstance(schedule, str) and schedule.endswith(".json")):
        return Schedule.from_json(Path(schedule))
    if isinstance(schedule, str):
        return get(schedule)
    if isinstance(schedule, Schedule):
        return schedule
    if callable(schedule):
        return _callable_so(getattr(schedule, "__name__", None) or repr(schedule), schedule)
    raise ScheduleError(
        f"schedule is a {type(schedule).__name__}; pass a policy or its name, a Schedule, or the path of a JSON file"
    )


def register(name: str, policy: Policy) -> None:
    """Make a policy known by name to `fastercache.compile` and the command line.

    Raises:
        ScheduleError: the name is taken, or looks like a file's, or the policy cannot be called with a step count and
        guidance.
    """
    if not isinstance(name, str) or not name or name.endswith(".json"):
        raise ScheduleError(
            f"a policy's name is {name!r}; it must be text that does not end in .json, which would be a file's"
        )
    if name in BY_NAME | PRESETS or name in _WITH_ARGUMENTS:
        raise ScheduleError(f"a policy named {name!r} is known already; choose another name")
    BY_NAME[name] = _callable_so(repr(name), policy)


def _callable_so(name: str, policy: Policy) -> Policy:
    """The policy itself, if it can be called as policies are."""
    try:
        inspect.signature(policy).bind(50, True)
    except TypeError as error:
        raise ScheduleError(
            f"policy {name} cannot be called as policy(steps, guidance): {error}; functools.partial gives it its other "
            "arguments"
        ) from error
    except ValueError:  # some callables tell no signature
        pass
    return policy


def means_to_skip(schedule: Schedule | Policy) -> bool:
    """Whether a schedule is there to skip: whether it does at 120 steps, which are enough for any policy that skips at
    all.

    A policy that is made for another number of steps, as where it was given a list of so many numbers, is taken to. One
    that fails with the same words at any number of steps fails here.
    """
    if isinstance(schedule, Schedule):
        return not schedule.skips_nothing
    try:
        result = schedule(120, True)
    except ScheduleError as error:
        try:
            schedule(119, True)
        except ScheduleError as other:
            if str(other) == str(error):
                raise
        return True
    return not _checked(schedule, 120, result).skips_nothing


def built(schedule: Schedule | Policy, steps: int, guidance: bool, scheduler: str | None = None) -> Schedule:
    """The schedule of a run of that many steps: the policy's, or the one given whatever its length.

    scheduler: the class of the pipeline's, by which carried schedules are chosen, too.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, Carried):
        return schedule(steps, guidance, scheduler)
    return _checked(schedule, steps, schedule(steps, guidance))


def _checked(policy: Policy, steps: int, result: Schedule) -> Schedule:
    if not isinstance(result, Schedule):
        name = getattr(policy, "__name__", repr(policy))
        raise ScheduleError(
            f"policy {name} returned a {type(result).__name__} for {steps} steps; it must return a fastercache.Schedule"
        )
    return result
