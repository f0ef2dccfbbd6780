"""What a calibrated schedule was made for: the model, the sampler and the shape of the runs that its coefficients were
fitted on.

Fitted coefficients hold for such runs alone. A run has a signature, too, and what differs is told in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from fastercache.errors import ScheduleError
from fastercache.schedule.document import checked_count, checked_list, checked_number, checked_text, only_known

SIGMA_TOLERANCE = 1e-3
"""Relative difference of two sigmas that count as the same: they are kept rounded, and devices round differently."""


class Differences(NamedTuple):
    """Between a signature and that of a run, in words. wrong: with these the coefficients do not belong to the run's
    steps. doubtful: with these the measured figures need not hold."""

    wrong: tuple[str, ...] = ()
    doubtful: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Of a run. What is `None` is not known, as of a denoiser without a pipeline, and is not compared. Checked on
    construction, by `ScheduleError`.

    steps: steps of the sampler. model: the denoiser's class; the first one's where two experts share the steps.
    config: a hash of its configuration. weights: a hash of some of its weights, without adapters.
    adapters: names and scales of those that are active, in order of names; empty without any.
    scheduler: the sampler's class. scheduler_config: a hash of its configuration.
    sigmas: its noise levels at the steps, or its timesteps where it has no such levels, rounded to five digits.
    shape: of the latents as the denoiser is given them, without the batch.
    guidance: the scale, one for each expert where there are two; 1 where the run has one branch.
    dtype: of the model's results. cache_format: how those of sites are stored.
    """

    steps: int
    model: str | None = None
    config: str | None = None
    weights: str | None = None
    adapters: tuple[tuple[str, float], ...] | None = None
    scheduler: str | None = None
    scheduler_config: str | None = None
    sigmas: tuple[float, ...] | None = None
    shape: tuple[int, ...] | None = None
    guidance: tuple[float, ...] | None = None
    dtype: str | None = None
    cache_format: str | None = None

    def __post_init__(self) -> None:
        checked_count(self.steps, "made_for: steps")
        for name in ("model", "config", "weights", "scheduler", "scheduler_config", "dtype", "cache_format"):
            if getattr(self, name) is not None:
                checked_text(getattr(self, name), f"made_for: {name}")
        checks: tuple[tuple[str, Callable[[Any, str], Any]], ...] = (
            ("sigmas", checked_number),
            ("guidance", checked_number),
            ("shape", checked_count),
        )
        for name, check in checks:
            if (value := getattr(self, name)) is not None:
                listed = checked_list(value, f"made_for: {name}")
                for each in listed:
                    check(each, f"made_for: {name}")
                object.__setattr__(self, name, listed)
        if self.adapters is not None:
            pairs = checked_list(self.adapters, "made_for: adapters")
            object.__setattr__(self, "adapters", tuple(sorted(map(_adapter, pairs))))

    @property
    def guided(self) -> bool | None:
        """Whether its run has two branches; `None` where that is not known."""
        return None if self.guidance is None else any(scale != 1 for scale in self.guidance)

    def differences(self, run: Signature) -> Differences:
        """What of a run's signature differs from this one, the signature of the runs that a schedule was made for."""
        wrong, doubtful = [], []
        if run.steps != self.steps:
            wrong.append(f"its steps are {run.steps}, not {self.steps}")
        if _differ(self.scheduler, run.scheduler):
            wrong.append(f"its scheduler is {run.scheduler}, not {self.scheduler}")
        if _differ(self.model, run.model):
            doubtful.append(f"its model is {run.model}, not {self.model}")
        else:
            if _differ(self.config, run.config):
                doubtful.append("its model has another configuration")
            # Weights of another dtype are rounded, and a hash of them tells nothing.
            elif self.dtype == run.dtype and _differ(self.weights, run.weights):
                doubtful.append("its model has other weights")
        if _differ(self.adapters, run.adapters):
            doubtful.append(f"its adapters are {_named(run.adapters)}, not {_named(self.adapters)}")
        if not wrong:
            if _differ(self.scheduler_config, run.scheduler_config):
                doubtful.append("its scheduler has another configuration")
            if (apart := _first_apart(self.sigmas, run.sigmas)) is not None:
                number, found, made = apart
                doubtful.append(f"its sigmas differ from step {number} on, {found:g} there and not {made:g}")
        for name, what in (("shape", "latents are"), ("guidance", "guidance is")):
            made, found = getattr(self, name), getattr(run, name)
            if _differ(made, found):
                doubtful.append(f"its {what} {_listed(found, name)}, not {_listed(made, name)}")
        if _differ(self.dtype, run.dtype):
            doubtful.append(f"its dtype is {run.dtype}, not {self.dtype}")
        if _differ(self.cache_format, run.cache_format):
            doubtful.append(f"its caches are stored as {run.cache_format!r}, not {self.cache_format!r}")
        return Differences(tuple(wrong), tuple(doubtful))

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it: what is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Signature:
        """Of a JSON object; `ScheduleError`, which begins with `where`, says what is missing, unknown or wrong."""
        if not isinstance(values, dict):
            raise ScheduleError(f"{where}: 'made_for' is {values!r}, not an object")
        only_known(values, cls.__dataclass_fields__, f"{where}, made_for,")
        if "steps" not in values:
            raise ScheduleError(f"{where}: 'made_for' lacks 'steps'")
        try:
            return cls(**values)
        except ScheduleError as error:
            raise ScheduleError(f"{where}, {error}") from error


def _adapter(pair: Any) -> tuple[str, float]:
    listed = checked_list(pair, "made_for: adapters")
    if len(listed) != 2:
        raise ScheduleError(f"made_for: adapters has {listed!r}; each must be [name, scale]")
    return checked_text(listed[0], "made_for: an adapter's name"), checked_number(listed[1], "made_for: a scale")


def _differ(made: Any, found: Any) -> bool:
    return made is not None and found is not None and made != found


def _first_apart(made: tuple[float, ...] | None, found: tuple[float, ...] | None) -> tuple[int, float, float] | None:
    """The number of the first step whose sigmas differ by more than rounding, and the two."""
    for number, (ours, theirs) in enumerate(zip(made or (), found or (), strict=False), 1):
        if not math.isclose(ours, theirs, rel_tol=SIGMA_TOLERANCE, abs_tol=1e-6):
            return number, theirs, ours
    return None


def _named(adapters: tuple[tuple[str, float], ...] | None) -> str:
    return ", ".join(f"{name} at {scale:g}" for name, scale in adapters or ()) or "none"


def _listed(values: tuple[float, ...], name: str) -> str:
    return (" x " if name == "shape" else " and ").join(f"{value:g}" for value in values)
