"""One worker: a pipeline, loaded and compiled once, that makes one video after another."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastercache
from fastercache import demo, sampling
from fastercache.batch.jobs import Job
from fastercache.errors import FasterCacheError, FasterCacheWarning
from fastercache.host import environment, steady
from fastercache.schedule.policies import Policy
from fastercache.schedule.schedule import Schedule


@dataclass(frozen=True)
class Setup:
    """How a worker loads and compiles its pipeline.

    schedule: `None` for what the pipeline carries, or the paper's. device: "cpu" or "cuda". threads: of torch on the
    CPU; `None` leaves them as they are. suffix: of the videos. options: of `fastercache.compile`.
    """

    pipeline: str
    schedule: Schedule | Policy | None
    device: str
    dtype: torch.dtype
    threads: int | None = None
    suffix: str = ".mp4"
    download: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """A video: the bytes of its file, and what goes into the JSON beside it. warnings: for whoever started the
    batch."""

    video: bytes
    record: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """A prompt that raised an error, as text."""

    error: str


class WorkerError(FasterCacheError, RuntimeError):
    """A worker that can make no more videos, though its process lives: its GPU answers every call with an error."""


class Worker:
    """Loads nothing until `load`, so that what goes wrong there comes back as an error and not as a dead worker."""

    def load(self, setup: Setup) -> dict[str, Any]:
        """Load and compile the pipeline; what the worker is, and the arguments that its pipeline's call has."""
        self.setup = setup
        if setup.device == "cpu":
            steady.steady_allocator()
            if setup.threads is not None:
                torch.set_num_threads(setup.threads)
        self.pipe = sampling.load(setup.pipeline, setup.dtype, setup.download).to(setup.device)
        fastercache.compile(self.pipe, setup.schedule, **setup.options)
        self.warm = setup.options.get("backend") is None
        call = sampling.parameters(self.pipe)
        return {
            "worker": self._about(),
            "versions": environment.versions(),
            "pipeline": type(self.pipe).__name__,
            "arguments": sorted(name for name in call if name not in ("self", "args", "kwargs")),
        }

    def make(self, job: Job, settings: Mapping[str, Any]) -> Made | Failed:
        """Make a video. An exception is the prompt's, and the next one finds the worker clean; but for `WorkerError`.

        settings: go into the JSON as they are.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FasterCacheWarning)
            try:
                video, record = self._made(job)
            except Exception as error:  # whatever a pipeline raises about what a line asked for
                self._check_device()
                fastercache.release(self.pipe)
                kind = "" if isinstance(error, FasterCacheError) else f"{type(error).__name__}: "
                return Failed(kind + sampling.first_line(error))
        said = tuple(str(one.message) for one in caught if issubclass(one.category, FasterCacheWarning))
        return Made(
            video, {"prompt": job.prompt, "seed": job.seed, **record, "warnings": said, "settings": settings}, said
        )

    def _check_device(self) -> None:
        """After an error: give back what it left on the GPU. `WorkerError` if the GPU is of no more use to this
        process, as after an illegal access: the next prompts would all fail of it."""
        if self.setup.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise WorkerError(f"the GPU is lost to this process: {sampling.first_line(error)}") from error

    def _made(self, job: Job) -> tuple[bytes, dict[str, Any]]:
        from fastercache.report import media

        asked = dict(job.arguments)
        frames = asked.pop("frames", None)
        arguments = sampling.arguments(self.pipe, frames=frames, **asked)
        fixed = len(self.setup.schedule) if isinstance(self.setup.schedule, Schedule) else None
        default = fixed or sampling.default(self.pipe, "num_inference_steps") or sampling.STEPS
        steps = arguments.pop("num_inference_steps", default)
        if not self.warm:
            fastercache.warmup(self.pipe, job.prompt, progress=False, num_inference_steps=steps, **arguments)
            self.warm = True
        clip, seconds = demo.generate(
            self.pipe, job.prompt, steps=steps, seed=job.seed, on_step=lambda: None, **arguments
        )
        summary = fastercache.summary(self.pipe)
        pixels = np.ascontiguousarray(clip)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"video{self.setup.suffix}"
            media.save(file, media.to_bytes(pixels))
            video = file.read_bytes()
        return video, {
            "schedule": summary.schedule,
            "steps": steps,
            "seconds": round(seconds, 3),
            "finished": time.time(),
            "frames": {
                "shape": list(pixels.shape),
                "dtype": str(pixels.dtype),
                "sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
            },
            "worker": self._about(),
            "versions": environment.versions(),
            "summary": summary.as_dict(),
        }

    def _about(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": torch.cuda.get_device_name() if self.setup.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        }
