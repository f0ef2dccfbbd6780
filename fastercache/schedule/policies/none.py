"""No caching at all."""

from __future__ import annotations

from fastercache.schedule.policies.arguments import whole_number
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.step import Step


def none(steps: int, guidance: bool = True) -> Schedule:
    """Skip nothing: the model's own output, bit for bit."""
    return Schedule((Step(),) * whole_number("steps", steps), name="none")
