"""Compiled phases: how many graphs, what compiling costs, what the engine costs: `python -m bench.graphs`.

Every row is measured in processes of its own: one with an empty cache of torch's compiler ("cold"), one that finds what
the first has left ("warm"), and one that compiles the untouched model, for comparison. The cold process also counts
graphs over three runs, times the engine around a model that does nothing, and holds the compiled run against the eager
one.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastercache
from bench import report, shapes
from fastercache.host import environment
from fastercache.models.registry import family_of
from fastercache.runtime.graphs import GraphOptions
from fastercache.shapes import GUIDANCE_SCALE

STEPS, SHORT = 50, 12
FAMILIES = ("latte", "cogvideox")
"""latte: the denoiser of "shapes", trained. cogvideox: CogVideoX's blocks at a small width, with random weights."""
MOST_PHASES, LEAST_WARM, MOST_ENGINE_US, MOST_COLD_S, ERROR_FACTOR = 4, 0.35, 50.0, 60.0, 3.0
"""The bars: phases, warm over cold seconds, the engine's microseconds a step, cold seconds of "shapes", error over
compiling's own."""
MOST_GROWTH_MB = 1.0
"""Memory in use that the runs after the third may add."""


# ---- models ----------------------------------------------------------------------------------------------------------


def latte(device: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The denoiser of "shapes", and the arguments that its pipeline gives it."""
    pipe = shapes.pipeline()
    seen: dict[str, Any] = {}

    def look(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, hidden_states=args[0] if args else kwargs["hidden_states"])

    handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    shapes.call(pipe, shapes.held_out(1)[0], 1, GUIDANCE_SCALE)
    handle.remove()
    arguments = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in seen.items()}
    return pipe.transformer.to(device), arguments | {"return_dict": False}


def cogvideox(device: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = (
        CogVideoXTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            time_embed_dim=64,
            text_embed_dim=32,
            num_layers=6,
            sample_width=16,
            sample_height=16,
            sample_frames=9,
            patch_size=2,
            temporal_compression_ratio=4,
            max_text_seq_length=8,
        )
        .eval()
        .requires_grad_(False)
    )
    arguments = {
        "hidden_states": torch.randn(2, 3, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 8, 32),
        "timestep": torch.full((2,), 500),
        "return_dict": False,
    }
    return model.to(device), {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }


BUILDERS: dict[str, Callable[[str], tuple[torch.nn.Module, dict[str, Any]]]] = {"latte": latte, "cogvideox": cogvideox}


# ---- one process -----------------------------------------------------------------------------------------------------


class DeviceReads(TorchDispatchMode):
    """Counts the calls for which a host would wait for a GPU."""

    READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func._schema.name in self.READS
        return func(*args, **(kwargs or {}))


def compiled(model: torch.nn.Module, backend: str | None, regional: bool) -> torch.nn.Module:
    options: dict[str, Any] = {"backend": backend, "regional": regional} if backend else {}
    return fastercache.compile(model, steps=STEPS, cfg="uncond-first", **options)


def one_run(model: torch.nn.Module, arguments: dict[str, Any], seed: int = 0) -> None:
    latents = torch.randn(arguments["hidden_states"].shape, generator=torch.Generator().manual_seed(seed)).to(
        arguments["hidden_states"]
    )
    for _ in range(STEPS):
        model(**arguments | {"hidden_states": latents})


class HeapState(ctypes.Structure):
    """glibc's `struct mallinfo2`: bytes given out from the heaps are `uordblks`, from mappings of their own
    `hblkhd`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def mallinfo2() -> HeapState:
    function = ctypes.CDLL(None).mallinfo2
    function.restype = HeapState
    return function()


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def uncached_forwards(
    model: torch.nn.Module, arguments: dict[str, Any], backend: str, regional: bool
) -> Callable[[], Any]:
    """The untouched model compiled, as a call: whole, or block by block as diffusers does it."""
    if not regional:
        whole = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        return lambda: whole(**arguments)
    for path in family_of(model).block_paths(model):
        model.get_submodule(path).compile(backend=backend, fullgraph=True, dynamic=False)
    return lambda: model(**arguments)


def errors(family: str, backend: str, regional: bool, device: str) -> dict[str, float]:
    """Largest error of a compiled forward against an eager one, cached (each step of a run on the same inputs) and
    uncached."""
    model, arguments = BUILDERS[family](device)
    exact = model(**arguments)[0]
    call = uncached_forwards(model, arguments, backend, False)
    uncached = float((call()[0] - exact).abs().max())
    torch._dynamo.reset()
    compiled(model, None, False)
    eager = [model(**arguments)[0].clone() for _ in range(STEPS)]
    fastercache.restore(model)
    compiled(model, backend, regional)
    worst = max(float((model(**arguments)[0] - expected).abs().max()) for expected in eager)
    fastercache.restore(model)
    return {"error": worst, "uncached_error": uncached}


def engine_microseconds(model: torch.nn.Module, arguments: dict[str, Any]) -> float:
    """Host time of a step outside the model's forward, which is replaced: median over runs of 50 steps, begin and end
    included."""
    engine = model._fastercache_engine
    prediction = model(**arguments)[0].clone()
    fastercache.release(model)
    engine.gated.graphs.graph = lambda kind: (
        lambda forward, args, kwargs: (prediction[: kwargs["hidden_states"].shape[0]],)
    )
    engine.gated.graphs.options = GraphOptions(
        engine.gated.graphs.options.backend
    )  # the whole model is replaced, not its blocks

    def run() -> None:
        for _ in range(STEPS):
            model(**arguments)

    run()
    found = float(np.median([seconds_of(run) for _ in range(30)])) / STEPS * 1e6
    del engine.gated.graphs.graph
    return found


def growth_megabytes(model: torch.nn.Module, arguments: dict[str, Any], runs: int) -> float:
    """Memory in use after so many runs of 12 steps, which have all phases, less that after the third: the heap's, or
    the GPU's.

    The heap's is what malloc has given out. The resident memory goes up and down by megabytes with what it keeps for
    itself.
    """

    def in_use() -> float:
        gc.collect()
        if torch.cuda.is_available():
            return torch.cuda.memory_allocated() / 1e6
        heap = mallinfo2()
        return (heap.uordblks + heap.hblkhd) / 1e6

    def short_run() -> None:
        with fastercache.run(model, steps=SHORT, cfg="uncond-first"):
            for _ in range(SHORT):
                model(**arguments)

    for _ in range(3):
        short_run()
    before = in_use()
    for _ in range(3, runs):
        short_run()
    return in_use() - before


def measure(kind: str, family: str, backend: str, regional: bool, device: str, runs: int) -> dict[str, Any]:
    """What one process finds. kind: "cold", "warm" or "uncached"."""
    torch.set_grad_enabled(False)
    model, arguments = BUILDERS[family](device)
    if kind == "uncached":
        return {"uncached_cold_s": seconds_of(uncached_forwards(model, arguments, backend, regional))}
    model(**arguments)  # what every first call of a process costs, compiled or not
    compiled(model, backend, regional)
    spent = seconds_of(lambda: fastercache.warmup(model, progress=False, **arguments))
    if kind == "warm":
        return {"warm_s": spent}
    engine, counters = model._fastercache_engine, torch._dynamo.utils.counters
    for seed in range(3):
        one_run(model, arguments, seed)
    found: dict[str, Any] = {
        "cold_s": spent,
        "phases": len(engine.plan_for(engine.default).phases),
        "block_kinds": len({block.kind for block in engine.gated.graphs._blocks}) if regional else None,
        "graphs": len(engine.gated.graphs),
        "graph_breaks": sum(counters["graph_break"].values()),
        "recompiles": counters["stats"]["unique_graphs"] - len(engine.gated.graphs),
    }
    found["growth_mb"] = growth_megabytes(model, arguments, runs)
    found["runs"] = runs
    found["engine_us_per_step"] = engine_microseconds(model, arguments)
    fastercache.restore(model)
    compiled(model, None, False)
    with DeviceReads() as mode:
        one_run(model, arguments)
    found["host_reads"] = mode.reads
    fastercache.restore(model)
    return found | errors(family, backend, regional, device)


# ---- the table -------------------------------------------------------------------------------------------------------


def in_process(kind: str, cache: str, **case: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.graphs", "--case", json.dumps({"kind": kind, **case})]
    run = subprocess.run(
        command, cwd=report.ROOT, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}, capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(f"{kind} {case} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def row_of(family: str, backend: str, regional: bool, device: str, runs: int) -> dict[str, Any]:
    case = {"family": family, "backend": backend, "regional": regional, "device": device, "runs": runs}
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as other:
        found = (
            in_process("cold", cache, **case)
            | in_process("warm", cache, **case)
            | in_process("uncached", other, **case)
        )
    return {"family": family, "backend": backend, "regional": regional, **found}


def bars(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar, over all rows that it is about, with the worst of them."""
    regional = [row for row in rows if row["regional"]]
    expected = [row["graphs"] - row["phases"] * (row["block_kinds"] or 1) for row in rows]
    found: list[tuple[str, float, bool]] = [
        (
            "graphs are phases, times block kinds where regional (graphs too many)",
            max(expected),
            expected == [0] * len(rows),
        ),
        ("phases", max(row["phases"] for row in rows), all(row["phases"] <= MOST_PHASES for row in rows)),
        ("graph breaks", max(row["graph_breaks"] for row in rows), not any(row["graph_breaks"] for row in rows)),
        (
            "recompilations over three runs",
            max(row["recompiles"] for row in rows),
            not any(row["recompiles"] for row in rows),
        ),
        (
            "reads of a device tensor inside a run",
            max(row["host_reads"] for row in rows),
            not any(row["host_reads"] for row in rows),
        ),
    ]
    for what, group, value, limit in (
        (
            "regional cold seconds over phases times uncached",
            regional,
            lambda r: r["cold_s"] / r["uncached_cold_s"] / r["phases"],
            1.0,
        ),
        (
            'regional cold seconds of "shapes"',
            [r for r in regional if r["family"] == "latte"],
            lambda r: r["cold_s"],
            MOST_COLD_S,
        ),
        (
            "warm seconds over cold",
            [r for r in rows if r["backend"] == "inductor"],
            lambda r: r["warm_s"] / r["cold_s"],
            LEAST_WARM,
        ),
        ("the engine's microseconds a step", rows, lambda r: r["engine_us_per_step"], MOST_ENGINE_US),
        ("error, cached over uncached", rows, lambda r: r["error"] / max(r["uncached_error"], 1e-12), ERROR_FACTOR),
        ("megabytes in use that the runs after the third add", rows, lambda r: r["growth_mb"], MOST_GROWTH_MB),
    ):
        if group:
            worst = max(map(value, group))
            found.append((f"{what}: at most {limit:g}", worst, worst <= limit))
    return [{"bar": bar, "measured": measured, "holds": holds} for bar, measured, holds in found]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--backends", nargs="+", default=["inductor"], help="of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=100, help="runs over which memory must stay flat")
    parser.add_argument(
        "--threads", type=int, default=environment.cores(), help="torch threads (default: one for each core)"
    )
    parser.add_argument(
        "--out", type=Path, default=report.RESULTS / "graphs.json", help="JSON file; the Markdown table goes next to it"
    )
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.case is not None:
        print(json.dumps(measure(**args.case)))
        return
    rows = []
    for family in args.families:
        for backend in args.backends:
            for regional in (False, True):
                rows.append(row_of(family, backend, regional, args.device, args.runs))
                print(rows[-1], flush=True)
    verdicts = bars(rows)
    columns = (
        "family",
        "backend",
        "regional",
        "phases",
        "block_kinds",
        "graphs",
        "graph_breaks",
        "recompiles",
        "host_reads",
    )
    measured = ("engine_us_per_step", "cold_s", "uncached_cold_s", "warm_s", "error", "uncached_error", "growth_mb")
    body = [
        f"The paper's schedule, {STEPS} steps, on {args.device}. `cold_s`: compiling all phases "
        "(`fastercache.warmup`) with an empty cache of the compiler; `warm_s`: the same in a second process; "
        "`uncached_cold_s`: the untouched model's first compiled forward, with an empty cache. `error`: largest "
        "difference of a compiled forward to the eager one over a cached run on the same inputs; `uncached_error`: "
        f"the same of the untouched model. `growth_mb`: memory in use after {args.runs} runs less that after the "
        "third.",
        report.table(
            (*columns, *measured),
            [(*(row[name] for name in columns), *(f"{row[name]:.3g}" for name in measured)) for row in rows],
        ),
        report.table(
            ("bar", "worst", "verdict"),
            [(bar["bar"], f"{bar['measured']:.3g}", "holds" if bar["holds"] else "does not hold") for bar in verdicts],
        ),
        "On a GPU: not measured." if args.device == "cpu" else "",
    ]
    data = {
        "settings": {"steps": STEPS, "device": args.device, "threads": args.threads, "runs": args.runs},
        "rows": rows,
        "bars": verdicts,
    }
    report.write(args.out, "Compiled phases", "python -m bench.graphs", data, [part for part in body if part])


if __name__ == "__main__":
    main()
