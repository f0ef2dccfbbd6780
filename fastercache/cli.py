"""The command `fastercache`: demo, sample, batch, calibrate, evaluate, inspect, info."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

import fastercache
from fastercache import demo as demonstration
from fastercache import ops, sampling, shapes
from fastercache.cache import formats
from fastercache.errors import FasterCacheError, FasterCacheWarning
from fastercache.host import carried, environment, processes, steady
from fastercache.report import charts
from fastercache.report.published import SYSTEMS, System
from fastercache.sampling import first_line
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


EXTRAS = {"torchmetrics": "metrics", "torchvision": "metrics"}
"""The extra that brings a package; the others come with `demo`."""
MOST_STEPS, MOST_SEED = 10_000, 2**63 - 1


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
    str | None,
    typer.Option(
        "--schedule",
        help=(
            f"{SCHEDULE}; `fastercache inspect --help` has the names. Default: what the pipeline carries for such a "
            "run, else the paper's."
        ),
    ),
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
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale; default: the pipeline's own.",
        callback=_number("guidance", "give a number, such as 5"),
    ),
]
HeightOption = Annotated[int | None, typer.Option(min=1, help="Pixels; default: what the pipeline was made for.")]
WidthOption = HeightOption
FramesOption = Annotated[
    int | None, typer.Option(min=1, help="Length of the video; default: what the pipeline was made for.")
]
DeviceOption = Annotated[Device, typer.Option()]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: bfloat16 on a GPU, float32 on the CPU.")]
CacheFormatOption = Annotated[
    str | None,
    typer.Option(
        help=(
            f"How caches are stored: {', '.join(formats.known())}; default: the best that "
            "fits --max-cache-gb, lossless without it."
        ),
        callback=_known_format,
    ),
]
MaxCacheOption = Annotated[
    float | None,
    typer.Option(
        help="Most gigabytes (1e9 bytes) the caches may take.",
        callback=_number("max-cache-gb", "give a number of gigabytes, or leave the option out for no limit", least=0),
    ),
]
AttentionOption = Annotated[
    str | None,
    typer.Option(help="diffusers' attention backend, such as flash, or auto: times the exact ones that are installed."),
]
DownloadOption = Annotated[bool, typer.Option("--download", help="Let diffusers fetch what is not on this machine.")]
PipelineArgument = Annotated[
    str,
    typer.Argument(
        help=f"A diffusers pipeline directory, a name on the hub, or an embedded one: {', '.join(shapes.PIPELINES)}."
    ),
]


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
        package = (error.name or "").split(".")[0]
        missing = f"{package} is not installed" if package else str(error).strip().splitlines()[0]
        _fail(f'{missing}: pip install "fastercache[{EXTRAS.get(package, "demo")}]"')
    except torch.OutOfMemoryError as error:
        _fail(
            f"out of memory: {first_line(error)}; try --cache-format int8-int4, fewer --frames, or a smaller --height "
            "and --width"
        )
    except (FasterCacheError, OSError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        problems.print("interrupted; nothing was written")
        raise typer.Exit(130) from None


def _steady(screen: Console) -> None:
    """Settle the allocator and the number of threads of this process, and say how many there are."""
    steady.steady_allocator()
    screen.print(steady.choose_threads(), soft_wrap=True)


def _steps(schedule: Schedule | Policy | None, asked: int | None, default: int = 50) -> int:
    """As asked; else the length of a fixed schedule, or the default."""
    return asked or (len(schedule) if isinstance(schedule, Schedule) else default)


@app.command()
@_one_line_errors()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for video, picture and numbers.")] = Path("out/demo"),
    prompt: Annotated[list[str] | None, typer.Option(help="Such as 'a red circle moving right'; repeatable.")] = None,
    schedule: ScheduleOption = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.float32,
) -> None:
    """The embedded text-to-video model on your CPU: uncached beside accelerated, timed and measured."""
    plan = None if schedule is None else carried.resolve(schedule)
    _steady(console)
    demonstration.run_demo(
        out, prompt or demonstration.PROMPTS, plan, _steps(plan, steps), seed, dtype.on("cpu"), console
    )


@app.command()
@_one_line_errors()
def sample(
    pipeline: PipelineArgument,
    prompt: Annotated[str, typer.Option(help="What to show.")],
    schedule: ScheduleOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option(help="The video: .mp4, .mov, .mkv, .gif, or .png for one frame.")] = Path(
        "out/sample.mp4"
    ),
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    cache_format: CacheFormatOption = None,
    max_cache_gb: MaxCacheOption = None,
    attention_backend: AttentionOption = None,
    context_parallel: Annotated[
        ContextParallel | None,
        typer.Option(
            help="One video over all processes that torchrun started: ulysses, or ring on GPUs (not measured)."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also sample uncached, and show both side by side.")
    ] = False,
    download: DownloadOption = False,
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
    named = None if schedule is None else carried.resolve(schedule, download=download)
    demonstration.check_prompt(prompt, pipeline)
    place = sampling.device_here(device.value)
    if place == "cuda" and context_parallel is not None:
        processes.refuse_shared_gpu()
    media.check_suffix(out)
    sampling.check_source(pipeline, download)
    if first:
        media.check_writable(out)
    pipe = _loaded(pipeline, place, dtype, download, screen)
    plan = named or carried.resolve(None, pipe)
    arguments = sampling.arguments(pipe, height=height, width=width, frames=frames, guidance_scale=guidance)
    steps = _steps(plan, steps, sampling.default(pipe, "num_inference_steps") or sampling.STEPS)
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
            runs = demonstration.with_and_without(pipe, demonstration.warm_up_steps(plan, steps))
            takes = demonstration.generate_takes(
                pipe, [prompt], runs, steps=steps, seed=seed, console=screen, **arguments
            )
            uncached, cached = takes[0].clips
            clip, seconds = cached.frames, cached.seconds
            psnr = metrics.psnr(uncached.frames[None], clip[None])
            found["uncached_seconds"] = round(uncached.seconds, 3)
            found["psnr_db"] = round(psnr, 2) if math.isfinite(psnr) else None
            text = f"uncached {uncached.seconds:.2f} s, fastercache {seconds:.2f} s: {demonstration.gains(takes, 1)}"
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
        media.save(out, demonstration.comparison_of(takes, {"fastercache": summary}), loops=demonstration.LOOPS)
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


def _loaded(pipeline: str, place: str, dtype: Dtype, download: bool, screen: Console) -> Any:
    """The pipeline on its device; on a CPU, allocator and threads are settled first."""
    if place == "cpu":
        _steady(screen)
    with screen.status(f"loading {pipeline}"):
        return sampling.load(pipeline, dtype.on(place), download).to(place)


class Effort(str, Enum):
    full = "full"
    quick = "quick"


EXAMPLES, EXAMPLE_SEED = 2, 1_000_003
"""Prompts of which a calibration leaves example videos, and the seed of the first: none that is likely to have served
before."""


def _targets(text: str | None) -> tuple[float, ...] | None:
    """The value of --frontier."""
    if text is None:
        return None
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(math.isfinite(each) and each > 1 for each in found):
        _fail(f"--frontier {text}: give speed-ups over 1 with commas between them, such as 1.5,2,3,4")
    return found


def _prompts_in(file: Path) -> list[str]:
    """The lines of a file that are neither empty nor comments."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        _fail(f"--prompts {file}: it is not text in UTF-8 ({error.reason})")
    except OSError as error:
        _fail(f"--prompts {file} cannot be read: {error.strerror or error}")
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        _fail(f"--prompts {file}: there is no prompt in it; write one a line (lines that begin with # do not count)")
    return prompts


@app.command()
@_one_line_errors()
def calibrate(
    pipeline: PipelineArgument,
    prompts: Annotated[Path, typer.Option(help="A file with one prompt a line; lines that begin with # do not count.")],
    steps: Annotated[int, typer.Option("--steps", min=1, max=MOST_STEPS, help="Denoising steps of the runs.")] = 50,
    speedup: Annotated[
        float | None, typer.Option(help="How many times faster the denoiser is to be: the best video at that.")
    ] = None,
    psnr: Annotated[
        float | None, typer.Option(help="PSNR in dB to uncached videos that is to be kept: the fastest at that.")
    ] = None,
    frontier: Annotated[
        str | None, typer.Option(help="Several speed-ups, such as 1.5,2,3,4: a schedule for each.")
    ] = None,
    effort: Annotated[
        Effort, typer.Option(help="quick: fewer prompts and candidates, for models that take minutes a video.")
    ] = Effort.full,
    guidance: GuidanceOption = None,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    download: DownloadOption = False,
    out: Annotated[Path, typer.Option(help="Folder for schedules, report and example videos.")] = Path("out/calibrate"),
) -> None:
    """Make schedules for a pipeline's runs: steps chosen and coefficients fitted on a few prompts, measured on others.

    Interrupted, the same command goes on from where it was.
    """
    from fastercache.report import calibration, media

    asked = {"speedup": speedup, "psnr": psnr, "frontier": _targets(frontier)}
    target = {name: value for name, value in asked.items() if value is not None}
    if len(target) != 1:
        _fail("give one of --speedup, --psnr and --frontier: what the schedules are to reach")
    for name, least in (("speedup", 1), ("psnr", 0)):
        value = asked[name]
        if isinstance(value, float) and not (math.isfinite(value) and value > least):
            _fail(f"--{name} {value}: give a number over {least}")
    texts = _prompts_in(prompts)
    for prompt in texts:
        demonstration.check_prompt(prompt, pipeline)
    place = sampling.device_here(device.value)
    sampling.check_source(pipeline, download)
    for name in (calibration.REPORT, *(f"examples{suffix}" for suffix in demonstration.FILM)):
        media.check_writable(out / name)
    pipe = _loaded(pipeline, place, dtype, download, console)
    arguments = sampling.arguments(pipe, height=height, width=width, frames=frames, guidance_scale=guidance)
    with _refusals(pipe, {"steps": steps} | arguments):
        try:
            found = fastercache.calibrate(
                pipe,
                texts,
                num_inference_steps=steps,
                speedup=speedup,
                psnr=psnr,
                frontier=_targets(frontier),
                effort=effort.value,
                call=arguments,
                out=out,
                progress=True,
            )
            schedules = [found] if isinstance(found, Schedule) else list(found)
            written = [out / name for name in calibration.file_names(schedules)]
            takes, summaries = _examples(pipe, texts[:EXAMPLES], schedules, steps, arguments)
        except KeyboardInterrupt:
            problems.print(
                f"interrupted; what was captured is kept in {out}, and the same command goes on from there",
                markup=False,
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
    demonstration.film(out / "examples", takes, summaries)
    for number, (schedule, path) in enumerate(zip(schedules, written, strict=True), 1):
        figures = schedule.measured or "not measured"
        console.print(f"{schedule.name}: {figures}", markup=False, soft_wrap=True)
        gains = demonstration.gains(takes, number)
        console.print(f"  {path}; of the example videos: {gains}", markup=False, soft_wrap=True)
    console.print(f"wrote {out}", markup=False, soft_wrap=True)


def _examples(
    pipe: Any, prompts: Sequence[str], schedules: Sequence[Schedule], steps: int, arguments: dict[str, Any]
) -> tuple[list[Any], dict[str, fastercache.Summary]]:
    """Clips of prompts uncached and with each schedule, and the schedules' summaries; nothing is warmed up, as
    calibration has run it all."""
    summaries: dict[str, fastercache.Summary] = {}
    names = [schedule.name for schedule in schedules]
    named = {
        name if names.count(name) == 1 else f"{name} ({number})": schedule
        for number, (name, schedule) in enumerate(zip(names, schedules, strict=True), 1)
    }
    runs = {
        name: run._replace(warm_up=0) for name, run in demonstration.with_each(pipe, named, steps, summaries).items()
    }
    takes = demonstration.generate_takes(
        pipe, prompts, runs, steps=steps, seed=EXAMPLE_SEED, console=console, **arguments
    )
    return takes, summaries


@contextmanager
def _refusals(pipe: Any, asked: dict[str, Any]) -> Iterator[None]:
    """What a pipeline or its model raises about sizes and numbers that it was asked for is one line, too."""
    try:
        yield
    except (FasterCacheError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        if processes.is_of_another(error):
            _fail(f"another process has ended, and this one cannot go on without it: {first_line(error)}")
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        if trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("fastercache"):
            raise
        given = ", ".join(f"{sampling.option_of(name)} {value}" for name, value in asked.items())
        _fail(f"{type(pipe).__name__} cannot be run with {given}: {first_line(error)}")


class Names(str, Enum):
    line = "line"
    vbench = "vbench"


@app.command()
@_one_line_errors()
def batch(
    pipeline: PipelineArgument,
    prompts: Annotated[
        Path,
        typer.Argument(
            help='A JSON object a line: "prompt", and if you like "name", "seed" and arguments of the pipeline\'s call.'
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the videos, each with a JSON beside it.")],
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on Ray, a GPU or a share of the cores each; default: one for each GPU."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="A cluster of Ray that runs: host:port, or auto for this machine's."),
    ] = None,
    schedule: ScheduleOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = 0,
    height: HeightOption = None,
    width: WidthOption = None,
    frames: FramesOption = None,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = Dtype.auto,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each worker on the CPU; default: its share of the cores.")
    ] = None,
    cache_format: CacheFormatOption = None,
    max_cache_gb: MaxCacheOption = None,
    attention_backend: AttentionOption = None,
    backend: Annotated[
        str | None,
        typer.Option(help="Compile the phases, once in each worker: torch.compile's backend, as inductor."),
    ] = None,
    regional: Annotated[
        bool, typer.Option("--regional", help="Compile the repeated block instead of the whole model.")
    ] = False,
    names: Annotated[
        Names, typer.Option(help="Of lines without one: the line's number, or prompt-index as VBench reads them.")
    ] = Names.line,
    suffix: Annotated[str, typer.Option(help="Of the videos, as `sample --out` may end.")] = ".mp4",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make the videos that are there again.")] = False,
    download: DownloadOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sample a list of prompts, on one process or many; run it again to go on where it ended.

    Ends with 1 if a prompt failed.
    """
    from fastercache.batch import jobs as lists
    from fastercache.batch import pools, run
    from fastercache.batch.worker import Setup
    from fastercache.report import media

    screen = problems if as_json else console
    plan = None if schedule is None else carried.resolve(schedule, download=download)
    if steps is not None and isinstance(plan, Schedule) and steps != len(plan):
        _fail(f"{schedule} has {len(plan)} steps, not {steps}; leave out --steps, or name a policy")

    def check(job: lists.Job) -> None:
        asked = job.arguments.get("num_inference_steps")
        if asked is not None and isinstance(plan, Schedule) and asked != len(plan):
            raise lists.BatchError(f"num_inference_steps is {asked}, but {schedule} has {len(plan)} steps")
        demonstration.check_prompt(job.prompt, pipeline)

    asked = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": height,
        "width": width,
        "frames": frames,
    }
    found = lists.read_jobs(
        prompts,
        names=names.value,
        seed=seed,
        arguments={name: value for name, value in asked.items() if value is not None},
        check=check,
    )
    folder = lists.Folder(out, suffix)
    media.check_suffix(folder.video(found[0]))
    sampling.check_source(pipeline, download)
    pool: pools.Pool
    if workers is None and ray is None and (device is Device.cpu or torch.cuda.device_count() < 2):
        pool = pools.InProcess(device.value)
    else:
        pool = pools.RayPool(workers, ray, device.value)
    options = {
        "cache_format": cache_format,
        "max_cache_bytes": None if max_cache_gb is None else int(max_cache_gb * 1e9),
        "attention_backend": attention_backend,
        "backend": backend,
        "regional": regional,
    }
    precision = dtype.on(pool.device)
    common = {
        "pipeline": str(Path(pipeline).resolve()) if sampling.is_directory(pipeline) else pipeline,
        "schedule": json.loads(plan.to_json()) if isinstance(plan, Schedule) else schedule,
        "dtype": str(precision).removeprefix("torch."),
        "suffix": suffix,
        **options,
    }
    setup = Setup(pipeline, plan, pool.device, precision, pool.threads(threads), suffix, download, options)
    try:
        result = run.run_batch(found, folder, setup, pool, common, overwrite=overwrite, screen=screen)
    except KeyboardInterrupt:
        problems.print(f"interrupted; what is in {out} is whole, and the same command goes on", soft_wrap=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps({"out": str(out), **vars(result)}, indent=1))
    else:
        console.print(
            f"{len(result.made)} made, {len(result.there)} were there, {len(result.failed)} failed, of {len(found)} in "
            f"{out}",
            markup=False,
            soft_wrap=True,
        )
    if result.failed:
        raise typer.Exit(1)


@app.command()
@_one_line_errors()
def evaluate(
    reference: Annotated[Path, typer.Argument(help="Folder of videos, such as uncached ones.")],
    output: Annotated[Path, typer.Argument(help="Folder of videos by the same names.")],
    metrics: Annotated[str, typer.Option(help="psnr, ssim, lpips and vbench, with commas.")] = "psnr,ssim",
    dimensions: Annotated[
        str | None, typer.Option(help="VBench's, with commas; default: all that serve any video.")
    ] = None,
    device: DeviceOption = Device.auto,
    as_json: JsonOption = False,
) -> None:
    """Compare two folders of videos by the same names. Downloads nothing."""
    from fastercache.report import evaluation, vbench

    names = evaluation.parse_metrics(metrics)
    chosen = vbench.DIMENSIONS if dimensions is None else [one.strip() for one in dimensions.split(",")]
    screen = problems if as_json else console
    with Progress(console=screen, transient=True) as bar:
        task = bar.add_task("videos", total=None)
        found = evaluation.evaluate(
            reference,
            output,
            names,
            dimensions=chosen,
            device=sampling.device_here(device.value),
            on_pair=lambda done, of: bar.update(task, completed=done, total=of),
        )
    for place in ("reference", "output"):
        if lonely := found[f"only_in_{place}"]:
            problems.print(
                f"only in the {place}, and left out: {', '.join(lonely)}", style="yellow", markup=False, soft_wrap=True
            )
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (f"{len(found['pairs'])} videos", "mean", "least", "most"):
        table.add_column(heading, no_wrap=True, justify="left" if "videos" in heading else "right")
    for name, row in found["summary"].items():
        digits = 2 if name == "psnr" else 4
        cells = ("inf" if value is None else f"{value:.{digits}f}" for value in row.values())
        table.add_row("psnr (dB)" if name == "psnr" else name, *cells)
    if found["summary"]:
        _print_table(table)
    if "vbench" in found:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("vbench", "reference", "output"):
            table.add_column(heading, no_wrap=True, justify="left" if heading == "vbench" else "right")
        for dimension in chosen:
            table.add_row(dimension, *(f"{found['vbench'][place][dimension]:.4f}" for place in ("reference", "output")))
        _print_table(table)


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
    if drawn.measured is not None:
        console.print(f"measured {drawn.measured}", soft_wrap=True)
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
