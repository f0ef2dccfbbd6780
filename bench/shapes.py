"""Clips of the embedded pipelines for the whole-model benchmarks: held-out prompts and seeds, made in parallel, kept on
disk.

Every clip is one call of the pipeline with one prompt, as a user makes it. Clips are kept in chunks under
`runs/bench-shapes/`, in a folder whose name is a hash of all that they depend on, so an interrupted evaluation goes on
where it stopped and evaluations share clips.
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
from typing import Any

import numpy as np
import torch

import fastercache
from bench import report
from fastercache import ops, shapes, triton_kernels
from fastercache.host import environment, steady
from fastercache.report import metrics
from fastercache.schedule.policies import Policy

WORK = report.ROOT / "runs" / "bench-shapes"
FIRST_HELD_OUT_SEED = 10_000
"""Pair i samples from the noise of seed 10_000 + i. Training never samples from the pipeline; keep these seeds out of
any tuning of it."""
SCENE_STRIDE = 5
"""Coprime to the 16 and the 96 scenes: any run of consecutive pairs spreads over their words, and so many pairs cover
every scene."""
CHUNK = 4
"""Clips of one file, and of one unit of work."""
PSNR_CEILING = 100.0
"""In dB; stands for the infinite PSNR of equal clips, so that means stay finite. Frames kept as float16 differ by less
than 80 dB only."""


@dataclass(frozen=True)
class Pair:
    """What one clip is made from."""

    prompt: str
    seed: int


def held_out(pairs: int, pipeline: str = "shapes") -> list[Pair]:
    """The first so many evaluation pairs: prompts cycle over all scenes, every seed is new."""
    scenes = shapes.PIPELINES[pipeline].world.scenes
    return [Pair(scenes[i * SCENE_STRIDE % len(scenes)].prompt, FIRST_HELD_OUT_SEED + i) for i in range(pairs)]


@dataclass(frozen=True)
class Variant:
    """A way to make clips.

    schedule: JSON text, or `None` for the untouched pipeline. guided: `False` sets the guidance scale to 1.
        cache_format: of the caches.
    pipeline: the embedded one that makes them.
    """

    name: str
    schedule: str | None = None
    guided: bool = True
    cache_format: str = "model"
    pipeline: str = "shapes"


UNCACHED = Variant("uncached")
UNGUIDED = Variant("unguided", guided=False)


def cached(name: str, policy: Policy, steps: int, cache_format: str = "model") -> Variant:
    """The variant that runs a policy's schedule of that many steps."""
    return Variant(name, replace(policy(steps, True), name="bench").to_json(), cache_format=cache_format)


@dataclass(frozen=True)
class Clips:
    """frames: float16 `[n, frames, H, W, 3]` in [0, 1]. seconds: float64 `[n]`, each clip's wall time.

    facts: of a cached run: flops_ratio (uncached over cached, denoiser only), cache_bytes, implementations of the ops.
        Otherwise empty.
    """

    frames: np.ndarray
    seconds: np.ndarray
    facts: dict[str, Any]


Make = Callable[[Variant, int, Sequence[Pair], bool], Clips]
"""`make(variant, steps, pairs, with_facts)` generates clips."""


# ---- generation ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def pipeline(name: str = "shapes") -> Any:
    """A pipeline of this process, whose allocator it settles: page faults would be part of the seconds."""
    steady.steady_allocator()
    return shapes.load(name)


def call(pipe: Any, pair: Pair, steps: int, guidance_scale: float, pipeline: str = "shapes") -> np.ndarray:
    """One clip: float32 `[frames, H, W, 3]` in [0, 1]."""
    options = {
        **shapes.PIPELINES[pipeline].call,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "output_type": "np",
    }
    return pipe(pair.prompt, generator=torch.Generator().manual_seed(pair.seed), **options).frames[0]


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
    """Make clips with this process's pipeline. Counting FLOPs for the facts takes a second or two."""
    pipe = pipeline(variant.pipeline)
    scale = guidance_scale(variant)
    frames, seconds, facts = [], [], {}
    with compiled(pipe, variant.schedule, variant.cache_format):
        for pair in pairs:
            start = time.perf_counter()
            clip = call(pipe, pair, steps, scale, variant.pipeline)
            seconds.append(time.perf_counter() - start)
            frames.append(np.clip(clip, 0, 1).astype(np.float16))
        if with_facts and variant.schedule is not None:
            facts = run_facts(pipe)
    return Clips(np.stack(frames), np.asarray(seconds), facts)


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


# ---- the clips on disk -----------------------------------------------------------------------------------------------


def identity(variant: Variant, steps: int) -> dict[str, Any]:
    """All that a variant's clips depend on, but for the prompt and the seed. The variant's name is no part of it."""
    facts: dict[str, Any] = {
        "pipeline": _pipeline_hash(variant.pipeline),
        "steps": steps,
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
    return facts


@functools.lru_cache
def _pipeline_hash(name: str) -> str:
    """Hash of every file of the pipeline: weights, configurations, tokenizer."""
    digest, folder = hashlib.sha256(), shapes.PIPELINES[name].path
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


NOT_RUNNING = ("shapes", "report", "demo.py", "cli.py")
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


def load(path: Path, pairs: Sequence[Pair]) -> Clips | None:
    """The clips of a file; `None` if there is none, or if it holds clips of other pairs."""
    if not path.exists():
        return None
    with np.load(path) as stored:
        if json.loads(str(stored["pairs"])) != [asdict(pair) for pair in pairs]:
            return None
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
        """Make the file; returns the seconds it took, or `None` if the deadline had passed."""
        start = time.time()
        if start > self.deadline:
            return None
        save(self.path, make(self.variant, self.steps, self.pairs, self.first), self.pairs)
        return time.time() - start


def _one_thread() -> None:
    torch.set_num_threads(1)


def collect(
    variants: Sequence[Variant],
    pairs: Sequence[Pair],
    steps: int,
    *,
    work: Path = WORK,
    processes: int | None = None,
    minutes: float | None = None,
    make: Make = generate,
) -> tuple[int, dict[str, Clips]]:
    """Clips of every variant for the same pairs; those on disk are not made again.

    Work goes pair by pair, all variants of a chunk before the next chunk, so that after `minutes` (begun chunks are
    finished) whole pairs are there. processes: workers with one torch thread each (default: one for each core), or 0 to
    work in this process.

    Returns the number n of pairs for which every variant is there, and each variant's clips of the first n pairs, by
    its name.
    """
    deadline = float("inf") if minutes is None else time.time() + 60 * minutes
    chunks = [(start, tuple(pairs[start : start + CHUNK])) for start in range(0, len(pairs), CHUNK)]
    folders = {variant: folder_of(variant, steps, work) for variant in variants}

    def path(variant: Variant, start: int, chunk: Sequence[Pair]) -> Path:
        return folders[variant] / f"{start:05d}-{start + len(chunk):05d}.npz"

    tasks: dict[Path, Task] = {}
    for start, chunk in chunks:
        for variant in variants:
            file = path(variant, start, chunk)
            if file not in tasks and load(file, chunk) is None:
                tasks[file] = Task(variant, steps, chunk, file, start == 0, deadline)
    missing = sum(len(task.pairs) for task in tasks.values())
    total = len(pairs) * len(set(folders.values()))
    print(f"{total - missing} of {total} clips are there; {missing} to make, {steps} steps each", flush=True)
    _run_all(list(tasks.values()), processes, make)

    found: dict[str, list[Clips]] = {variant.name: [] for variant in variants}
    for start, chunk in chunks:
        loaded = {variant.name: load(path(variant, start, chunk), chunk) for variant in variants}
        if any(clips is None for clips in loaded.values()):
            break
        for name, clips in loaded.items():
            found[name].append(clips)
    n = sum(len(clips.seconds) for clips in next(iter(found.values())))
    if not n:
        raise SystemExit("no pair was finished in time; give --minutes more, the clips made so far are kept")
    return n, {
        name: Clips(
            np.concatenate([c.frames for c in parts]), np.concatenate([c.seconds for c in parts]), parts[0].facts
        )
        for name, parts in found.items()
    }


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
