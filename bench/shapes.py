"""Clips of the embedded pipelines for the whole-model benchmarks: held-out prompts and seeds, made in parallel, kept on
disk.

Every clip is one call of the pipeline with one prompt, as a user makes it. Clips are kept in chunks under
`runs/bench-shapes/`, in a folder whose name is a hash of all that they depend on, so an interrupted evaluation goes on
where it stopped and evaluations share clips. What does not run this package's engine (untouched pipelines at any step
count and with any sampler, and others' caching) depends on weights, package versions and settings alone.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import io
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import fastercache
from bench import peers, report
from fastercache import ops, policies, shapes, triton_kernels
from fastercache.host import environment, steady
from fastercache.report import metrics
from fastercache.schedule.policies import Policy
from fastercache.shapes.world import Scene

WORK = report.ROOT / "runs" / "bench-shapes"
FIRST_HELD_OUT_SEED = 10_000
"""Pair i samples from the noise of seed 10_000 + i. Training never samples from the pipeline; keep these seeds out of
any tuning of it."""
FIRST_CALIBRATION_SEED = 20_000
"""Calibration pair i samples from the noise of seed 20_000 + i."""
SCENE_STRIDE = 5
"""Coprime to the 16 and the 96 scenes: any run of consecutive pairs spreads over their words, and so many pairs cover
every scene."""
CHUNK = 4
"""Clips of one file, and of one unit of work."""
PSNR_CEILING = 100.0
"""In dB; stands for the infinite PSNR of equal clips, so that means stay finite."""


@dataclass(frozen=True)
class Pair:
    """What one clip is made from."""

    prompt: str
    seed: int


def held_out(pairs: int, pipeline: str = "shapes") -> list[Pair]:
    """The first so many evaluation pairs: prompts cycle over all scenes, every seed is new."""
    scenes = shapes.PIPELINES[pipeline].world.scenes
    return [Pair(scenes[i * SCENE_STRIDE % len(scenes)].prompt, FIRST_HELD_OUT_SEED + i) for i in range(pairs)]


def calibration_prompts(pipeline: str = "shapes") -> tuple[str, ...]:
    """The half of a pipeline's prompts that settings may be found on: a checkerboard over the words, so that each half
    has every word, and each word as often."""
    world = shapes.PIPELINES[pipeline].world
    words = (tuple(world.colours), tuple(world.shapes), tuple(world.directions), tuple(world.textures) or (None,))

    def parity(scene: Scene) -> int:
        named = (scene.colour, scene.shape, scene.direction, scene.texture)
        return sum(known.index(word) for known, word in zip(words, named, strict=True)) % 2

    return tuple(scene.prompt for scene in world.scenes if parity(scene) == 0)


def calibration(pairs: int, pipeline: str = "shapes") -> list[Pair]:
    """The first so many pairs that settings may be found on: `calibration_prompts` in turn, and seeds that no held-out
    pair has."""
    prompts = calibration_prompts(pipeline)
    return [Pair(prompts[i * SCENE_STRIDE % len(prompts)], FIRST_CALIBRATION_SEED + i) for i in range(pairs)]


@dataclass(frozen=True)
class Variant:
    """A way to make clips.

    schedule: JSON text, or `None` where this package's engine does not run. guided: `False` sets the guidance scale to
        1.
    cache_format: of the caches.
    pipeline: the embedded one that makes them.
    steps: of a run; `None` for as many as the evaluation has.
    sampler: a name in `SAMPLERS`; `None` for the pipeline's own.
    peer: somebody else's caching, as `bench.peers` has it.
    """

    name: str
    schedule: str | None = None
    guided: bool = True
    cache_format: str = "model"
    pipeline: str = "shapes"
    steps: int | None = None
    sampler: str | None = None
    peer: str | None = None

    def steps_of(self, steps: int) -> int:
        """Steps of its runs in an evaluation of that many."""
        return steps if self.steps is None else self.steps


SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
"""Classes of diffusers' samplers, and what is set beside the configuration of the pipeline's own."""

UNCACHED = Variant("uncached")
UNGUIDED = Variant("unguided", guided=False)


def cached(name: str, policy: Policy, steps: int, cache_format: str = "model") -> Variant:
    """The variant that runs a policy's schedule of that many steps. What the clips depend on is in the steps alone."""
    plain = replace(policy(steps, True), name="bench", made_for=None, measured=None)
    return Variant(name, plain.to_json(), cache_format=cache_format)


@dataclass(frozen=True)
class Clips:
    """frames: float32 `[n, frames, H, W, 3]` in [0, 1]. seconds: float64 `[n]`, each clip's wall time.

    facts: of a cached run: flops_ratio (uncached over cached, denoiser only), cache_bytes, and where this package's
        engine ran implementations of the ops. Otherwise empty.
    """

    frames: np.ndarray
    seconds: np.ndarray
    facts: dict[str, Any]


Kind = TypeVar("Kind")
Make = Callable[[Variant, int, Sequence[Pair], bool], Clips]
"""`make(variant, steps, pairs, with_facts)` generates clips."""


# ---- generation ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def pipeline(name: str = "shapes") -> Any:
    """A pipeline of this process, whose allocator it settles: page faults would be part of the seconds."""
    steady.steady_allocator()
    return shapes.load(name)


def call(pipe: Any, pair: Pair, steps: int, guidance_scale: float, pipeline: str = "shapes", **more: Any) -> np.ndarray:
    """One clip: float32 `[frames, H, W, 3]` in [0, 1]. more: other arguments of the pipeline's call."""
    options = {
        **shapes.PIPELINES[pipeline].call,
        **more,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "output_type": "np",
    }
    return pipe(pair.prompt, generator=torch.Generator().manual_seed(pair.seed), **options).frames[0]


@contextmanager
def sampled(pipe: Any, name: str | None) -> Iterator[None]:
    """The pipeline has that sampler inside the block, made from the configuration of its own."""
    if name is None:
        yield
        return
    import diffusers

    kind, changed = SAMPLERS[name]
    own = pipe.scheduler
    pipe.scheduler = getattr(diffusers, kind).from_config(dict(own.config) | changed)
    try:
        yield
    finally:
        pipe.scheduler = own


@contextmanager
def compiled(pipe: Any, schedule: str | None, cache_format: str = "model") -> Iterator[None]:
    """The pipeline runs the schedule inside the block, and is the untouched one after it."""
    if schedule is None:
        yield
        return
    fastercache.compile(pipe, fastercache.Schedule.from_json(schedule), cache_format=cache_format)
    try:
        yield
    finally:
        fastercache.restore(pipe)


def generate(variant: Variant, steps: int, pairs: Sequence[Pair], with_facts: bool) -> Clips:
    """Make clips with this process's pipeline. Counting FLOPs for the facts takes a second or two; of a peer, which
    decides as it runs, as long as a few clips."""
    pipe = pipeline(variant.pipeline)
    scale, own = guidance_scale(variant), variant.steps_of(steps)
    frames, seconds, facts = [], [], {}
    with ready(pipe, variant, own):
        for pair in pairs:
            start = time.perf_counter()
            clip = call(pipe, pair, own, scale, variant.pipeline)
            seconds.append(time.perf_counter() - start)
            if not np.isfinite(clip).all():
                raise FloatingPointError(f"the clip of {pair.prompt!r}, seed {pair.seed}, is not finite")
            frames.append(np.clip(clip, 0, 1).astype(np.float32))
        if with_facts and variant.schedule is not None:
            facts = run_facts(pipe)
        elif with_facts and variant.peer is not None:
            facts = peer_facts(pipe, variant, own, pairs[0])
    if with_facts and variant.peer is not None:
        alone = peers.counted(pipe.transformer, lambda: call(pipe, pairs[0], 2, scale, variant.pipeline))
        facts["flops_ratio"] = own * alone / 2 / facts.pop("flops")
    return Clips(np.stack(frames), np.asarray(seconds), facts)


@contextmanager
def ready(pipe: Any, variant: Variant, steps: int) -> Iterator[None]:
    """The pipeline is as a variant has it inside the block."""
    storage = variant.cache_format
    with (
        sampled(pipe, variant.sampler),
        compiled(pipe, variant.schedule, storage),
        peers.enabled(pipe, variant.peer, steps),
    ):
        yield


def peer_facts(pipe: Any, variant: Variant, steps: int, pair: Pair) -> dict[str, Any]:
    """Operations of a run of a peer that is enabled, and the most bytes that it keeps between two steps."""
    most = 0

    def look(pipe: Any, *_: Any) -> dict[str, Any]:
        nonlocal most
        most = max(most, peers.cache_bytes(pipe.transformer, pipe))
        return {}

    options = {"callback_on_step_end": look}
    found = peers.counted(
        pipe.transformer, lambda: call(pipe, pair, steps, guidance_scale(variant), variant.pipeline, **options)
    )
    return {"flops": found, "cache_bytes": most}


def guidance_scale(variant: Variant) -> float:
    return shapes.PIPELINES[variant.pipeline].guidance_scale if variant.guided else 1.0


def run_facts(pipe: Any) -> dict[str, Any]:
    """What `Clips.facts` holds, of the last run of a compiled pipeline."""
    summary = fastercache.summary(pipe)
    return {
        "flops_ratio": summary.flops.ratio,
        "cache_bytes": summary.cache_bytes,
        "implementations": summary.implementations,
    }


def in_turn(kinds: Sequence[Kind], number: int) -> list[Kind]:
    """The kinds in the order of a round of timed clips: another one begins each round, so that what slows the machine
    down for a while slows all of them."""
    first = number % len(kinds)
    return [*kinds[first:], *kinds[:first]]


# ---- the clips on disk -----------------------------------------------------------------------------------------------


def identity(variant: Variant, steps: int) -> dict[str, Any]:
    """All that a variant's clips depend on, but for the prompt and the seed. The variant's name is no part of it."""
    facts: dict[str, Any] = {
        "pipeline": _pipeline_hash(variant.pipeline),
        "frames": "float32",
        "steps": variant.steps_of(steps),
        "guidance_scale": guidance_scale(variant),
        "call": dict(shapes.PIPELINES[variant.pipeline].call),
    }
    facts["versions"] = {name: environment.version(name) for name in ("torch", "diffusers", "transformers")}
    if variant.schedule is not None:
        facts |= {
            "schedule": json.loads(variant.schedule),
            "cache_format": variant.cache_format,
            "code": _code_hash(),
            "ops": ops.implementations(),
        }
    if variant.sampler is not None:
        kind, changed = SAMPLERS[variant.sampler]
        facts["sampler"] = {"class": kind, **changed}
    if variant.peer is not None:
        package = peers.package_of(variant.peer)
        facts["peer"] = json.loads(variant.peer)
        facts["versions"][package] = environment.version(package)
    return facts


@functools.lru_cache
def _pipeline_hash(name: str) -> str:
    """Hash of every file of the pipeline: weights, configurations, tokenizer. The schedules beside them are no part of
    it."""
    digest, folder = hashlib.sha256(), shapes.PIPELINES[name].path
    schedules = folder / SCHEDULES
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and schedules not in path.parents):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


FAILED = "error.txt"
"""What a peer failed with, in the folder of its clips."""
SCHEDULES = "schedules"
"""The folder of a pipeline's calibrated schedules, inside its directory."""
NOT_RUNNING = ("shapes", "report", "calibration", "demo.py", "cli.py")
"""What of the package has no part in running a schedule; everything else decides what a clip looks like."""


@functools.lru_cache(maxsize=1)
def _code_hash() -> str:
    """Hash of the code that runs a schedule, as syntax trees: a changed comment does not cost the clips made so far."""
    package = Path(fastercache.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")) + sorted(Path(triton_kernels.__file__).parent.glob("*.py")):
        if path.parent == Path(triton_kernels.__file__).parent or path.relative_to(package).parts[0] not in NOT_RUNNING:
            digest.update(ast.dump(ast.parse(path.read_text())).encode())
    for path in sorted(package.glob("_ops*.so")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def folder_of(variant: Variant, steps: int, work: Path) -> Path:
    """Where a variant's clips lie; made on the first call, with `identity` written beside them."""
    facts = json.dumps(identity(variant, steps), indent=1, sort_keys=True)
    folder = work / hashlib.sha256(facts.encode()).hexdigest()[:16]
    if not (folder / "identity.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        report.write_whole(folder / "identity.json", facts.encode())
    return folder


def save(path: Path, clips: Clips, pairs: Sequence[Pair]) -> None:
    buffer = io.BytesIO()
    labels = json.dumps([asdict(pair) for pair in pairs])
    np.savez(buffer, frames=clips.frames, seconds=clips.seconds, facts=json.dumps(clips.facts), pairs=labels)
    report.write_whole(path, buffer.getvalue())


def holds(path: Path, pairs: Sequence[Pair]) -> bool:
    """Whether a file is there and has the clips of these pairs."""
    if not path.exists():
        return False
    with np.load(path) as stored:
        return json.loads(str(stored["pairs"])) == [asdict(pair) for pair in pairs]


def load(path: Path, pairs: Sequence[Pair]) -> Clips | None:
    """The clips of a file; `None` if there is none, or if it holds clips of other pairs."""
    if not holds(path, pairs):
        return None
    with np.load(path) as stored:
        return Clips(stored["frames"], stored["seconds"], json.loads(str(stored["facts"])))


@dataclass(frozen=True)
class Task:
    """One file to make. deadline: `time.time()` after which it is not begun."""

    variant: Variant
    steps: int
    pairs: tuple[Pair, ...]
    path: Path
    first: bool
    deadline: float

    def run(self, make: Make) -> float | None:
        """Make the file; returns the seconds it took, or `None` if the deadline had passed or a peer has failed.

        What a peer fails with is kept beside its clips, and it is not run again: it depends on what the clips do.
        """
        start, failed = time.time(), self.path.with_name(FAILED)
        if start > self.deadline or failed.exists():
            return None
        try:
            clips = make(self.variant, self.steps, self.pairs, self.first)
        except Exception as error:
            if self.variant.peer is None:
                raise
            report.write_whole(failed, peers.described_error(error).encode())
            return None
        save(self.path, clips, self.pairs)
        return time.time() - start


def _one_thread() -> None:
    torch.set_num_threads(1)


def collect(
    variants: Sequence[Variant], pairs: Sequence[Pair], steps: int, *, work: Path = WORK, **how: Any
) -> tuple[int, dict[str, Clips]]:
    """Clips of every variant for the same pairs, made as `make_clips` has it; `how`: its other arguments.

    Returns the number n of pairs for which every variant is there, and each variant's clips of the first n pairs, by
    its name.
    """
    n, failed = make_clips(variants, pairs, steps, work=work, **how)
    if failed:
        raise SystemExit("; ".join(f"{name}: {error}" for name, error in failed.items()))
    return n, {variant.name: kept(variant, pairs[:n], steps, work) for variant in variants}


def make_clips(
    variants: Sequence[Variant],
    pairs: Sequence[Pair],
    steps: int,
    *,
    work: Path = WORK,
    processes: int | None = None,
    minutes: float | None = None,
    make: Make = generate,
) -> tuple[int, dict[str, str]]:
    """Make the clips of every variant for the same pairs that are not on disk.

    Work goes pair by pair, all variants of a chunk before the next chunk, so that after `minutes` (begun chunks are
    finished) whole pairs are there. processes: workers with one torch thread each (default: one for each core), or 0 to
    work in this process.

    Returns the number n of pairs for which every variant is there, peers that cannot run left out, and what those fail
    with, by the variant's name.
    """
    deadline = float("inf") if minutes is None else time.time() + 60 * minutes
    chunks = _chunks(pairs)
    folders = {variant: folder_of(variant, steps, work) for variant in variants}
    tasks: dict[Path, Task] = {}
    for start, chunk in chunks:
        for variant in variants:
            file = folders[variant] / _file_name(start, chunk)
            if file not in tasks and not holds(file, chunk):
                tasks[file] = Task(variant, steps, chunk, file, start == 0, deadline)
    missing = sum(len(task.pairs) for task in tasks.values())
    total = len(pairs) * len(set(folders.values()))
    print(f"{total - missing} of {total} clips are there; {missing} to make, of runs of {steps} steps", flush=True)
    _run_all(list(tasks.values()), processes, make)

    failed = {
        variant.name: (folder / FAILED).read_text() for variant, folder in folders.items() if (folder / FAILED).exists()
    }
    n = 0
    for start, chunk in chunks:
        if not all(
            holds(folder / _file_name(start, chunk), chunk)
            for variant, folder in folders.items()
            if variant.name not in failed
        ):
            break
        n += len(chunk)
    if not n:
        raise SystemExit("no pair was finished in time; give --minutes more, the clips made so far are kept")
    return n, failed


def kept(variant: Variant, pairs: Sequence[Pair], steps: int, work: Path = WORK) -> Clips:
    """The clips of a variant that `make_clips` has made, for all of these pairs."""
    folder = folder_of(variant, steps, work)
    parts = []
    for start, chunk in _chunks(pairs):
        clips = load(folder / _file_name(start, chunk), chunk)
        if clips is None:
            raise FileNotFoundError(f"no clips of {variant.name} for pairs {start} to {start + len(chunk) - 1}")
        parts.append(clips)
    return Clips(np.concatenate([c.frames for c in parts]), np.concatenate([c.seconds for c in parts]), parts[0].facts)


def _chunks(pairs: Sequence[Pair]) -> list[tuple[int, tuple[Pair, ...]]]:
    return [(start, tuple(pairs[start : start + CHUNK])) for start in range(0, len(pairs), CHUNK)]


def _file_name(start: int, chunk: Sequence[Pair]) -> str:
    return f"{start:05d}-{start + len(chunk):05d}.npz"


def _run_all(tasks: Sequence[Task], processes: int | None, make: Make) -> None:
    begun = time.time()

    def tell(number: int, task: Task, seconds: float | None) -> None:
        if seconds is not None:
            spent = time.time() - begun
            left = spent / number * (len(tasks) - number)
            each = seconds / len(task.pairs)
            print(
                f"{number}/{len(tasks)} {task.variant.name} {task.path.stem}: {each:.1f} s a clip, about "
                f"{left / 60:.1f} min left",
                flush=True,
            )

    if processes == 0 or not tasks:
        for number, task in enumerate(tasks, 1):
            tell(number, task, task.run(make))
        return
    workers = min(processes or environment.cores(), len(tasks))
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread)
    try:
        futures = {pool.submit(task.run, make): task for task in tasks}
        for number, future in enumerate(as_completed(futures), 1):
            tell(number, futures[future], future.result())
    finally:
        pool.shutdown(cancel_futures=True)


# ---- what the reports share ------------------------------------------------------------------------------------------


def similarity(clips: Clips, reference: Clips) -> tuple[np.ndarray, np.ndarray]:
    """PSNR (dB, at most `PSNR_CEILING`) and SSIM of each clip against the reference's, each `[n]`."""
    pairs = [
        (a[None].astype(np.float32), b[None].astype(np.float32))
        for a, b in zip(clips.frames, reference.frames, strict=True)
    ]
    psnr = np.asarray([min(float(np.mean(metrics.psnr(a, b))), PSNR_CEILING) for a, b in pairs])
    return psnr, np.asarray([float(np.mean(metrics.ssim(a, b))) for a, b in pairs])


def parser(doc: str | None, pairs: int, out: str) -> argparse.ArgumentParser:
    """The options of an evaluation over pairs."""
    options = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=pairs, help=f"(prompt, seed) pairs (default {pairs})")
    options.add_argument("--steps", type=int, default=shapes.STEPS, help=f"denoising steps (default {shapes.STEPS})")
    options.add_argument(
        "--out", type=Path, default=report.RESULTS / out, help="JSON file; the Markdown table goes next to it"
    )
    options.add_argument("--work", type=Path, default=WORK, help="folder of the clips; an existing one is resumed")
    options.add_argument(
        "--processes", type=int, default=None, help="workers of one thread each (default: one for each core)"
    )
    options.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="begin no clips after this time, and report on the pairs finished by then",
    )
    return options


def schedule_option(options: argparse.ArgumentParser) -> None:
    """`--schedule`: another than the paper's, by its file."""
    options.add_argument("--schedule", type=Path, default=None, help="file of a schedule (default: the paper's)")


def policy_of(file: Path | None) -> Policy:
    """The paper's policy, or one schedule."""
    if file is None:
        return policies.paper
    return fixed(fastercache.Schedule.from_json(file))


def fixed(schedule: fastercache.Schedule) -> Policy:
    """The policy that gives one schedule."""
    return lambda steps, guidance: schedule


def named(command: str, title: str, out: Path, pipeline: str, schedule: Path | None) -> tuple[str, str, Path]:
    """The command of an evaluation as it was called, its title, and where its results go unless told."""
    if pipeline != "shapes":
        command, title = f"{command} --pipeline {pipeline}", f"{pipeline.capitalize()}{title[len('Shapes') :]}"
        out = out.with_name(out.name.replace("shapes", pipeline, 1))
    if schedule is not None:
        command, title = f"{command} --schedule {schedule.name}", f"{title}, schedule {schedule.stem}"
        out = out.with_name(f"{out.stem}_{schedule.stem.replace('.', '_')}.json")
    return command, title, out


def settings(steps: int, asked: int, pairs: int, pipeline: str = "shapes") -> dict[str, Any]:
    """How the clips were made, for the JSON."""
    embedded = shapes.PIPELINES[pipeline]
    return {
        "steps": steps,
        "guidance_scale": embedded.guidance_scale,
        "call": dict(embedded.call),
        "pairs": pairs,
        "pairs_asked": asked,
        "first_seed": FIRST_HELD_OUT_SEED,
        "pipeline_sha256": _pipeline_hash(pipeline),
        "dtype": "float32",
    }


def described(steps: int, asked: int, pairs: int, pipeline: str = "shapes") -> str:
    """The same as a sentence."""
    embedded = shapes.PIPELINES[pipeline]
    short = "" if pairs == asked else f" (of {asked} asked for: the time given was over)"
    seeds = f"seeds {FIRST_HELD_OUT_SEED} to {FIRST_HELD_OUT_SEED + pairs - 1}"
    return (
        f'{pairs} held-out (prompt, seed) pairs{short} of the embedded pipeline "{pipeline}": {seeds}, '
        f"prompts cycling over all {len(embedded.world.scenes)} scenes; {steps} steps, guidance "
        f"{embedded.guidance_scale}, one prompt a call, float32 on the CPU."
    )
