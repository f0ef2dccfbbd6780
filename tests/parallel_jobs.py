"""What the processes of tests/test_parallel.py do: small models, each made alone and then divided between them."""

from __future__ import annotations

import os
import time
from typing import Any

import models
import torch
import torch.distributed as dist
from models import Values, latents_of, mask
from torch.utils._python_dispatch import TorchDispatchMode

import fastercache
from fastercache import Prediction, Schedule, Step

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


def model_of(name: str, size: int, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    if name == "latte":
        return models.ready(models.latte(dtype, frames=2 * size), dtype)
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
