"""Schedules that lie together in a folder, as a pipeline directory carries them, and which of them fits a run.

The folder's `index.json` names, for each step count, a file or a list of files, of which the first that fits is chosen:

    {"format": "fastercache-schedules-1", "default": {"50": "calibrated-2x.json", "30": ["guided.json", "plain.json"]}}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastercache.errors import ScheduleError
from fastercache.schedule.document import object_of, only_known
from fastercache.schedule.schedule import Schedule

FORMAT = "fastercache-schedules-1"
INDEX = "index.json"


class Carried:
    """The schedules of a folder; a policy, which gives the one that fits a run.

    where: the folder, for messages. schedules: by their step count, in the order they are tried. otherwise: what runs
        where none fits, the paper's policy; `None` where that is an error. name: for people.
    """

    def __init__(
        self,
        where: str,
        schedules: Mapping[int, tuple[Schedule, ...]],
        otherwise: Callable[[int, bool], Schedule] | None,
    ):
        self.where, self.schedules, self.otherwise = where, schedules, otherwise
        self.name = f"of {where}"

    @classmethod
    def read(cls, folder: Path, where: str, otherwise: Callable[[int, bool], Schedule] | None) -> Carried:
        """Of a folder with an index; `ScheduleError` says what is wrong with the index or a schedule it names."""
        files = named_in(folder / INDEX)
        return cls(
            where,
            {steps: tuple(_read(folder / name, steps) for name in names) for steps, names in files.items()},
            otherwise,
        )

    def __call__(self, steps: int, guidance: bool, scheduler: str | None = None) -> Schedule:
        """The schedule of a run; scheduler: the class of its pipeline's, where it has one."""
        return self.choice(steps, guidance, scheduler)[0]

    def fitting(self, steps: int, guidance: bool, scheduler: str | None = None) -> Schedule | None:
        """The first that was made for such runs, or does not say what it was made for."""
        return next((one for one in self.schedules.get(steps, ()) if _fits(one, guidance, scheduler)), None)

    def choice(self, steps: int, guidance: bool, scheduler: str | None = None) -> tuple[Schedule, str]:
        """The schedule of a run, and a note for its summary."""
        found = self.fitting(steps, guidance, scheduler)
        if found is not None:
            figures = "" if found.measured is None else f": {found.measured}"
            return found, f"schedule {found.name!r} is carried by {self.where}{figures}"
        run = f"{steps} steps with{'' if guidance else 'out'} guidance{f' by {scheduler}' if scheduler else ''}"
        known = "; ".join(_described(one) for listed in self.schedules.values() for one in listed)
        none = f"no schedule in {self.where} fits a run of {run}; it has {known or 'none'}"
        if self.otherwise is None:
            raise ScheduleError(
                f"{none}. Make one for such runs with fastercache.calibrate, or compile with a policy, such as 'paper'"
            )
        schedule = self.otherwise(steps, guidance)
        return schedule, f"{none}; {schedule.name!r} ran instead"


def _fits(schedule: Schedule, guidance: bool, scheduler: str | None) -> bool:
    made_for = schedule.made_for
    if made_for is None:
        return True
    return made_for.guided in (None, guidance) and (
        None in (scheduler, made_for.scheduler) or made_for.scheduler == scheduler
    )


def _described(schedule: Schedule) -> str:
    made_for = schedule.made_for
    guided = None if made_for is None else made_for.guided
    with_guidance = "" if guided is None else " with guidance" if guided else " without guidance"
    by = "" if made_for is None or made_for.scheduler is None else f" by {made_for.scheduler}"
    return f"{schedule.name!r} for {len(schedule)} steps{with_guidance}{by}"


def index_of(files: Mapping[int, tuple[str, ...]]) -> str:
    """An index as JSON text: names of files by step count."""
    default = {str(steps): names[0] if len(names) == 1 else list(names) for steps, names in files.items()}
    return json.dumps({"format": FORMAT, "default": default}, indent=1) + "\n"


def named_in(path: Path) -> dict[int, tuple[str, ...]]:
    """The files that an index names, by step count; `ScheduleError` says what is wrong with it."""
    where = f"index of schedules {str(path)!r}"
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=object_of)
    except OSError as error:
        raise ScheduleError(f"{where} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ScheduleError(f"{where} is not JSON: {error}") from error
    form = f'{{"format": "{FORMAT}", "default": {{"50": "a-file.json"}}}}'
    if not isinstance(document, dict) or not isinstance(document.get("default"), dict):
        raise ScheduleError(f"{where} has no object 'default'; it must be as {form}")
    if document.get("format") != FORMAT:
        raise ScheduleError(f"{where} has format {document.get('format')!r}; this version reads {FORMAT!r}")
    only_known(document, ("format", "default"), where)
    return {_steps(key, where): _names(value, f"{where}, {key} steps,") for key, value in document["default"].items()}


def _steps(key: str, where: str) -> int:
    if not (key.isascii() and key.isdigit() and not key.startswith("0")):
        raise ScheduleError(f"{where} has {key!r} among its step counts; each must be a whole number of at least 1")
    return int(key)


def _names(value: Any, where: str) -> tuple[str, ...]:
    names = tuple(value) if isinstance(value, list) else (value,)
    for name in names:
        if not isinstance(name, str) or not name.endswith(".json") or Path(name).name != name or "\\" in name:
            raise ScheduleError(
                f"{where} names {name!r}; it must name a .json file in its own folder, or a list of such"
            )
    if not names:
        raise ScheduleError(f"{where} names no file")
    return names


def _read(path: Path, steps: int) -> Schedule:
    schedule = Schedule.from_json(path)
    made_for = len(schedule) if schedule.made_for is None else schedule.made_for.steps
    for found, has in ((len(schedule), "has"), (made_for, "was made for")):
        if found != steps:
            raise ScheduleError(
                f"schedule file {str(path)!r} {has} {found} steps, but its index names it for {steps}; put it under "
                f"{str(found)!r}"
            )
    return schedule
