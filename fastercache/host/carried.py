"""Where carried schedules (`fastercache.schedule.carried`) are found: beside a local pipeline, and on the Hugging Face
hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastercache.errors import ScheduleError
from fastercache.schedule import policies
from fastercache.schedule.carried import INDEX, Carried, named_in
from fastercache.schedule.policies import Policy, paper
from fastercache.schedule.schedule import Schedule

FOLDER = "schedules"
"""Beside a pipeline's `model_index.json`."""
HUB_NAME = r"[\w.-]+/[\w.-]+"


def of_pipeline(pipeline: Any) -> Carried | None:
    """The schedules that the directory carries which a pipeline was loaded from, `None` where it carries none.

    A folder without an index is taken to be something else. Where none of them fits a run, it is the paper's that runs.
    """
    source = getattr(getattr(pipeline, "config", None), "_name_or_path", None)
    if not isinstance(source, str | Path) or not (Path(source) / "model_index.json").is_file():
        return None
    folder = Path(source) / FOLDER
    return Carried.read(folder, str(folder), paper) if (folder / INDEX).is_file() else None


def resolve(
    schedule: Schedule | Policy | str | Path | None, pipeline: Any = None, *, download: bool = False
) -> Schedule | Policy:
    """What a user may name a schedule by: as `policies.resolve` has it, a folder of schedules as calibration leaves it,
    a repository on the hub, a file in one, or `None` for what a pipeline carries, else the paper's policy."""
    if schedule is None:
        return (None if pipeline is None else of_pipeline(pipeline)) or paper
    known = isinstance(schedule, str) and schedule in policies.BY_NAME | policies.PRESETS
    if isinstance(schedule, str | Path) and not known and Path(schedule).is_dir():
        if not (Path(schedule) / INDEX).is_file():
            raise ScheduleError(
                f"{str(schedule)!r} is a folder without an {INDEX} of schedules; give one that fastercache calibrate "
                "left, or a schedule's JSON file"
            )
        return Carried.read(Path(schedule), str(schedule), None)
    if isinstance(schedule, str) and schedule not in policies.BY_NAME | policies.PRESETS:
        match = re.fullmatch(rf"({HUB_NAME})(?:/(.+\.json))?", schedule)
        if match and not Path(schedule).exists() and (match[2] or not schedule.endswith(".json")):
            return _of_repository(match[1], match[2], download)
    return policies.resolve(schedule)


def _of_repository(repository: str, file: str | None, download: bool) -> Schedule | Policy:
    """A schedule in a repository, or all that it carries, from the hub's cache on this machine, or downloaded."""
    if file is not None:
        return Schedule.from_json(_fetched(repository, (file,), download))
    index = _fetched(repository, (f"{FOLDER}/{INDEX}", INDEX), download)
    folder = f"{FOLDER}/" if index.parent.name == FOLDER else ""
    for name in dict.fromkeys(name for names in named_in(index).values() for name in names):
        _fetched(repository, (folder + name,), download)
    return Carried.read(index.parent, repository, None)


def _fetched(repository: str, files: tuple[str, ...], download: bool) -> Path:
    """Where the first of some files lies on this machine; `ScheduleError` if none does, or can be had."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    reason: Exception | None = None
    for file in files:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file, local_files_only=not download))
        except (EntryNotFoundError, OSError, ValueError) as error:
            reason = error
    what = " or ".join(files)
    if download:
        first = (str(reason).strip().splitlines() or [type(reason).__name__])[0]
        raise ScheduleError(f"{what} of the repository {repository} cannot be downloaded: {first}") from reason
    known = ", ".join(policies.BY_NAME | policies.PRESETS)
    raise ScheduleError(
        f"unknown policy {repository!r}; known are {known} (or give a schedule's JSON file). As a repository on the "
        f"Hugging Face hub it has no {what} on this machine; download=True, or --download, fetches it"
    ) from reason
