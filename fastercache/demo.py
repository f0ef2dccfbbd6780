"""`fastercache demo`: the embedded pipeline, uncached and accelerated in turn, timed, measured and filmed."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import fastercache
from fastercache import shapes
from fastercache.host import carried, environment
from fastercache.schedule.carried import Carried
from fastercache.schedule.policies import Policy, paper
from fastercache.schedule.schedule import Schedule
from fastercache.shapes.world import Scene

if TYPE_CHECKING:
    from fastercache.report.media import Take

PROMPTS = (
    "a red circle moving right",
    "a green triangle moving down",
    "a blue triangle moving right",
    "a yellow circle moving down",
)
WARM_UP_STEPS = 6
"""Enough for every policy to reach each of its phases."""
FILM = (".mp4", ".gif", ".png")
LOOPS = 4
"""How often a short clip is repeated in the video."""


class PromptError(fastercache.FasterCacheError, ValueError):
    """A prompt that an embedded pipeline has not learnt."""


def check_prompt(prompt: str, pipeline: str = "shapes") -> None:
    """`PromptError` names the word that is unknown to an embedded pipeline, missing or one too many; any other takes
    any prompt."""
    if pipeline not in shapes.PIPELINES:
        return
    world = shapes.PIPELINES[pipeline].world
    known = {word for scene in world.scenes for word in scene.prompt.split()}
    unknown = [word for word in prompt.lower().split() if word not in known]
    if unknown:
        kinds = (world.colours, world.textures, world.shapes, ("moving",), world.directions)
        choices = " ".join("|".join(words) for words in kinds if words)
        raise PromptError(
            f"prompt {prompt!r}: {pipeline!r} has not learnt the word {unknown[0]!r}; its prompts are 'a {choices}'"
        )
    try:
        Scene.parse(prompt, world)
    except ValueError as error:
        raise PromptError(str(error)) from error


def generate(
    pipe: Any, prompt: str, *, steps: int, seed: int, on_step: Callable[[], Any], **arguments: Any
) -> tuple[np.ndarray, float]:
    """One call of a pipeline: a clip `[frames, H, W, 3]` in [0, 1], and the seconds from prompt to pixels.

    on_step: called after each denoising step.
    """

    def callback(*_: Any) -> dict[str, Any]:
        on_step()
        return {}

    generator = torch.Generator().manual_seed(seed)
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        arguments = {"callback_on_step_end": callback} | arguments
    start = perf_counter()
    output = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="np", **arguments)
    seconds = perf_counter() - start
    # A pipeline for images gives one frame.
    return np.asarray(output.frames[0] if hasattr(output, "frames") else output.images[:1]), seconds


def progress_bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), console=console
    )


class Run(NamedTuple):
    """One of several ways to run a pipeline: inside the block that `enter` gives, with a run of `warm_up` steps
    first, if any."""

    enter: Callable[[], AbstractContextManager[Any]]
    warm_up: int


def generate_takes(
    pipe: Any,
    prompts: Sequence[str],
    runs: Mapping[str, Run],
    *,
    steps: int,
    seed: int,
    console: Console,
    **arguments: Any,
) -> list[Take]:
    """For each prompt in turn: a clip of each way of running, by their names, from the same noise. Another way begins
    with each prompt, so that a machine that slows down or speeds up does it to all.

    Prompt k starts from `seed + k`. Before any is timed, the runs that warm up are made and thrown away.
    """
    from fastercache.report.media import Clip, Take

    with console.status("warming up"):
        for run in (run for run in runs.values() if run.warm_up):
            with run.enter():
                generate(pipe, prompts[0], steps=run.warm_up, seed=seed, on_step=lambda: None, **arguments)
    takes = []
    with progress_bars(console) as progress:
        tasks = {name: progress.add_task(name, total=steps * len(prompts)) for name in runs}
        for number, prompt in enumerate(prompts):
            clips = {}
            names = list(runs)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                advance = partial(progress.advance, tasks[name])
                with runs[name].enter():
                    made = generate(pipe, prompt, steps=steps, seed=seed + number, on_step=advance, **arguments)
                clips[name] = Clip(name, *made)
            takes.append(Take(prompt, tuple(clips[name] for name in names)))
    return takes


def with_and_without(pipe: Any, warm_up: int) -> dict[str, Run]:
    """A compiled pipeline uncached, and as it was compiled."""
    return {"uncached": Run(partial(fastercache.disabled, pipe), warm_up), "fastercache": Run(nullcontext, warm_up)}


def with_each(
    pipe: Any,
    schedules: Mapping[str, Schedule | Policy],
    steps: int,
    summaries: dict[str, fastercache.Summary],
    **options: Any,
) -> dict[str, Run]:
    """A pipeline untouched, and compiled with each of some schedules.

    summaries: gets the summary of the last run of each, by the schedules' names here. options: of
    `fastercache.compile`.
    """

    @contextmanager
    def compiled(name: str) -> Iterator[None]:
        fastercache.compile(pipe, schedules[name], **options)
        try:
            yield
            summaries[name] = fastercache.summary(pipe)
        finally:
            fastercache.restore(pipe)

    runs = {name: Run(partial(compiled, name), warm_up_steps(schedule, steps)) for name, schedule in schedules.items()}
    return {"uncached": Run(nullcontext, min(steps, WARM_UP_STEPS))} | runs


def warm_up_steps(schedule: Schedule | Policy, steps: int) -> int:
    """A few for a policy; all for a fixed schedule, which runs at its own length only."""
    fixed = isinstance(schedule, Schedule) or (isinstance(schedule, Carried) and steps in schedule.schedules)
    return steps if fixed else min(steps, WARM_UP_STEPS)


def run_demo(
    out: Path = Path("out/demo"),
    prompts: Sequence[str] = PROMPTS,
    schedule: Schedule | Policy | None = None,
    steps: int = shapes.STEPS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    console: Console | None = None,
) -> dict[str, Any]:
    """Sample every prompt uncached and accelerated on the CPU, print what was gained and lost, and write it all to the
    folder `out`.

    schedule: `None` for the paper's, and beside it the calibrated one that the pipeline carries for such runs, if it
        does.

    Returns what `result.json` holds. Seconds cover whole pipeline calls, from the text encoder to the decoder; PSNR,
    SSIM and the prompt score are those of `fastercache.report.metrics` and `fastercache.shapes.detector`.
    """
    from fastercache.report import media

    console = console or Console(highlight=False)
    for prompt in prompts:
        check_prompt(prompt)
    for name in (*(f"comparison{suffix}" for suffix in FILM), "summary.txt", "result.json"):
        media.check_writable(out / name)
    pipe = shapes.load(dtype=dtype)
    schedules = {"fastercache": schedule or paper}
    if schedule is None and (calibrated := carried_by(pipe, steps)) is not None:
        schedules = {"paper": paper, "calibrated": calibrated}
    summaries: dict[str, fastercache.Summary] = {}
    takes = generate_takes(
        pipe,
        prompts,
        with_each(pipe, schedules, steps, summaries),
        steps=steps,
        seed=seed,
        console=console,
        guidance_scale=shapes.GUIDANCE_SCALE,
        **shapes.CALL,
    )
    first, *others = (_figures(takes, number, summaries[name]) for number, name in enumerate(schedules, 1))
    result: dict[str, Any] = {
        **first,
        **dict(zip(list(schedules)[1:], others, strict=True)),
        "prompts": list(prompts),
        "steps": steps,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": environment.machine(),
        "versions": environment.versions(),
    }

    table = _table(takes, [first, *others])
    with (out / "summary.txt").open("w") as file:
        for target in (console, Console(file=file, width=100, highlight=False)):
            target.print(table)
            for summary in summaries.values():
                target.print(f"{summary}\n", markup=False, soft_wrap=True)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    film(out / "comparison", takes, summaries)
    console.print(f"wrote {out}/comparison.mp4, .gif and .png, summary.txt, result.json", soft_wrap=True)
    return result


def carried_by(pipe: Any, steps: int) -> Schedule | None:
    """The schedule that a pipeline carries for guided runs of that many steps, if it does."""
    found = carried.of_pipeline(pipe)
    return None if found is None else found.fitting(steps, True, type(pipe.scheduler).__name__)


def _figures(takes: Sequence[Take], number: int, summary: fastercache.Summary) -> dict[str, Any]:
    """What one way of running, by the number of its clips, gained and lost against the uncached one, as plain data."""
    from fastercache.report import metrics
    from fastercache.shapes.detector import score

    seconds, clips, right = {}, {}, {}
    for run, index in (("uncached", 0), ("cached", number)):
        seconds[run] = [take.clips[index].seconds for take in takes]
        clips[run] = np.stack([take.clips[index].frames for take in takes])
        shown = [score(clip, take.prompt).all_right for clip, take in zip(clips[run], takes, strict=True)]
        right[run] = sum(shown) / len(takes)
    psnr = metrics.psnr(clips["uncached"], clips["cached"])
    return {
        **{
            run: {"seconds": round(sum(each), 3), "seconds_per_video": [round(one, 3) for one in each]}
            for run, each in seconds.items()
        },
        "speedup": round(sum(seconds["uncached"]) / sum(seconds["cached"]), 3),
        "flops": {"uncached": summary.flops.uncached, "cached": summary.flops.cached},
        "flops_ratio": round(summary.flops.ratio, 4),
        "psnr_db": round(psnr, 2) if math.isfinite(psnr) else None,
        "ssim": round(metrics.ssim(clips["uncached"], clips["cached"]), 4),
        "identical": bool(np.array_equal(clips["uncached"], clips["cached"])),
        "prompt_score": right,
        "schedule": summary.schedule,
    }


def film(stem: Path, takes: Sequence[Take], summaries: Mapping[str, fastercache.Summary]) -> None:
    """Write the comparison as `stem`.mp4, .gif and .png."""
    from fastercache.report import media

    video = comparison_of(takes, summaries)
    for suffix in FILM:
        media.save(stem.with_suffix(suffix), video, loops=LOOPS)


def comparison_of(takes: Sequence[Take], summaries: Mapping[str, fastercache.Summary]) -> np.ndarray:
    """The clips side by side, under a headline with speed-up and PSNR, over the schedules: `[frames, height, width, 3]`
    uint8.

    summaries: of each way of running but the uncached one, in the order of the clips.
    """
    from fastercache.report import media

    names = ", ".join(summary.schedule for summary in summaries.values())
    headline = "  ·  ".join(gains(takes, number) for number in range(1, len(summaries) + 1))
    charts = {name: summary.chart for name, summary in summaries.items()}
    return media.comparison(takes, charts, f"FasterCache  ·  schedule{'s' * (len(summaries) > 1)} {names}", headline)


def gains(takes: Sequence[Take], number: int) -> str:
    """Speed-up and PSNR of one way of running, by the number of its clips, in words."""
    from fastercache.report import metrics

    speedup = sum(take.clips[0].seconds for take in takes) / sum(take.clips[number].seconds for take in takes)
    psnr = metrics.psnr(*(np.stack([take.clips[index].frames for take in takes]) for index in (0, number)))
    return f"{pace(speedup)}, {f'{psnr:.1f} dB PSNR' if math.isfinite(psnr) else 'identical'}"


def pace(speedup: float) -> str:
    """1.46 as "1.46x faster", 0.5 as "2.00x slower"."""
    return f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"


def _table(takes: Sequence[Take], figures: Sequence[Mapping[str, Any]]) -> Table:
    """A column for each way of running, the uncached one first; the gains of one alone stand at its right."""
    videos, names = len(takes), [clip.name for clip in takes[0].clips]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    alone = len(figures) == 1
    for heading in names:
        table.add_column(heading, style="" if heading == names[0] else "cyan", justify="right")
    if alone:
        table.add_column("", style="bold", justify="right")

    def add(what: str, cells: Sequence[str], gained: Sequence[str] = ()) -> None:
        table.add_row(what, *cells, *(gained if alone else ()))
        if gained and not alone:
            table.add_row("", "", *gained)

    totals = [figures[0]["uncached"]["seconds"], *(each["cached"]["seconds"] for each in figures)]
    paces = [pace(each["speedup"]) for each in figures]
    add(f"{videos} video{'s' * (videos > 1)}", [f"{total:.2f} s" for total in totals], paces)
    if videos > 1:
        add("per video", [f"{total / videos:.2f} s" for total in totals])
    counts = [figures[0]["flops"]["uncached"], *(each["flops"]["cached"] for each in figures)]
    fewer = [f"{each['flops_ratio']:.2f}x fewer" for each in figures]
    add("denoiser, per video", [f"{count / 1e9:.1f} GFLOP" for count in counts], fewer)
    scores = [figures[0]["prompt_score"]["uncached"], *(each["prompt_score"]["cached"] for each in figures)]
    add("prompts right", [f"{score:.0%}" for score in scores])
    close = ["identical" if each["psnr_db"] is None else f"{each['psnr_db']:.1f} dB" for each in figures]
    add("PSNR", ["", *close])
    add("SSIM", ["", *(f"{each['ssim']:.3f}" for each in figures)])
    return table
