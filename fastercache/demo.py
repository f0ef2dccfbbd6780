"""`fastercache demo`: the embedded pipeline, uncached and accelerated in turn, timed, measured and filmed."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import fastercache
from fastercache import shapes
from fastercache.host import environment
from fastercache.schedule.policies import Policy, paper
from fastercache.schedule.schedule import Schedule
from fastercache.shapes.world import COLOURS, DIRECTIONS, SCENES, SHAPES, Scene

if TYPE_CHECKING:
    from fastercache.report.media import Pair

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
    """A prompt that "shapes" has not learnt."""


def check_prompt(prompt: str) -> None:
    """`PromptError` names the word that is unknown, missing or one too many."""
    known = {word for scene in SCENES for word in scene.prompt.split()}
    unknown = [word for word in prompt.lower().split() if word not in known]
    if unknown:
        choices = " ".join("|".join(words) for words in (COLOURS, SHAPES, ("moving",), DIRECTIONS))
        raise PromptError(
            f"prompt {prompt!r}: 'shapes' has not learnt the word {unknown[0]!r}; its prompts are 'a {choices}'"
        )
    try:
        Scene.parse(prompt)
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


def generate_pairs(
    pipe: Any, prompts: Sequence[str], *, steps: int, warm_up: int, seed: int, console: Console, **arguments: Any
) -> list[Pair]:
    """For each prompt in turn: the clip of a compiled pipeline with `fastercache.disabled` and the accelerated one,
    from the same noise. Who begins alternates, so that a machine that slows down or speeds up does it to both.

    Prompt k starts from `seed + k`. Before any is timed, a run of `warm_up` steps of both kinds is made and thrown
    away.
    """
    from fastercache.report.media import Pair

    with console.status("warming up"):
        with fastercache.disabled(pipe):
            generate(pipe, prompts[0], steps=warm_up, seed=seed, on_step=lambda: None, **arguments)
        generate(pipe, prompts[0], steps=warm_up, seed=seed, on_step=lambda: None, **arguments)
    pairs = []
    with progress_bars(console) as progress:
        slow, fast = (progress.add_task(name, total=steps * len(prompts)) for name in ("uncached", "fastercache"))
        for number, prompt in enumerate(prompts):
            clips: dict[str, tuple[np.ndarray, float]] = {}
            for run in ("uncached", "cached")[:: -1 if number % 2 else 1]:
                bar = slow if run == "uncached" else fast
                with fastercache.disabled(pipe) if run == "uncached" else nullcontext():
                    clips[run] = generate(
                        pipe,
                        prompt,
                        steps=steps,
                        seed=seed + number,
                        on_step=partial(progress.advance, bar),
                        **arguments,
                    )
            (before, seconds), (after, seconds_cached) = clips["uncached"], clips["cached"]
            pairs.append(Pair(prompt, before, after, seconds, seconds_cached))
    return pairs


def warm_up_steps(schedule: Schedule | Policy, steps: int) -> int:
    """A few for a policy; all for a fixed schedule, which runs at its own length only."""
    return steps if isinstance(schedule, Schedule) else min(steps, WARM_UP_STEPS)


def run_demo(
    out: Path = Path("out/demo"),
    prompts: Sequence[str] = PROMPTS,
    schedule: Schedule | Policy = paper,
    steps: int = shapes.STEPS,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    console: Console | None = None,
) -> dict[str, Any]:
    """Sample every prompt uncached and accelerated on the CPU, print what was gained and lost, and write it all to the
    folder `out`.

    Returns what `result.json` holds. Seconds cover whole pipeline calls, from the text encoder to the decoder; PSNR,
    SSIM and the prompt score are those of `fastercache.report.metrics` and `fastercache.shapes.detector`.
    """
    from fastercache.report import media, metrics
    from fastercache.shapes.detector import score

    console = console or Console(highlight=False)
    for prompt in prompts:
        check_prompt(prompt)
    for name in (*(f"comparison{suffix}" for suffix in FILM), "summary.txt", "result.json"):
        media.check_writable(out / name)
    pipe = fastercache.compile(shapes.load(dtype=dtype), schedule)
    pairs = generate_pairs(
        pipe,
        prompts,
        steps=steps,
        warm_up=warm_up_steps(schedule, steps),
        seed=seed,
        console=console,
        guidance_scale=shapes.GUIDANCE_SCALE,
        **shapes.CALL,
    )
    summary = fastercache.summary(pipe)

    uncached, cached = np.stack([pair.uncached for pair in pairs]), np.stack([pair.cached for pair in pairs])
    seconds = {"uncached": [pair.uncached_seconds for pair in pairs], "cached": [pair.cached_seconds for pair in pairs]}
    psnr = metrics.psnr(uncached, cached)
    result: dict[str, Any] = {
        **{
            run: {"seconds": round(sum(each), 3), "seconds_per_video": [round(one, 3) for one in each]}
            for run, each in seconds.items()
        },
        "speedup": round(sum(seconds["uncached"]) / sum(seconds["cached"]), 3),
        "flops_ratio": round(summary.flops.ratio, 4),
        "psnr_db": round(psnr, 2) if math.isfinite(psnr) else None,
        "ssim": round(metrics.ssim(uncached, cached), 4),
        "identical": bool(np.array_equal(uncached, cached)),
        "prompt_score": {
            run: sum(score(clip, prompt).all_right for clip, prompt in zip(clips, prompts, strict=True)) / len(prompts)
            for run, clips in (("uncached", uncached), ("cached", cached))
        },
        "prompts": list(prompts),
        "steps": steps,
        "schedule": summary.schedule,
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": environment.machine(),
        "versions": environment.versions(),
    }

    table = _table(result, summary.flops)
    with (out / "summary.txt").open("w") as file:
        for target in (console, Console(file=file, width=100, highlight=False)):
            target.print(table)
            target.print(str(summary), markup=False, soft_wrap=True)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    film(out / "comparison", pairs, summary)
    console.print(f"\nwrote {out}/comparison.mp4, .gif and .png, summary.txt, result.json", soft_wrap=True)
    return result


def film(stem: Path, pairs: Sequence[Pair], summary: fastercache.Summary) -> None:
    """Write the comparison as `stem`.mp4, .gif and .png."""
    from fastercache.report import media

    video = comparison_of(pairs, summary)
    for suffix in FILM:
        media.save(stem.with_suffix(suffix), video, loops=LOOPS)


def comparison_of(pairs: Sequence[Pair], summary: fastercache.Summary) -> np.ndarray:
    """The pairs side by side, under a headline with speed-up and PSNR, over the schedule: `[frames, height, width, 3]`
    uint8."""
    from fastercache.report import media, metrics

    speedup = sum(pair.uncached_seconds for pair in pairs) / sum(pair.cached_seconds for pair in pairs)
    psnr = metrics.psnr(np.stack([pair.uncached for pair in pairs]), np.stack([pair.cached for pair in pairs]))
    close = f"{psnr:.1f} dB PSNR" if math.isfinite(psnr) else "identical"
    return media.comparison(
        pairs, summary.chart, f"FasterCache  ·  schedule {summary.schedule}", f"{pace(speedup)}  ·  {close}"
    )


def pace(speedup: float) -> str:
    """1.46 as "1.46x faster", 0.5 as "2.00x slower"."""
    return f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"


def _table(result: dict[str, Any], flops: Any) -> Table:
    videos = len(result["prompts"])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading, style in (("uncached", ""), ("fastercache", "cyan"), ("", "bold")):
        table.add_column(heading, style=style, justify="right")

    totals = [result[run]["seconds"] for run in ("uncached", "cached")]
    table.add_row(
        f"{videos} video{'s' * (videos > 1)}", *[f"{total:.2f} s" for total in totals], pace(result["speedup"])
    )
    if videos > 1:
        table.add_row("per video", *(f"{total / videos:.2f} s" for total in totals))
    table.add_row(
        "denoiser, per video",
        *(f"{count / 1e9:.1f} GFLOP" for count in (flops.uncached, flops.cached)),
        f"{result['flops_ratio']:.2f}x fewer",
    )
    table.add_row("prompts right", *(f"{result['prompt_score'][run]:.0%}" for run in ("uncached", "cached")))
    table.add_row("PSNR", "", "identical" if result["psnr_db"] is None else f"{result['psnr_db']:.1f} dB")
    table.add_row("SSIM", "", f"{result['ssim']:.3f}")
    return table
