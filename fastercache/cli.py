"""The command `fastercache`: demo, sample, inspect, info."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fastercache
from fastercache import demo as demonstration
from fastercache import environment, ops, policies, shapes
from fastercache.errors import FasterCacheError
from fastercache.memory import FORMATS
from fastercache.plan import Plan, make_plan
from fastercache.policies import Policy
from fastercache.schedule import Schedule, Step
from fastercache.systems import SYSTEMS, System

app = typer.Typer(
    help="Video diffusion transformers, faster: cached features and guidance.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False,
)  # fmt: skip
console = Console(highlight=False)
problems = Console(stderr=True, highlight=False)

CHART_WIDTH = 50
CELLS = {"#": ("█", "bright_blue", "computed"), "~": ("▒", "yellow", "blended"), ".": ("·", "bright_black", "not run")}
"""Glyph, colour and name of each character of a step chart (`Schedule.chart`)."""


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Format(str, Enum):
    """`fastercache.memory.CacheFormat`."""

    model = "model"
    int8 = "int8"
    int8_int4 = "int8-int4"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    def on(self, device: str) -> torch.dtype:
        """`auto` is bfloat16 on a GPU, float32 on the CPU."""
        if self is Dtype.auto:
            return torch.float32 if device == "cpu" else torch.bfloat16
        return getattr(torch, self.value)


SCHEDULES = f"A policy ({', '.join(policies.BY_NAME)}), a preset ({', '.join(policies.PRESETS)}) or a schedule's JSON file."
ScheduleOption = Annotated[str, typer.Option("--schedule", help=SCHEDULES)]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Denoising steps; default: those of the schedule file, or 50.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the noise.")]


def _fail(message: str) -> NoReturn:
    problems.print(message, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(2)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can put right is one red line and exit code 2; a traceback is left for bugs."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("fastercache"):
            raise
        missing = f"{error.name.split('.')[0]} is not installed" if error.name else str(error).strip().splitlines()[0]
        _fail(f'{missing}: pip install "fastercache[demo]"')
    except (FasterCacheError, OSError) as error:
        _fail(str(error))


def _steps(schedule: Schedule | Policy, asked: int | None, default: int = 50) -> int:
    """As asked; else the length of a fixed schedule, or the default."""
    return asked or (len(schedule) if isinstance(schedule, Schedule) else default)


@app.command()
@_one_line_errors()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for video, picture and numbers.")] = Path("out/demo"),
    prompt: Annotated[list[str] | None, typer.Option(help="Such as 'a red circle moving right'; repeatable.")] = None,
    schedule: ScheduleOption = "paper",
    steps: StepsOption = None,
    seed: SeedOption = 0,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
) -> None:
    """The embedded text-to-video model on your CPU: uncached beside accelerated, timed and measured."""
    plan = policies.resolve(schedule)
    demonstration.run_demo(out, prompt or demonstration.PROMPTS, plan, _steps(plan, steps), seed, dtype.on("cpu"), console)


@app.command()
@_one_line_errors()
def sample(
    pipeline: Annotated[str, typer.Argument(help="A diffusers pipeline directory, or 'shapes', the embedded one.")],
    prompt: Annotated[str, typer.Option(help="What to show.")],
    schedule: ScheduleOption = "paper",
    steps: StepsOption = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the pipeline's own.")] = None,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="The video: .mp4, .gif, or .png for one frame.")] = Path("out/sample.mp4"),
    height: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the video.")] = None,
    device: Annotated[Device, typer.Option()] = Device.auto,
    dtype: Annotated[Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on the CPU.")] = Dtype.auto,
    cache_format: Annotated[
        Format | None, typer.Option(help="How caches are stored; default: the best that fits --max-cache-gb, lossless without it.")
    ] = None,
    max_cache_gb: Annotated[float | None, typer.Option(min=0, help="Most gigabytes (1e9 bytes) the caches may take.")] = None,
    attention_backend: Annotated[
        str | None, typer.Option(help="diffusers' attention backend, such as flash, or auto: times the exact ones that are installed.")
    ] = None,
    compare: Annotated[bool, typer.Option(help="Also sample uncached, and show both side by side.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Let diffusers fetch what is not on this machine.")] = False,
) -> None:
    """Sample any diffusers text-to-video pipeline of a known family, accelerated."""
    from fastercache import media, metrics

    plan = policies.resolve(schedule)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device is Device.auto else device.value
    if place == "cuda" and not torch.cuda.is_available():
        _fail("--device cuda: torch sees no GPU; leave the option out to run on the CPU")
    out.parent.mkdir(parents=True, exist_ok=True)
    with console.status(f"loading {pipeline}"):
        pipe = _load(pipeline, dtype.on(place), download).to(place)
    call = inspect.signature(pipe.__call__).parameters
    arguments = _arguments(pipeline, call, height=height, width=width, frames=frames, guidance_scale=guidance)
    steps = _steps(plan, steps, shapes.STEPS if pipeline == "shapes" else call["num_inference_steps"].default)
    fastercache.compile(
        pipe,
        plan,
        cache_format=None if cache_format is None else cache_format.value,
        max_cache_bytes=None if max_cache_gb is None else int(max_cache_gb * 1e9),
        attention_backend=attention_backend,
    )

    if compare:
        warm_up = demonstration.warm_up_steps(plan, steps)
        pairs = demonstration.generate_pairs(pipe, [prompt], steps=steps, warm_up=warm_up, seed=seed, console=console, **arguments)
        summary, pair = fastercache.summary(pipe), pairs[0]
        media.save(out, demonstration.comparison_of(pairs, summary), loops=demonstration.LOOPS)
        psnr = metrics.psnr(pair.uncached[None], pair.cached[None])
        found = (
            f"uncached {pair.uncached_seconds:.2f} s, fastercache {pair.cached_seconds:.2f} s: "
            f"{demonstration.pace(pair.uncached_seconds / pair.cached_seconds)}, "
            + (f"PSNR {psnr:.1f} dB" if math.isfinite(psnr) else "identical")
        )
    else:
        with demonstration.progress_bars(console) as progress:
            task = progress.add_task("fastercache", total=steps)
            clip, seconds = demonstration.generate(
                pipe, prompt, steps=steps, seed=seed, on_step=lambda: progress.advance(task), **arguments
            )  # fmt: skip
        summary = fastercache.summary(pipe)
        media.save(out, media.to_bytes(clip))
        found = f"{len(clip)} frames of {clip.shape[2]} x {clip.shape[1]} in {seconds:.2f} s"
    console.print(str(summary), markup=False, soft_wrap=True)
    console.print(f"\n{found}\nwrote {out}", soft_wrap=True)


def _load(pipeline: str, dtype: torch.dtype, download: bool) -> Any:
    if pipeline == "shapes":
        return shapes.load(dtype=dtype)
    if not download and not (Path(pipeline) / "model_index.json").is_file():
        _fail(f"{pipeline} is not a pipeline directory (no model_index.json in it); give one that save_pretrained wrote, or 'shapes'")
    try:
        return shapes.load_pipeline(pipeline, dtype, download=download)
    except ImportError:
        raise
    except Exception as error:  # whatever diffusers, transformers and safetensors raise on a directory that is incomplete or broken
        reason = str(error).strip().splitlines() or [type(error).__name__]
        _fail(f"{pipeline} cannot be loaded: {reason[0]}; save it again with save_pretrained")


def _arguments(pipeline: str, call: Any, *, frames: int | None, **asked: Any) -> dict[str, Any]:
    """Keyword arguments of a pipeline's call: those of "shapes" first, then whatever was asked for, by the pipeline's own names."""
    arguments = dict(shapes.CALL, guidance_scale=shapes.GUIDANCE_SCALE) if pipeline == "shapes" else {}
    if frames is not None:
        asked[next((name for name in ("num_frames", "video_length") if name in call), "frames")] = frames
    asked = {name: value for name, value in asked.items() if value is not None}
    for name in asked:
        if name not in call:
            _fail(f"{pipeline} has no argument for --{name.removesuffix('_scale')}; leave it out")
    return arguments | asked


@app.command("inspect")
@_one_line_errors()
def inspect_schedule(
    schedule: Annotated[str, typer.Argument(help=SCHEDULES)],
    steps: StepsOption = None,
    guidance: Annotated[
        bool | None,
        typer.Option("--guidance/--no-guidance", help="With or without classifier-free guidance; default: as the system has it."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The schedule, its phases and savings as JSON.")] = False,
) -> None:
    """Draw a schedule: what each step computes, blends and leaves out; for a preset also what that saves at the published sizes."""
    source = policies.resolve(schedule)
    system = SYSTEMS[schedule.partition("/")[0]] if schedule in policies.PRESETS else None
    if guidance is None:
        guidance = system is None or system.guided
    if isinstance(source, Schedule) and steps not in (None, len(source)):
        _fail(f"{schedule} has {len(source)} steps, not {steps}; leave out --steps, or name a policy")
    default = 50 if system is None else system.steps
    plan = make_plan(source if isinstance(source, Schedule) else source(_steps(source, steps, default), guidance), guidance)
    phases, saved = _phases(plan), _saved(plan)
    if as_json:
        document = {"schedule": json.loads(plan.schedule.to_json()), "steps": len(plan.steps), "phases": phases, "skipped": saved}
        typer.echo(json.dumps(document | ({} if system is None else _costs(system, plan)), indent=1))
        return

    console.print(f"[bold]{plan.schedule.name}[/bold], {len(plan.steps)} steps, {'with' if guidance else 'without'} guidance\n")
    console.print(_chart(plan))
    console.print(_coefficients(plan.schedule.steps, guidance))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("phase", "branches", "blended"):
        table.add_column(heading)
    table.add_column("steps", justify="right")
    for number, phase in enumerate(phases, 1):
        table.add_row(str(number), " + ".join(phase["branches"]), ", ".join(phase["blended"]) or "nothing", str(len(phase["steps"])))
    console.print(table)
    for what, share in saved.items():
        console.print(f"skipped  {share['skipped'] / share['of']:>4.0%} of {what} ({share['skipped']} of {share['of']})")
    if system is not None:
        _print_costs(system, _costs(system, plan))


def _phases(plan: Plan) -> list[dict[str, Any]]:
    """The distinct kinds of step, each with the numbers of its steps (from 1)."""
    names = [group.selector for group in plan.groups]
    return [
        {
            "branches": list(branches),
            "blended": [name for name, blend in zip(names, blends, strict=True) if blend],
            "steps": [number for number, step in enumerate(plan.steps, 1) if step.phase == (branches, blends)],
        }
        for branches, blends in plan.phases
    ]


def _saved(plan: Plan) -> dict[str, dict[str, int]]:
    """Branch-steps (one branch through one step) that are not run, and, for each selector, computations of its sites that are not made."""
    total = len(plan.steps) * len(plan.branches)
    run = sum(len(step.branches) for step in plan.steps)
    saved = {"branch-steps": {"skipped": total - run, "of": total}}
    for index, group in enumerate(plan.groups):
        computed = sum(len(step.branches) for step in plan.steps if not step.groups[index].blend)
        saved[f"{group.selector} computations"] = {"skipped": total - computed, "of": total}
    return saved


def _costs(system: System, plan: Plan) -> dict[str, Any]:
    """What a run of `plan` costs on a system at its published size; a floating-point operation is half a multiply-accumulate."""
    uncached, cached = 2 * system.uncached_macs(plan), 2 * system.cached_macs(plan)
    return {
        "system": {"name": system.name, "video": system.video, "parameters": system.parameters, "source": system.source},
        "flops": {"uncached": uncached, "cached": cached},
        "macs": {"uncached": uncached // 2, "cached": cached // 2},
        "flops_ratio": uncached / cached,
        "cache_bytes": {storage: system.cache_bytes(plan, storage) for storage in FORMATS},
        "weight_bytes": system.parameters * system.dtype.itemsize,
        "fits_80_gb": system.fitting_format(plan),
    }


def _print_costs(system: System, costs: dict[str, Any]) -> None:
    console.print(f"\n{system.name}, {system.video} ({system.source})", soft_wrap=True, markup=False)
    for run, flops in costs["flops"].items():
        console.print(f"{run:<9}{flops / 1e15:>9.3f} PFLOPs, {costs['macs'][run] / 1e15:.3f} PMACs")
    console.print(f"ratio    {costs['flops_ratio']:>9.3f}")
    for storage, size in costs["cache_bytes"].items():
        console.print(f"cache    {size / 1e9:>9.2f} GB as {storage}")
    holds = f"holds them and the cache as {costs['fits_80_gb']}" if costs["fits_80_gb"] else "holds them with the cache in no format"
    console.print(f"weights  {costs['weight_bytes'] / 1e9:>9.2f} GB; an 80 GB GPU {holds}, and 12 GB of activations", soft_wrap=True)


def _chart(plan: Plan) -> Text:
    lines = plan.schedule.chart().splitlines()[: len(plan.branches)]
    rows = [line.split() for line in lines]
    chart = Text()
    for first in range(0, len(plan.steps), CHART_WIDTH):
        numbers = range(first + 1, min(first + CHART_WIDTH, len(plan.steps)) + 1, 10)
        chart.append(f"{'step':<8}" + "".join(f"{number:<10}" for number in numbers).rstrip() + "\n", style="bright_black")
        for branch, cells in rows:
            chart.append(f"{branch:<8}")
            for cell in cells[first : first + CHART_WIDTH]:
                glyph, colour, _ = CELLS[cell]
                chart.append(glyph, style=colour)
            chart.append("\n")
        chart.append("\n")
    chart.append(" " * 8)
    for glyph, colour, name in CELLS.values():
        chart.append(glyph, style=colour)
        chart.append(f" {name}   ")
    chart.append("\n")
    chart.rstrip()
    return chart


def _coefficients(steps: Sequence[Step], guidance: bool) -> str:
    """One line for the taps and one for each weight that is not 1 on every step."""
    lines = _blends("blend  ", [(number, step.taps) for number, step in enumerate(steps, 1) if step.reuse])
    for selector in dict.fromkeys(selector for step in steps for selector, _ in step.own_taps):
        own = [(number, step.taps_of(selector)) for number, step in enumerate(steps, 1) if selector in dict(step.own_taps)]
        lines += _blends(selector, own)
    weights: list[tuple[str, Callable[[Step], float]]] = [("low     w1", lambda step: step.low), ("high    w2", lambda step: step.high)]
    for label, value in weights:
        used = {number: value(step) for number, step in enumerate(steps, 1) if guidance and step.branches == "cond" and value(step) != 1.0}
        if used:
            lines.append(f"{label} = {_span(list(used.values()))}, {_where(list(used))}")
    return "\n".join(lines)


def _blends(label: str, taps: Sequence[tuple[int, tuple[float, ...]]]) -> list[str]:
    """What the numbered steps blend with: one line for each form that their coefficients have."""
    plain = [number for number, row in taps if row == (1.0,)]
    linear = {number: -row[1] for number, row in taps if len(row) == 2 and math.isclose(sum(row), 1.0)}
    other = {number: len(row) for number, row in taps if number not in plain and number not in linear}
    lines = []
    if plain:
        lines.append(f"{label} A, the newest output unchanged, {_where(plain)}")
    if linear:
        lines.append(f"{label} A + w (A - B), w = {_span(list(linear.values()))}, {_where(list(linear))}")
    if other:
        lines.append(f"{label} {_span(list(other.values()))} taps, {_where(list(other))}")
    return lines


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _where(numbers: Sequence[int]) -> str:
    return f"on {len(numbers)} step{'s' * (len(numbers) > 1)} ({_span(numbers)})"


@app.command()
def info() -> None:
    """Versions, device, and which code serves each op."""
    for name, version in environment.versions().items():
        console.print(f"{name:<14}{version or 'not installed'}")
    machine = environment.machine()
    console.print(f"{'cpu':<14}{machine['cpu']}, {machine['cores']} cores, of which torch uses {machine['torch_threads']}", soft_wrap=True)
    console.print(f"{'gpu':<14}{machine['gpu'] or 'none'}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("op", "on the CPU", "on a GPU"):
        table.add_column(heading)
    for name, code in ops.implementations().items():
        table.add_row(name, code["cpu"], code["cuda"])
    console.print(table)
    for reason in ops.fallback_reasons():
        console.print(f"note: {reason}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
