"""The command `fastercache`: demo, sample, inspect, info."""

from __future__ import annotations

import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
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
from fastercache import ops, shapes
from fastercache.cache import formats
from fastercache.errors import FasterCacheError, FasterCacheWarning
from fastercache.host import environment, processes, steady
from fastercache.report import charts
from fastercache.report.published import SYSTEMS, System
from fastercache.schedule import policies
from fastercache.schedule.plan import make_plan
from fastercache.schedule.policies import Policy
from fastercache.schedule.schedule import Schedule

app = typer.Typer(
    help="Video diffusion transformers, faster: cached features and guidance.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,  # its tables cut the names of options and presets at 80 columns
)
console = Console(highlight=False)
problems = Console(stderr=True, highlight=False)


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ContextParallel(str, Enum):
    ulysses = "ulysses"
    ring = "ring"


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


MOST_STEPS, MOST_SEED = 10_000, 2**63 - 1
HUB_NAME = r"[\w.-]+/[\w.-]+"


def _fail(message: str) -> NoReturn:
    problems.print(message, style="red", markup=False, soft_wrap=True)
    raise typer.Exit(2)


def _seed(seed: int) -> int:
    if not 0 <= seed <= MOST_SEED:
        _fail(f"--seed {seed}: give a whole number from 0 to {MOST_SEED}")
    return seed


def _number(option: str, remedy: str, least: float = -math.inf) -> Callable[[float | None], float | None]:
    """Checks the value of an option: finite, and at least `least`."""

    def check(value: float | None) -> float | None:
        if value is not None and not (math.isfinite(value) and value >= least):
            _fail(f"--{option} {value}: {remedy}")
        return value

    return check


def _known_format(name: str | None) -> str | None:
    """Checks the value of --cache-format."""
    if name is not None and name not in formats.known():
        _fail(f"--cache-format {name}: give one of {', '.join(formats.known())}")
    return name


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastercache {fastercache.__version__}")
        raise typer.Exit


SCHEDULE = "A policy, a preset or a schedule's JSON file"
ScheduleOption = Annotated[
    str, typer.Option("--schedule", help=f"{SCHEDULE}; `fastercache inspect --help` has the names.")
]
NAMES = "\n".join(
    ("\b", "Policies:", *map("  {}".format, policies.BY_NAME), "Presets:", *map("  {}".format, policies.PRESETS))
)
"""After the mark of a paragraph that is printed as it is: wrapped, the names would be broken at their hyphens."""
StepsOption = Annotated[
    int | None,
    typer.Option("--steps", min=1, max=MOST_STEPS, help="Denoising steps; default: those of the schedule file, or 50."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of the noise.", callback=_seed)]
JsonOption = Annotated[bool, typer.Option("--json", help="The same as JSON, and nothing else on the standard output.")]


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a user can put right is one red line and exit code 2, a warning one yellow line; a traceback is left for
    bugs."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, FasterCacheWarning):
                problems.print(f"warning: {message}", style="yellow", markup=False, soft_wrap=True)
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        with _failures():
            yield


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("fastercache"):
            raise
        missing = f"{error.name.split('.')[0]} is not installed" if error.name else str(error).strip().splitlines()[0]
        _fail(f'{missing}: pip install "fastercache[demo]"')
    except torch.OutOfMemoryError as error:
        _fail(
            f"out of memory: {_first_line(error)}; try --cache-format int8-int4, fewer --frames, or a smaller --height "
            "and --width"
        )
    except (FasterCacheError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        problems.print("interrupted; nothing was written")
        raise typer.Exit(130) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _steady(screen: Console) -> None:
    """Settle the allocator and the number of threads of this process, and say how many there are."""
    steady.steady_allocator()
    screen.print(steady.choose_threads(), soft_wrap=True)


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
    _steady(console)
    demonstration.run_demo(
        out, prompt or demonstration.PROMPTS, plan, _steps(plan, steps), seed, dtype.on("cpu"), console
    )


@app.command()
@_one_line_errors()
def sample(
    pipeline: Annotated[
        str, typer.Argument(help="A diffusers pipeline directory, a name on the hub, or 'shapes', the embedded one.")
    ],
    prompt: Annotated[str, typer.Option(help="What to show.")],
    schedule: ScheduleOption = "paper",
    steps: StepsOption = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale; default: the pipeline's own.",
            callback=_number("guidance", "give a number, such as 5"),
        ),
    ] = None,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="The video: .mp4, .mov, .mkv, .gif, or .png for one frame.")] = Path(
        "out/sample.mp4"
    ),
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; default: what the pipeline was made for.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; default: what the pipeline was made for.")] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Length of the video; default: what the pipeline was made for.")
    ] = None,
    device: Annotated[Device, typer.Option()] = Device.auto,
    dtype: Annotated[Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on the CPU.")] = Dtype.auto,
    cache_format: Annotated[
        str | None,
        typer.Option(
            help=(
                f"How caches are stored: {', '.join(formats.known())}; default: the best that "
                "fits --max-cache-gb, lossless without it."
            ),
            callback=_known_format,
        ),
    ] = None,
    max_cache_gb: Annotated[
        float | None,
        typer.Option(
            help="Most gigabytes (1e9 bytes) the caches may take.",
            callback=_number(
                "max-cache-gb", "give a number of gigabytes, or leave the option out for no limit", least=0
            ),
        ),
    ] = None,
    attention_backend: Annotated[
        str | None,
        typer.Option(
            help="diffusers' attention backend, such as flash, or auto: times the exact ones that are installed."
        ),
    ] = None,
    context_parallel: Annotated[
        ContextParallel | None,
        typer.Option(
            help="One video over all processes that torchrun started: ulysses, or ring on GPUs (not measured)."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also sample uncached, and show both side by side.")
    ] = False,
    download: Annotated[
        bool, typer.Option("--download", help="Let diffusers fetch what is not on this machine.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Sample any diffusers text-to-video pipeline of a known family, accelerated."""
    from fastercache.report import media, metrics

    screen = problems if as_json else console
    if context_parallel is not None:
        processes.join_group()
    first = context_parallel is None or torch.distributed.get_rank() == 0
    if not first:
        screen = Console(quiet=True)  # errors are said by every process, the rest by the first
    plan = policies.resolve(schedule)
    if pipeline == "shapes":
        demonstration.check_prompt(prompt)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device is Device.auto else device.value
    if place == "cuda" and not torch.cuda.is_available():
        _fail("--device cuda: torch sees no GPU; leave the option out to run on the CPU")
    if place == "cuda" and context_parallel is not None:
        processes.refuse_shared_gpu()
    media.check_suffix(out)
    _check_source(pipeline, download)
    if first:
        media.check_writable(out)
    if place == "cpu":
        _steady(screen)
    with screen.status(f"loading {pipeline}"):
        pipe = _load(pipeline, dtype.on(place), download).to(place)
    call = inspect.signature(pipe.__call__).parameters
    arguments = _arguments(pipe, call, height=height, width=width, frames=frames, guidance_scale=guidance)
    steps = _steps(plan, steps, _default(call, "num_inference_steps") or 50)
    if context_parallel is not None:
        fastercache.parallelize(pipe, context_parallel.value)
        if not first:
            pipe.set_progress_bar_config(disable=True)
    fastercache.compile(
        pipe,
        plan,
        cache_format=cache_format,
        max_cache_bytes=None if max_cache_gb is None else int(max_cache_gb * 1e9),
        attention_backend=attention_backend,
    )

    found: dict[str, Any] = {"video": str(out)}
    with _refusals(pipe, {"steps": steps} | arguments):
        if compare:
            warm_up = demonstration.warm_up_steps(plan, steps)
            pairs = demonstration.generate_pairs(
                pipe, [prompt], steps=steps, warm_up=warm_up, seed=seed, console=screen, **arguments
            )
            pair = pairs[0]
            clip, seconds = pair.cached, pair.cached_seconds
            psnr = metrics.psnr(pair.uncached[None], pair.cached[None])
            found["uncached_seconds"] = round(pair.uncached_seconds, 3)
            found["psnr_db"] = round(psnr, 2) if math.isfinite(psnr) else None
            text = (
                f"uncached {pair.uncached_seconds:.2f} s, fastercache {seconds:.2f} s: "
                f"{demonstration.pace(pair.uncached_seconds / seconds)}, "
                + (f"PSNR {psnr:.1f} dB" if math.isfinite(psnr) else "identical")
            )
        else:
            with demonstration.progress_bars(screen) as progress:
                task = progress.add_task("fastercache", total=steps)
                clip, seconds = demonstration.generate(
                    pipe, prompt, steps=steps, seed=seed, on_step=lambda: progress.advance(task), **arguments
                )
            text = f"{len(clip)} frames of {clip.shape[2]} x {clip.shape[1]} in {seconds:.2f} s"
    summary = fastercache.summary(pipe)
    if context_parallel is not None:
        torch.distributed.destroy_process_group()
        if not first:
            return
    if compare:
        media.save(out, demonstration.comparison_of(pairs, summary), loops=demonstration.LOOPS)
    else:
        media.save(out, media.to_bytes(clip))
    if as_json:
        found |= {
            "frames": len(clip),
            "height": clip.shape[1],
            "width": clip.shape[2],
            "seconds": round(seconds, 3),
            "seed": seed,
        }
        typer.echo(json.dumps(found | {"summary": summary.as_dict()}, indent=1))
        return
    console.print(str(summary), markup=False, soft_wrap=True)
    console.print(f"\n{text}\nwrote {out}", markup=False, soft_wrap=True)


@contextmanager
def _refusals(pipe: Any, asked: dict[str, Any]) -> Iterator[None]:
    """What a pipeline or its model raises about sizes and numbers that it was asked for is one line, too."""
    try:
        yield
    except (FasterCacheError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        if processes.is_of_another(error):
            _fail(f"another process has ended, and this one cannot go on without it: {_first_line(error)}")
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("fastercache"):
            raise
        given = ", ".join(f"{_option_of(name)} {value}" for name, value in asked.items())
        _fail(f"{type(pipe).__name__} cannot be run with {given}: {_first_line(error)}")


def _is_directory(pipeline: str) -> bool:
    return (Path(pipeline) / "model_index.json").is_file()


def _check_source(pipeline: str, download: bool) -> None:
    """One line, before anything is loaded, for what cannot be a pipeline."""
    if pipeline == "shapes" or download or _is_directory(pipeline):
        return
    if Path(pipeline).exists() or not re.fullmatch(HUB_NAME, pipeline):
        _fail(
            f"{pipeline!r} is not a pipeline directory (no model_index.json in it); give one that save_pretrained "
            "wrote, or 'shapes'"
        )


def _load(pipeline: str, dtype: torch.dtype, download: bool) -> Any:
    if pipeline == "shapes":
        return shapes.load(dtype=dtype)
    try:
        return shapes.load_pipeline(pipeline, dtype, download=download)
    except ImportError:
        raise
    except (
        Exception
    ) as error:  # whatever diffusers, transformers and safetensors raise on a directory that is incomplete or broken
        if _is_directory(pipeline):
            _fail(f"{pipeline} cannot be loaded: {_first_line(error)}; save it again with save_pretrained")
        if not download:
            _fail(
                f"{pipeline} is no directory and not on this machine; if it is a name on the Hugging Face hub, add "
                "--download"
            )
        _fail(f"{pipeline} cannot be downloaded: {_first_line(error)}; check the name and the network")


def _default(call: Any, name: str) -> Any:
    """The default of an argument of a pipeline's call; None where there is none."""
    return None if name not in call or call[name].default is inspect.Parameter.empty else call[name].default


def _option_of(argument: str) -> str:
    """The option that stands for an argument of a pipeline's call."""
    return {"num_frames": "frames", "video_length": "frames", "guidance_scale": "guidance"}.get(argument, argument)


def _arguments(pipe: Any, call: Any, *, frames: int | None, **asked: Any) -> dict[str, Any]:
    """Keyword arguments of a pipeline's call: whatever was asked for, by the pipeline's own names, then what its
    weights were made for."""
    frames_name = next((name for name in ("num_frames", "video_length") if name in call), "frames")
    asked = {frames_name: frames} | asked
    asked = {name: value for name, value in asked.items() if value is not None}
    for name in asked:
        if name not in call:
            _fail(f"{type(pipe).__name__} has no argument for --{_option_of(name)}; leave it out")
    return _made_for(pipe, call) | asked


def _made_for(pipe: Any, call: Any) -> dict[str, Any]:
    """LattePipeline's own defaults are those of one checkpoint, 16 frames of 512 x 512; the model's configuration has
    those of any."""
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    if "video_length" not in call or not isinstance(config.get("sample_size"), int) or not config.get("video_length"):
        return {}
    side = config["sample_size"] * pipe.vae_scale_factor
    return {"video_length": config["video_length"], "height": side, "width": side}


@app.command("inspect", epilog=NAMES)
@_one_line_errors()
def inspect_schedule(
    schedule: Annotated[str, typer.Argument(help=f"{SCHEDULE}.")],
    steps: StepsOption = None,
    guidance: Annotated[
        bool | None,
        typer.Option(
            "--guidance/--no-guidance", help="With or without classifier-free guidance; default: as the system has it."
        ),
    ] = None,
    system_name: Annotated[
        str | None,
        typer.Option(
            "--system",
            help="Say what it saves and keeps at the published size of this system; default: that of a preset.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The schedule, its phases and savings as JSON.")] = False,
) -> None:
    """Draw a schedule: what each step computes, blends and leaves out; for a preset also what that saves at the
    published sizes."""
    source = policies.resolve(schedule)
    if system_name is None and schedule in policies.PRESETS:
        system_name = schedule.partition("/")[0]
    if system_name is not None and system_name not in SYSTEMS:
        _fail(f"--system {system_name}: known are {', '.join(SYSTEMS)}")
    system = None if system_name is None else SYSTEMS[system_name]
    if guidance is None:
        guidance = system is None or system.guided
    if isinstance(source, Schedule) and steps not in (None, len(source)):
        _fail(f"{schedule} has {len(source)} steps, not {steps}; leave out --steps, or name a policy")
    default = 50 if system is None else system.steps
    drawn = policies.built(source, _steps(source, steps, default), guidance)
    if not guidance:
        drawn = drawn.without_guidance()
    costs = {} if system is None else charts.costs(system, make_plan(drawn, guidance, system.tree))
    phases, saved = charts.phases(drawn, guidance), charts.saved(drawn, guidance)
    if as_json:
        document = {"schedule": json.loads(drawn.to_json()), "steps": len(drawn), "phases": phases, "skipped": saved}
        typer.echo(json.dumps(document | costs, indent=1))
        return

    title = Text(drawn.name, style="bold")
    title.append(f", {len(drawn)} steps, {'with' if guidance else 'without'} guidance\n", style="not bold")
    console.print(title, soft_wrap=True)
    console.print(charts.chart(drawn, guidance))
    console.print(charts.coefficients(drawn.steps, guidance), markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("phase", "branches", "blended"):
        table.add_column(heading, no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    for number, phase in enumerate(phases, 1):
        table.add_row(
            str(number),
            " + ".join(phase["branches"]) or "none",
            ", ".join(phase["blended"]) or "nothing",
            str(len(phase["steps"])),
        )
    _print_table(table)
    for what, share in saved.items():
        console.print(
            f"skipped  {share['skipped'] / share['of']:>4.0%} of {what} ({share['skipped']} of {share['of']})",
            soft_wrap=True,
        )
    if system is not None:
        _print_costs(system, costs)


def _print_table(table: Table) -> None:
    """As wide as its names, on a narrow screen too."""
    Console(width=1000, highlight=False, file=console.file).print(table)


def _print_costs(system: System, costs: dict[str, Any]) -> None:
    console.print(f"\n{system.name}, {system.video} ({system.source})", soft_wrap=True, markup=False)
    for run, flops in costs["flops"].items():
        console.print(f"{run:<9}{flops / 1e15:>9.3f} PFLOPs, {costs['macs'][run] / 1e15:.3f} PMACs")
    console.print(f"ratio    {costs['flops_ratio']:>9.3f}")
    for entry in costs["kept"]:
        sites = f"{entry['sites']} {entry['kind']} site{'s' * (entry['sites'] > 1)}"
        console.print(
            f"kept     {entry['tensors']:>9} tensors of {sites}, {' + '.join(entry['branches'])}", soft_wrap=True
        )
    for storage, size in costs["cache_bytes"].items():
        console.print(f"cache    {size / 1e9:>9.2f} GB as {storage}")
    holds = (
        f"holds them and the cache as {costs['fits_80_gb']}"
        if costs["fits_80_gb"]
        else "holds them with the cache in no format"
    )
    console.print(
        f"weights  {costs['weight_bytes'] / 1e9:>9.2f} GB; an 80 GB GPU {holds}, and 12 GB of activations",
        soft_wrap=True,
    )


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Versions, device, and which code serves each op."""
    versions, machine = environment.versions(), environment.machine()
    if as_json:
        document = {
            "versions": versions,
            "machine": machine,
            "ops": ops.implementations(),
            "notes": ops.fallback_reasons(),
        }
        typer.echo(json.dumps(document, indent=1))
        return
    for name, version in versions.items():
        console.print(f"{name:<14}{version or 'not installed'}")
    console.print(
        f"{'cpu':<14}{machine['cpu']}, {machine['cores']} cores, of which torch uses {machine['torch_threads']}",
        soft_wrap=True,
    )
    console.print(f"{'gpu':<14}{machine['gpu'] or 'none'}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("op", "on the CPU", "on a GPU"):
        table.add_column(heading, no_wrap=True)
    for name, code in ops.implementations().items():
        table.add_row(name, code["cpu"], code["cuda"])
    _print_table(table)
    for reason in ops.fallback_reasons():
        console.print(f"note: {reason}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
