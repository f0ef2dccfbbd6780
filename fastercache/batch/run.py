"""A batch: what is there already, prompts handed to workers as they are free, videos put in their places."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fastercache.batch.jobs import BatchError, Folder, Job, settings_of
from fastercache.batch.pools import Died, Pool, Ready
from fastercache.batch.worker import Failed, Made, Setup
from fastercache.host import environment

TRIES = 3
"""How many workers may die of one prompt, or in a row under one number while they load."""
SAME = ("fastercache", "torch", "diffusers", "transformers")
"""Packages whose versions must be the same in every worker."""


@dataclass
class Result:
    """What a batch came to: names of the videos that were made, those that were there, and the errors of the others by
    name."""

    made: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def pending(jobs: Iterable[Job], folder: Folder, common: Mapping[str, Any], overwrite: bool) -> list[Job]:
    """The jobs whose videos are not complete; all of them with `overwrite`. `BatchError` for what is there of other
    settings."""
    return [job for job in jobs if overwrite or not folder.is_complete(job, settings_of(job, common))]


def run_batch(
    jobs: Sequence[Job],
    folder: Folder,
    setup: Setup,
    pool: Pool,
    common: Mapping[str, Any],
    *,
    overwrite: bool = False,
    screen: Console,
) -> Result:
    """Make the videos that are not there, and say how it goes.

    common: the settings that all of them share (`settings_of`). overwrite: make those that are there again.

    Raises:
        BatchError: a video of other settings is there, or the pipeline has no such argument, or no worker stays alive.
        Whatever loading the pipeline raises.
    """
    with closing(pool), folder.locked():
        wanted = pending(jobs, folder, common, overwrite)
        names = {job.name for job in wanted}
        result = Result(there=[job.name for job in jobs if job.name not in names])
        if wanted:
            workers = pool.start(setup, len(wanted))
            _Batch(wanted, folder, pool, workers, common, result, screen).run()
    return result


class _Batch:
    def __init__(
        self,
        wanted: Sequence[Job],
        folder: Folder,
        pool: Pool,
        workers: int,
        common: Mapping[str, Any],
        result: Result,
        screen: Console,
    ) -> None:
        self.wanted, self.folder, self.pool, self.common = wanted, folder, pool, common
        self.result, self.screen = result, screen
        self.queue, self.busy, self.idle = deque(wanted), dict[int, Job](), list[int]()
        self.loading = set(range(workers))
        self.deaths: dict[str, int] = {}
        self.dead_while_loading: dict[int, int] = {}
        self.begun: float | None = None
        self.said: set[str] = set()

    def run(self) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed} of {task.total} videos")
        with Progress(*columns, console=self.screen, transient=True) as self.bar:
            self.task = self.bar.add_task("loading", total=len(self.wanted))
            while self.queue or self.busy:
                event = self.pool.next()
                if isinstance(event, Died):
                    self._died(event)
                elif isinstance(event, Ready):
                    self._ready(event)
                else:
                    self._done(event.worker, event.outcome)
                while self.queue and self.idle:
                    worker, job = self.idle.pop(0), self.queue.popleft()
                    self.busy[worker] = job
                    self.pool.give(worker, job, settings_of(job, self.common))

    def _ready(self, event: Ready) -> None:
        about = event.about["worker"]
        if self.begun is None:
            self.begun = time.monotonic()
            self._check_arguments(event.about)
        here = environment.versions()
        for package in SAME:
            if event.about["versions"][package] != here[package]:
                raise BatchError(
                    f"worker {event.worker} on {about['host']} has {package} {event.about['versions'][package]}, this "
                    f"machine {here[package]}; install the same version on all"
                )
        self.dead_while_loading.pop(event.worker, None)
        self.loading.discard(event.worker)
        self.idle.append(event.worker)
        threads = f", {about['threads']} thread{'s' * (about['threads'] > 1)}" if about["device"] == "cpu" else ""
        self._say(
            f"worker {event.worker} is ready: process {about['pid']} on {about['host']}, {about['device']}{threads}"
        )

    def _check_arguments(self, about: Mapping[str, Any]) -> None:
        known = {*about["arguments"], "frames"}
        for job in self.wanted:
            for name in job.arguments:
                if name not in known:
                    raise BatchError(
                        f"line {job.line}: {about['pipeline']} has no argument {name!r}; it has "
                        f"{', '.join(about['arguments'])}"
                    )

    def _done(self, worker: int, outcome: Made | Failed) -> None:
        job = self.busy.pop(worker)
        self.idle.append(worker)
        if isinstance(outcome, Failed):
            self._failed(job, outcome.error)
            return
        self.folder.publish(job, outcome.video, {**outcome.record, "tries": 1 + self.deaths.get(job.name, 0)})
        self.result.made.append(job.name)
        for warning in outcome.warnings:
            if warning not in self.said:
                self.said.add(warning)
                self._say(f"warning: {warning}", "yellow")
        self._say(
            f"{self.folder.video(job).name} in {outcome.record['seconds']:.1f} s by worker {worker}; {self._pace()}"
        )

    def _failed(self, job: Job, error: str) -> None:
        self.result.failed[job.name] = error
        self._say(f"line {job.line} ({job.name}) failed: {error}", "red")
        self._pace()

    def _died(self, event: Died) -> None:
        """Its job goes to the front of the queue, unless it has killed too many; another worker is started where there
        is work for it, unless too many died in a row before they were ready."""
        job = self.busy.pop(event.worker, None)
        if job is None:
            self.loading.discard(event.worker)
            deaths = self.dead_while_loading[event.worker] = self.dead_while_loading.get(event.worker, 0) + 1
            self._say(f"worker {event.worker} died while loading: {event.reason}", "yellow")
            if deaths >= TRIES:
                if not (self.idle or self.busy or self.loading):
                    raise BatchError(
                        f"{TRIES} workers in a row died while loading the pipeline: {event.reason}; if memory is "
                        "short, give fewer --workers"
                    )
                return
        else:
            deaths = self.deaths[job.name] = self.deaths.get(job.name, 0) + 1
            if deaths >= TRIES:
                self._failed(job, f"{deaths} workers died of it: {event.reason}")
            else:
                self.queue.appendleft(job)
                self._say(
                    f"worker {event.worker} died at line {job.line} ({job.name}), which the next free one makes: "
                    f"{event.reason}",
                    "yellow",
                )
        if len(self.queue) > len(self.idle) + len(self.loading):
            self.loading.add(event.worker)
            self.pool.restart(event.worker)

    def _pace(self) -> str:
        """Videos done, their rate, and the time left, for a line and the bar."""
        done = len(self.result.made) + len(self.result.failed)
        minutes = (time.monotonic() - (self.begun or time.monotonic())) / 60
        rate = done / minutes if minutes > 0 else 0.0
        left = round((len(self.wanted) - done) / rate * 60) if rate else 0
        text = f"{rate:.1f} a minute, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        self.bar.update(self.task, completed=done, description=text)
        return f"{done} of {len(self.wanted)}, {text}"

    def _say(self, text: str, style: str = "") -> None:
        self.screen.print(text, style=style, markup=False, soft_wrap=True)
