"""What the processes of tests/test_parallel.py do: small models, each made alone and then divided between them."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from models import Values, latents_of, mask
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import fastercache
from fastercache import Prediction, Schedule, Step, cli, shapes
from fastercache.cache import room
from fastercache.cache.budget import Limit

HAND_MADE = Schedule(
    (
        Step(),
        Step(),
        Step("both", ("mlp[:1]",), (0.9, 0.1), own_taps=(("mlp[:1]@uncond", (1.0,)),)),
        Step("cond", ("attention",), (1.2, -0.2), low=1.1, high=0.9),
        Step("none", prediction=Prediction((1.7, -0.7), 0.05, -0.05)),
        Step(),
        Step("both", ("block[1:]",), (1.0,), prediction=Prediction((0.1,), fresh=0.9)),
        Step("cond", ("stack",), (1.0,)),
        Step("none", prediction=Prediction((1.4, -0.4))),
    ),
    name="hand-made",
)
"""As a calibrated schedule is: coefficients of its own, differing between branches, predictions summed and corrected,
steps that run nothing."""


def values(model: torch.nn.Module, rows: int, size: int) -> dict[str, Any]:
    """Arguments of a call that divides among `size` processes: 2 * size frames of 8 x 8 latents."""
    random, name, frames = Values(next(model.parameters()).dtype, 1), type(model).__name__, 2 * size
    time = torch.full((rows,), 500.0).to(random.dtype)
    shape = (rows, frames, 2, 8, 8) if name.startswith(("Vchitect", "CogVideoX")) else (rows, 2, frames, 8, 8)
    if name == "LTXVideoTransformer3DModel":
        shape = (rows, frames * 64, 4)
    if name == "STDiT3":
        return {
            "x": random(*shape),
            "timestep": time,
            "y": random(rows, 1, 5, 12),
            "mask": mask(max(rows // 2, 1), 5),
            "x_mask": torch.arange(frames).expand(rows, frames) > 0,
            "fps": torch.full((1,), 24.0, dtype=random.dtype),
            "height": torch.full((1,), 64.0),
            "width": torch.full((1,), 64.0),
        }
    texts: dict[str, Any] = {"encoder_hidden_states": random(rows, 5, 16 if name.startswith("Mochi") else 12)}
    if name.startswith(("Mochi", "Hunyuan")):
        texts["encoder_attention_mask"] = mask(rows, 5)
    if name.startswith(("Hunyuan", "Vchitect")):
        texts["pooled_projections"] = random(rows, 6)
    if name.startswith("Hunyuan"):
        texts["guidance"] = torch.full((rows,), 6000.0).to(random.dtype)
    if name.startswith("CogVideoX"):
        angles = random(frames * 16, 8)
        texts["image_rotary_emb"] = (angles.cos(), angles.sin())
    if name.startswith("LTX"):
        text = 4 * size
        texts = {"encoder_hidden_states": random(rows, text, 12), "encoder_attention_mask": mask(rows, text)}
        texts |= {"num_frames": frames, "height": 8, "width": 8}
    if name == "LatteT2V":
        texts = {"encoder_hidden_states": random(rows, 1, 5, 12), "encoder_attention_mask": mask(rows, 5)[:, None]}
    return {"hidden_states": random(*shape), "timestep": time, "return_dict": False} | texts


LAYOUTS = {
    "cogvideox": "uncond-first",
    "latte": "uncond-first",
    "latte_t2v": "uncond-first",
    "mochi": "uncond-first",
    "ltx": "uncond-first",
    "stdit3": "cond-first",
    "wan": "cond-then-uncond",
    "vchitect": "uncond-then-cond",
    "hunyuan": "none",
}


def model_of(name: str, size: int, dtype: torch.dtype = torch.float64, frames: int = 0) -> torch.nn.Module:
    if name == "latte":
        return models.ready(models.latte(dtype, frames=frames or 2 * size), dtype)
    build = (models.MODELS | models.OTHERS | models.TWO_CALLS)[name]
    return build(dtype) if size == 2 else build(dtype, heads=size)


def sample(model: torch.nn.Module, name: str, steps: int, size: int) -> torch.Tensor:
    """A closed loop with guidance 3: the latents after every step, `[steps, ...]`."""
    layout, rows = LAYOUTS[name], 1 if "then" in LAYOUTS[name] else 2
    cond = values(model, rows, size)
    key, path = latents_of(cond), []
    text = "y" if "y" in cond else "encoder_hidden_states"
    uncond = cond | {text: 0.5 * cond[text].flip(1)}
    latents = cond[key][:1] if layout != "none" else cond[key]

    def predicted(arguments: dict[str, Any], state: torch.Tensor) -> torch.Tensor:
        output = model(**arguments | {key: state.clone()})
        found = output if isinstance(output, torch.Tensor) else output[0]
        if type(model).__name__.startswith("Vchitect"):
            found = found.unflatten(0, (len(state), -1))
        channels = state.shape[1]
        return found[:, :channels].to(state.dtype) if found.shape != state.shape else found.to(state.dtype)

    for _ in range(steps):
        if layout == "none":
            total = predicted(cond, latents)
        elif "then" in layout:
            pair = {branch: predicted(one, latents) for branch, one in _in_order(layout, cond, uncond)}
            total = pair["uncond"] + 3 * (pair["cond"] - pair["uncond"])
        else:
            first, second = predicted(cond, latents.repeat(2, *[1] * (latents.dim() - 1))).chunk(2)
            e_u, e_c = (first, second) if layout == "uncond-first" else (second, first)
            total = e_u + 3 * (e_c - e_u)
        latents = latents - 0.1 * total
        path.append(latents)
    return torch.stack(path)


def _in_order(layout: str, cond: dict[str, Any], uncond: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    both = [("cond", cond), ("uncond", uncond)]
    return both if layout == "cond-then-uncond" else both[::-1]


def dtype_of(name: str) -> torch.dtype:
    """float64, in which only an error is larger than rounding; STDiT3 gives float32 whatever it runs in."""
    return torch.float32 if name == "stdit3" else torch.float64


def same_as_alone(rank: int, size: int, name: str, schedules: dict[str, int]) -> dict[str, Any]:
    """Largest differences of a run that is divided to the same run alone, uncached and by each schedule (a name, with
    its steps), and what the summaries say."""
    model, found = model_of(name, size, dtype_of(name)), {}
    uncached = sample(model, name, 3, size)
    alone = {one: (cached(model, one, steps, name, size)) for one, steps in schedules.items()}
    fastercache.parallelize(model)
    found["uncached"] = float((sample(model, name, 3, size) - uncached).abs().max())
    for one, steps in schedules.items():
        expected, before = alone[one]
        path, summary = cached(model, one, steps, name, size)
        found[one] = float((path - expected).abs().max()), summary.as_dict(), before.as_dict()
    found["restored"] = float((sample(model, name, 3, size) - uncached).abs().max())
    return found


def cached(
    model: torch.nn.Module, schedule: str, steps: int, name: str, size: int, **options: Any
) -> tuple[torch.Tensor, fastercache.Summary]:
    fastercache.compile(model, HAND_MADE if schedule == HAND_MADE.name else schedule, **options)
    with fastercache.run(model, steps=steps, cfg=LAYOUTS[name]):  # type: ignore[arg-type]
        path = sample(model, name, steps, size)
    summary = fastercache.summary(model)
    fastercache.restore(model)
    return path, summary


def carried(rank: int, size: int) -> tuple[float, float, dict[str, Any]]:
    """The embedded pipeline "wan" with the schedule that it carries, alone and divided: the largest difference of the
    latents, that of uncached ones, and the summary of the divided run."""
    pipe = shapes.load("wan")
    pipe.set_progress_bar_config(disable=True)
    call = dict(shapes.PIPELINES["wan"].call) | {"guidance_scale": shapes.PIPELINES["wan"].guidance_scale}
    prompt = shapes.PIPELINES["wan"].world.scenes[5].prompt

    def latents() -> torch.Tensor:
        return pipe(prompt, generator=torch.Generator().manual_seed(3), output_type="latent", **call).frames

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        plain = latents()
        fastercache.compile(pipe)
        cached = latents()
        return plain, cached

    alone = both()
    fastercache.restore(pipe)
    fastercache.parallelize(pipe)
    plain, divided = (float((a - b).abs().max()) for a, b in zip(alone, both(), strict=True))
    return divided, plain, fastercache.summary(pipe).as_dict()


def in_less_than_lossless(rank: int, size: int, name: str, cache_format: str) -> tuple[float, float]:
    """Root-mean-square error that a cache format makes, alone and divided."""
    model = model_of(name, size, torch.float32)

    def run(format: str) -> torch.Tensor:
        return cached(model, "paper", 12, name, size, cache_format=format)[0]

    exact, alone = run("model"), run(cache_format)
    fastercache.parallelize(model)
    return _rms(alone - exact), _rms(run(cache_format) - exact)


def _rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def in_bfloat16(rank: int, size: int, name: str) -> tuple[float, float]:
    """By how much dividing changes a run in bfloat16, uncached and by the paper's schedule (root-mean-square)."""
    model = model_of(name, size, torch.bfloat16)

    def runs() -> tuple[torch.Tensor, torch.Tensor]:
        return sample(model, name, 12, size), cached(model, "paper", 12, name, size)[0]

    alone = runs()
    fastercache.parallelize(model)
    uncached, scheduled = (_rms(a - b) for a, b in zip(alone, runs(), strict=True))
    return uncached, scheduled


def filled_up(rank: int, size: int, name: str, frames: int) -> tuple[float, dict[str, int]]:
    """How far a run of so many frames of 6 x 6 latents is from the same run alone; bytes kept."""
    model, paths = model_of(name, size, dtype_of(name), frames), []
    inputs = values(model, 2, size)
    key, shape = latents_of(inputs), (2, 2, frames, 6, 6)
    inputs[key] = Values(dtype_of(name), 1)(*shape)
    if name == "stdit3":
        inputs["x_mask"] = torch.arange(frames).expand(2, frames) > 0
    for divide in (False, True):
        if divide:
            fastercache.parallelize(model)
        fastercache.compile(model, HAND_MADE)
        with fastercache.run(model, steps=len(HAND_MADE), cfg=LAYOUTS[name]):  # type: ignore[arg-type]
            outputs = [model(**inputs) for _ in HAND_MADE.steps]
        paths.append(torch.stack([one if isinstance(one, torch.Tensor) else one[0] for one in outputs]))
        summary = fastercache.summary(model)
        fastercache.restore(model)
    return float((paths[0] - paths[1]).abs().max()), summary.as_dict()["share"]["kept"]


class Counted(TorchDispatchMode):
    """Counts the operations of torch.distributed that are begun inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += "c10d" in func.namespace and "wait_tensor" not in name and "_wrap_tensor" not in name
        return func(*args, **(kwargs or {}))


def collectives_by_step(rank: int, size: int, name: str) -> tuple[list[int], dict[str, Any]]:
    """How many operations of torch.distributed each step of the schedule by hand begins, and the summary's share."""
    model, found = model_of(name, size), []
    fastercache.parallelize(model)
    fastercache.compile(model, HAND_MADE)
    inputs = values(model, 2, size)
    with fastercache.run(model, steps=len(HAND_MADE), cfg=LAYOUTS[name]):  # type: ignore[arg-type]
        for _ in HAND_MADE.steps:
            with Counted() as counted:
                model(**inputs)
            found.append(counted.count)
    return found, fastercache.summary(model).as_dict()["share"]


def wan_with_options(rank: int, size: int, each: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """A run of the small Wan, in which each process has options of its own; the summary."""
    own = dict(each[rank])
    schedule, steps, seed = own.pop("schedule", "paper"), own.pop("steps", 12), own.pop("seed", 1)
    memory = own.pop("memory", None)
    model = fastercache.parallelize(model_of("wan", size, torch.float32))
    fastercache.compile(model, schedule, **own)
    inputs = values(model, 1, size)
    inputs["hidden_states"] = Values(torch.float32, seed)(*inputs["hidden_states"].shape)
    with pytest.MonkeyPatch.context() as patch:
        if memory is not None:
            patch.setattr(room, "room", lambda *_: Limit(memory, f"the {memory} bytes left"))
        with fastercache.run(model, steps=steps, cfg="cond-then-uncond"):
            for _ in range(2 * steps):
                model(**inputs)
    return fastercache.summary(model).as_dict()


def of_another_size(rank: int, size: int, name: str, *shape: int) -> None:
    """A run on latents of another shape."""
    model = fastercache.parallelize(model_of(name, size))
    inputs = values(model, 2, size) | {"hidden_states": torch.zeros(shape, dtype=torch.float64)}
    fastercache.compile(model, "paper")
    with fastercache.run(model, steps=12, cfg="uncond-first"):
        model(**inputs)


def divided(rank: int, size: int, name: str, kind: str = "ulysses", heads: int = 2) -> None:
    """Divide a model, and no more."""
    build = (models.MODELS | models.OTHERS | models.TWO_CALLS)[name]
    fastercache.parallelize(build(torch.float32, heads=heads) if heads != 2 else build(torch.float32), kind)


def divided_again(rank: int, size: int) -> None:
    fastercache.parallelize(fastercache.parallelize(models.wan()))


def compiled_then_divided(rank: int, size: int) -> None:
    fastercache.parallelize(fastercache.compile(models.wan()))


def compiled(rank: int, size: int, name: str, regional: bool) -> dict[str, Any]:
    """How far a divided run of compiled phases is from the same run as it is."""
    model, layout = model_of(name, size, dtype_of(name)), LAYOUTS[name]
    fastercache.parallelize(model)
    expected, _ = cached(model, HAND_MADE.name, len(HAND_MADE), name, size)
    path, summary = cached(model, HAND_MADE.name, len(HAND_MADE), name, size, backend="aot_eager", regional=regional)
    return {"difference": float((path - expected).abs().max()), "compiled": summary.compiled, "layout": layout}


def divided_by_diffusers(rank: int, size: int, foreign: bool) -> dict[str, Any]:
    """Wan, by its own method, with the plan of its class or another; how far it is from the run alone."""
    from diffusers import ContextParallelConfig

    model = models.wan()
    expected, _ = cached(model, "paper", 12, "wan", size)
    plan = {path: entry for path, entry in model._cp_plan.items() if path} if foreign else None
    torch.accelerator.device_count = lambda: 1
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size), cp_plan=plan)
    hooks = list(model._diffusers_hook.hooks) if not foreign else []
    path, summary = cached(model, "paper", 12, "wan", size)
    assert foreign or list(model._diffusers_hook.hooks) == hooks
    return {"difference": float((path - expected).abs().max()), "share": summary.as_dict()["share"]}


def branches_apart(rank: int, size: int, policy: str) -> None:
    """Four processes, in a mesh with two groups for the branches."""
    from diffusers import ContextParallelConfig

    model = models.wan()
    torch.accelerator.device_count = lambda: 1
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("cfg", "ring", "ulysses"))
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2, mesh=mesh))
    cached(model, policy, 12, "wan", 2)


def lost(rank: int, size: int, how: str) -> None:
    """In the middle of a run the second process raises or is killed."""
    model = fastercache.parallelize(model_of("cogvideox", size))
    fastercache.compile(model)
    inputs = values(model, 2, size)
    with fastercache.run(model, steps=12, cfg="uncond-first"):
        for number in range(12):
            if number == 5 and rank == 1:
                print(f"process 1 ends at {time.time()}", flush=True)
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ValueError("something of this process alone")
            model(**inputs)


def launched(how: str) -> None:
    """`lost`, in a process that a launcher has started."""
    dist.init_process_group("gloo")
    with torch.no_grad():
        lost(dist.get_rank(), dist.get_world_size(), how)


def command(rank: int, size: int, arguments: list[str], folder: str) -> tuple[int, str, str]:
    """The command line on every process, each with a file of its own to write: exit code, standard output and
    error."""
    result = CliRunner().invoke(cli.app, [*arguments, "--out", f"{folder}/{rank}.gif"])
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # for what `work` does at its end
    return result.exit_code, result.stdout, result.stderr


def flops(rank: int, size: int, name: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Operations of a run alone, and of one divided: those of all processes."""
    model, found = model_of(name, size), []
    for divide in (False, True):
        if divide:
            fastercache.parallelize(model)
        counted = cached(model, "paper", 12, name, size)[1].flops
        found.append((counted.uncached, counted.cached))
    return found[0], found[1]


def a_time_for_each_token(rank: int, size: int) -> tuple[float, tuple[int, int], tuple[int, int]]:
    """Wan with timesteps `[rows, tokens]`, as for a given first frame: how far a divided run is from one alone, and the
    operations of both."""
    model, paths, flops = model_of("wan", size), [], []
    inputs = values(model, 1, size)
    inputs["timestep"] = 10.0 * torch.arange(16.0 * 2 * size, dtype=torch.float64)[None]
    for divide in (False, True):
        if divide:
            fastercache.parallelize(model)
        fastercache.compile(model)
        with fastercache.run(model, steps=6, cfg="none"):
            paths.append(torch.stack([model(**inputs)[0] for _ in range(6)]))
        counted = fastercache.summary(model).flops
        flops.append((counted.uncached, counted.cached))
        fastercache.restore(model)
    return float((paths[0] - paths[1]).abs().max()), *flops


def two_experts(rank: int, size: int) -> list[dict[str, Any]]:
    """Two models of one run, as those of Wan 2.2, whose blocks lie around each other; each one's share, and that of a
    run that somebody else's collective falls into."""
    pair = [fastercache.parallelize(model_of("wan", size)) for _ in range(2)]
    for model in pair:
        fastercache.compile(model)
    inputs = values(pair[0], 1, size)
    with fastercache.run(pair[0], steps=6, cfg="none"), fastercache.run(pair[1], steps=6, cfg="none"):
        for model in pair:
            for _ in range(6):
                model(**inputs)
    shares = [fastercache.summary(model).as_dict()["share"] for model in pair]
    with fastercache.run(pair[0], steps=6, cfg="none"):
        for number in range(6):
            pair[0](**inputs)
            if number in (2, 5):
                dist.barrier()
    return [*shares, fastercache.summary(pair[0]).as_dict()["share"]]


def work(rank: int, size: int, meeting: str, job: Any, arguments: tuple, answers: Any) -> None:
    """In a process of its own: meet the others, do a job, and send what it returns or the error that it raised."""
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)
    start = time.perf_counter()
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
        with torch.no_grad():
            answer = job(rank, size, *arguments)
        dist.barrier()
        answers.put((rank, "done", answer, time.perf_counter() - start))
        dist.destroy_process_group()
    except Exception as error:
        answers.put((rank, type(error).__name__, str(error), time.perf_counter() - start))
