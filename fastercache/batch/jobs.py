"""The list of prompts and the folder of videos, without torch: what is asked for, what is there already, and how a
video gets there whole."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastercache.errors import FasterCacheError
from fastercache.schedule.document import object_of

Names = Literal["line", "vbench"]
MOST_SEED = 2**63 - 1
LONGEST_NAME = 200
"""Bytes of a file's name without its suffix; file systems take 255 with suffix and all."""
OURS: Mapping[str, str] = {
    "generator": "give a seed",
    "output_type": "videos are written as files",
    "return_dict": "leave it out",
    "num_videos_per_prompt": "write a line for each video, with a seed of its own",
    "num_images_per_prompt": "write a line for each video, with a seed of its own",
    "callback_on_step_end": "leave it out",
    "callback_on_step_end_tensor_inputs": "leave it out",
}
"""Arguments of a pipeline's call that a line cannot give, and what to do instead."""


class BatchError(FasterCacheError, ValueError):
    """A list of prompts, a folder of videos or a cluster that is not as it must be."""


@dataclass(frozen=True)
class Job:
    """A video to make.

    line: of the list, from 1. name: of the video's file, without suffix. arguments: of the pipeline's call, by its own
        names; "frames" stands for whatever it calls the number of frames.
    """

    line: int
    name: str
    prompt: str
    seed: int
    arguments: Mapping[str, Any] = field(default_factory=dict)


def read_jobs(
    path: Path,
    *,
    names: Names = "line",
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    check: Callable[[Job], None] = lambda job: None,
) -> list[Job]:
    """The videos that a JSONL file asks for, one a line; blank lines are passed over.

    A line is an object with "prompt", and as it likes "name", "seed", and arguments of the pipeline's call.

    names: of the files of lines without "name": their number in four digits, or as VBench has them, `prompt-index`,
        with the index of a prompt's lines from 0.
    seed, arguments: for the lines that give none.
    check: called with each job; what it raises is reported with the line's number.

    Raises:
        BatchError: a line cannot be read or lacks what it needs, two lines have one name, or the list is empty. It
            names the line.
        OSError: the file cannot be read.
    """
    jobs: list[Job] = []
    lines_of: dict[str, int] = {}
    times: Counter[str] = Counter()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = _parsed(line)
            job = _job(entry, number, names, times, seed, arguments or {})
            check(job)
        except (FasterCacheError, ValueError) as error:
            raise BatchError(f"{path}, line {number}: {error}") from error
        if job.name in lines_of:
            raise BatchError(
                f"{path}, line {number}: its video would be {job.name!r} like that of line {lines_of[job.name]}; give "
                'one of them another "name"'
            )
        lines_of[job.name] = number
        jobs.append(job)
    if not jobs:
        raise BatchError(f'{path} has no prompts; give one a line, as in {{"prompt": "a panda", "seed": 1}}')
    return jobs


def _parsed(line: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number in JSON; give a finite one")

    try:
        entry = json.loads(line.decode(), object_pairs_hook=object_of, parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); write one object a line") from error
    if not isinstance(entry, dict):
        raise ValueError('not an object; write one a line, as in {"prompt": "a panda", "seed": 1}')
    return entry


def _job(
    entry: dict[str, Any], line: int, names: Names, times: Counter[str], seed: int, arguments: Mapping[str, Any]
) -> Job:
    prompt, seed = entry.pop("prompt", None), entry.pop("seed", seed)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'"prompt" is {json.dumps(prompt)}; give the text to show')
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= MOST_SEED:
        raise ValueError(f'"seed" is {json.dumps(seed)}; give a whole number from 0 to {MOST_SEED}')
    name = entry.pop("name", f"{prompt}-{times[prompt]}" if names == "vbench" else f"{line:04d}")
    if (
        not isinstance(name, str)
        or not name.strip()
        or name.startswith(".")
        or re.search(r"[/\\\x00-\x1f]", name)
        or len(name.encode()) > LONGEST_NAME
    ):
        raise ValueError(
            f"{json.dumps(name)} cannot name a file: no slash, no control character, no dot in front, at most "
            f'{LONGEST_NAME} bytes; give another "name"'
        )
    times[prompt] += 1
    for key in entry:
        if key in OURS:
            raise ValueError(f"{key!r} cannot be given here; {OURS[key]}")
    steps = entry.get("num_inference_steps", 1)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f'"num_inference_steps" is {json.dumps(steps)}; give a whole number of at least 1')
    return Job(line, name, prompt, seed, {**arguments, **entry})


def settings_of(job: Job, common: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what a video shows, as plain data. common: what is the same for all of them."""
    return json.loads(
        json.dumps({**common, "prompt": job.prompt, "seed": job.seed, "arguments": dict(sorted(job.arguments.items()))})
    )


class Folder:
    """The folder of the videos: `name.mp4` with `name.json` beside it.

    A video is complete when both are there and the JSON has the size of the video; the JSON comes first. So whatever
    ends the command leaves complete videos and, at most, one that is made again.
    """

    def __init__(self, path: Path, suffix: str = ".mp4") -> None:
        self.path, self.suffix = path, suffix

    def video(self, job: Job) -> Path:
        return self.path / f"{job.name}{self.suffix}"

    def record(self, job: Job) -> Path:
        return self.path / f"{job.name}.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and keep other commands out of it. `BatchError` if one is at work there."""
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise BatchError(f"cannot write to {self.path}: {error.strerror or error}; give another --out") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BatchError(f"another batch is writing to {self.path}; wait for it, or give another --out") from (
                    error
                )
            yield

    def is_complete(self, job: Job, settings: Mapping[str, Any]) -> bool:
        """Whether the video is there, whole and of these settings; `False` if it is to be made (again).

        Raises:
            BatchError: something else has its name: a video of other settings, or a file that no batch wrote.
        """
        video, record = self.video(job), self.record(job)
        if not video.exists() and not record.exists():
            return False
        remedy = "give another --out or name, or make it again with --overwrite"
        try:
            found = json.loads(record.read_text())
            made, size, there = dict(found["settings"]), int(found["video_bytes"]), self.path / found["video"]
        except FileNotFoundError:
            raise BatchError(f"{video} is there without its JSON, so no batch wrote it; {remedy}") from None
        except (ValueError, TypeError, KeyError, IsADirectoryError):
            raise BatchError(f"{record} was not written by a batch; {remedy}") from None
        if not there.exists() or there.stat().st_size != size:
            return False
        if made != settings:
            raise BatchError(f"{video} was made with {difference(made, settings)}; {remedy}")
        return True

    def publish(self, job: Job, video: bytes, record: Mapping[str, Any]) -> None:
        """Put a video and its JSON in their places, each whole, the JSON first."""
        self.video(job).unlink(missing_ok=True)
        document = {"video": self.video(job).name, "video_bytes": len(video), **record}
        write_whole(self.record(job), (json.dumps(document, indent=1) + "\n").encode())
        write_whole(self.video(job), video)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place, then put it there: an interruption leaves the old one or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def difference(made: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The first setting in which two differ, in words."""
    one, other = ({**settings, **settings.get("arguments", {}), "arguments": None} for settings in (made, asked))
    for name in dict.fromkeys([*other, *one]):
        if one.get(name) != other.get(name):
            old, new = (json.dumps(settings[name]) if name in settings else "none" for settings in (one, other))
            return f"{name} {_short(old)}, not {_short(new)}"
    return "other settings"


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
