"""Where videos are made: in this process, or by actors of Ray, on this machine or on a cluster."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fastercache import sampling
from fastercache.batch.jobs import BatchError, Job
from fastercache.batch.worker import Failed, Made, Setup, Worker, WorkerError
from fastercache.host import environment, steady

PATIENCE = 5.0
"""Seconds that a cluster's port may take to answer."""
LONGEST_CHECK = 15.0
"""Seconds that a cluster may take to say that it is well: a second where it is. `ray.init` itself gives up after
minutes, and then ends the process."""


@dataclass(frozen=True)
class Ready:
    """A worker has loaded its pipeline, and is `about` (what `Worker.load` says)."""

    worker: int
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Done:
    """A worker has made a video, or a prompt has failed."""

    worker: int
    outcome: Made | Failed


@dataclass(frozen=True)
class Died:
    """A worker is gone."""

    worker: int
    reason: str


Event = Ready | Done | Died


class Pool(Protocol):
    """Workers, by their numbers from 0. device: what they compute on, known before they are started."""

    device: str

    def threads(self, asked: int | None) -> int | None:
        """Threads of each worker on the CPU; `None` leaves what torch has."""

    def start(self, setup: Setup, most: int) -> int:
        """Start the workers, at most so many; how many there are."""

    def restart(self, worker: int) -> None:
        """Start another in place of one that has died."""

    def give(self, worker: int, job: Job, settings: Mapping[str, Any]) -> None:
        """Give a worker that is ready, or done, its next video."""

    def next(self) -> Event:
        """Wait until something happens."""

    def close(self) -> None:
        """End the workers."""


class InProcess:
    """One worker, which is this process. Nothing happens until somebody waits for it."""

    def __init__(self, device: str = "auto") -> None:
        self.device = sampling.device_here(device)
        self.worker = Worker()
        self.events: deque[Any] = deque()

    def threads(self, asked: int | None) -> int | None:
        if self.device != "cpu":
            return None
        if asked is None:
            steady.choose_threads()
        return asked

    def start(self, setup: Setup, most: int) -> int:
        self.events.append(lambda: Ready(0, self.worker.load(setup)))
        return 1

    def restart(self, worker: int) -> None:
        raise AssertionError("this process is the worker, and lives")

    def give(self, worker: int, job: Job, settings: Mapping[str, Any]) -> None:
        self.events.append(lambda: Done(0, self.worker.make(job, settings)))

    def next(self) -> Event:
        return self.events.popleft()()

    def close(self) -> None:
        self.events.clear()


class RayPool:
    """Actors of Ray, one for each GPU, or as many as asked for.

    workers: how many; `None` is one for each GPU. address: of a cluster that runs, `host:port` or "auto" for this
        machine's; `None` starts Ray here, for as long as the pool is there.
    """

    def __init__(self, workers: int | None, address: str | None, device: str) -> None:
        try:
            self.ray = importlib.import_module("ray")
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise BatchError(
                'ray is not installed: pip install "fastercache[ray]", or leave out --workers and --ray for one process'
            ) from None
        self.address = address
        if address is not None:
            self._connect(address)
            gpus = int(self.ray.cluster_resources().get("GPU", 0))
            if device == "cuda" and not gpus:
                raise BatchError(f"--device cuda: the cluster at {address} has no GPU; leave the option out")
            self.device = ("cuda" if gpus else "cpu") if device == "auto" else device
        else:
            self.device = sampling.device_here(device)
            gpus = torch.cuda.device_count()
        if self.device == "cpu" and workers is None:
            raise BatchError("on the CPU, --ray needs --workers: say how many")
        self.workers = workers if workers is not None else gpus
        if self.device == "cuda" and self.workers > gpus:
            raise BatchError(f"--workers {self.workers}: there are {gpus} GPUs, and each worker takes one; give fewer")
        self.waiting: dict[Any, tuple[int, bool]] = {}
        self.actors: dict[int, Any] = {}

    def threads(self, asked: int | None) -> int | None:
        if self.device != "cpu":
            return None
        said = os.environ.get("OMP_NUM_THREADS", "")
        share = max(1, environment.cores() // self.workers) if self.address is None else 1
        return asked or (int(said) if said.isdigit() and int(said) else share)

    def _connect(self, address: str) -> None:
        if "://" in address:
            raise BatchError(
                f"--ray {address}: give host:port of the cluster's head, or start the command on a machine of the "
                "cluster with --ray auto"
            )
        if address != "auto":
            check_reachable(address)
        try:
            self.ray.init(address=address, **self._quiet())
        except (RuntimeError, OSError, ValueError, SystemExit) as error:
            raise unreachable(address, str(error).splitlines()[0] if str(error) else "no answer") from None

    def _quiet(self) -> dict[str, Any]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        return dict(logging_level="ERROR", log_to_driver=False)

    def start(self, setup: Setup, most: int) -> int:
        self.setup = setup
        cores = setup.threads or 1 if self.device == "cpu" else 1
        number = min(self.workers, most)
        if self.address is None:
            self.ray.init(address="local", num_cpus=number * cores, include_dashboard=False, **self._quiet())
        else:
            total = int(self.ray.cluster_resources().get("CPU", 0))
            if number * cores > total:
                raise BatchError(
                    f"{number} workers of {cores} cores each: the cluster at {self.address} has {total}; give fewer "
                    "--workers or --threads"
                )
        gpus = 1 if self.device == "cuda" else 0
        self.actor = self.ray.remote(Worker).options(num_cpus=cores, num_gpus=gpus, max_restarts=0)
        for worker in range(number):
            self.restart(worker)
        return number

    def restart(self, worker: int) -> None:
        self.actors[worker] = self.actor.remote()
        self.waiting[self.actors[worker].load.remote(self.setup)] = worker, True

    def give(self, worker: int, job: Job, settings: Mapping[str, Any]) -> None:
        self.waiting[self.actors[worker].make.remote(job, settings)] = worker, False

    def next(self) -> Event:
        (done, *_), _ = self.ray.wait(list(self.waiting), num_returns=1)
        worker, loading = self.waiting.pop(done)
        try:
            found = self.ray.get(done)
        except self.ray.exceptions.RayTaskError as error:  # the worker lives, and says what is wrong
            cause = error.cause if isinstance(getattr(error, "cause", None), Exception) else error
            if not isinstance(cause, WorkerError):
                raise cause from None
            return self._ended(worker, cause)
        except self.ray.exceptions.RayError as error:
            return self._ended(worker, error)
        return Ready(worker, found) if loading else Done(worker, found)

    def _ended(self, worker: int, error: Exception) -> Died:
        self.ray.kill(self.actors[worker])
        return Died(worker, sampling.first_line(error))

    def close(self) -> None:
        self.ray.shutdown()


def check_reachable(address: str) -> None:
    """`BatchError`, within seconds, if no cluster of Ray answers at `host:port`."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise BatchError(f"--ray {address}: give host:port, such as 10.0.0.1:6379, or auto for this machine's cluster")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise unreachable(address, error.strerror or str(error)) from None
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_CHECK)
    except subprocess.TimeoutExpired:
        raise unreachable(address, "something listens there that does not answer as Ray") from None
    if "AuthenticationError" in done.stderr:
        raise BatchError(
            f"the cluster of Ray at {address} asks for a token, and this process has none that it takes; set "
            "RAY_AUTH_MODE=token with the cluster's token, as Ray's page on token authentication says"
        )
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise unreachable(address, said[-1] if said else f"its health check ends with {done.returncode}")


def unreachable(address: str, reason: str) -> BatchError:
    return BatchError(
        f"cannot reach a cluster of Ray at {address}: {reason}; start one with `ray start --head`, or leave out "
        "--ray to use this machine"
    )
