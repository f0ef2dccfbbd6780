"""Measures one checkout of fastercache, for `bench.steps`: a process that is asked on its standard input and answers on
its output.

It is run in the checkout that it measures, which may be an old one, so it uses what every revision has: the public API
and `bench.dispatch`. Where the revisions differ there is an adapter below.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import fastercache

# ---- adapters: the layout of the package that has one engine with everything in it, and the one with rooms -----------


def graphs_of(engine: Any) -> Any:
    """The compiled graphs of an engine: its own, or those of its gated model."""
    return getattr(engine, "gated", engine).graphs


def without_regions(options: Any) -> Any:
    """The same backend for the whole model, which is then replaced as one."""
    return type(options)(options.backend)


def implementations() -> dict[str, str]:
    """What serves each op on the CPU."""
    return {name: code["cpu"] for name, code in fastercache.ops.implementations().items()}


# ---- models ----------------------------------------------------------------------------------------------------------


def cogvideox(layers: int, hollow: bool = False) -> tuple[torch.nn.Module, dict[str, Any]]:
    """CogVideoX's blocks at a small width with random weights, and the arguments of a call; `hollow`: its forward does
    nothing."""
    import diffusers

    base = diffusers.CogVideoXTransformer3DModel
    torch.manual_seed(0)
    arguments = {
        "hidden_states": torch.randn(2, 3, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 8, 32),
        "timestep": torch.full((2,), 500),
        "return_dict": False,
    }
    prediction = torch.randn(2, 3, 4, 16, 16)

    def forward(self, hidden_states, encoder_hidden_states, timestep, return_dict=True):
        return (prediction[: hidden_states.shape[0]],)

    # Families know a model by the name of its class.
    model_class = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__}) if hollow else base
    model = model_class(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        time_embed_dim=64,
        text_embed_dim=32,
        num_layers=layers,
        sample_width=16,
        sample_height=16,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
    )
    return model.eval().requires_grad_(False), arguments


def microseconds(call: Callable[[], Any], steps: int, repeats: int) -> float:
    """Of a step, the median over runs of so many steps, begin and end of a run included."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(steps):
            call()
        found.append((time.perf_counter() - start) / steps * 1e6)
    return statistics.median(found)


# ---- what can be asked -----------------------------------------------------------------------------------------------


class Worker:
    """kept: models and functions that are made at their first use and serve every later turn."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.steps = settings["run_steps"]
        self.kept: dict[str, Any] = {}

    def measure(self, kind: str) -> dict[str, float]:
        """One turn: figures by name, in microseconds or seconds."""
        return getattr(self, kind)()

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def engine(self) -> dict[str, float]:
        """A step outside the model's forward, which does nothing: eager, and where compiled graphs are called; and an
        eager step whole."""
        found = {}
        for name, make in (
            ("engine, eager", self._eager),
            ("engine, compiled", self._compiled),
            ("eager step, small model", self._small),
        ):
            found[f"{name} (us a step)"] = microseconds(self._once(name, make), self.steps, self.settings["runs"])
        return found

    def _call(self, hollow: bool, layers: int, **options: Any) -> tuple[torch.nn.Module, Callable[[], Any]]:
        model, arguments = cogvideox(layers, hollow)
        fastercache.compile(model, steps=self.steps, cfg="uncond-first", **options)

        def call() -> Any:
            return model(**arguments)

        for _ in range(self.steps):
            call()
        return model, call

    def _eager(self) -> Callable[[], Any]:
        return self._call(True, self.settings["layers"])[1]

    def _small(self) -> Callable[[], Any]:
        return self._call(False, self.settings["layers"])[1]

    def _compiled(self) -> Callable[[], Any]:
        model, arguments = cogvideox(self.settings["layers"], hollow=True)
        prediction = model(**arguments)[0]
        fastercache.compile(model, steps=self.steps, cfg="uncond-first", backend="eager")
        graphs = graphs_of(model._fastercache_engine)
        graphs.graph = lambda kind: lambda forward, args, kwargs: (prediction[: kwargs["hidden_states"].shape[0]],)
        graphs.options = without_regions(graphs.options)

        def call() -> Any:
            return model(**arguments)

        for _ in range(self.steps):
            call()
        return call

    def dispatch(self) -> dict[str, float]:
        """A call of each op on tensors so small that the work hardly counts."""
        from bench.dispatch import dispatch_rows

        rows = dispatch_rows("cpu", self.settings["calls"])
        return {
            f"{row['op']}, {name} (us)": row[key]
            for row in rows
            for name, key in (("function", "function_us"), ("op", "op_us"))
        }

    def compile(self) -> dict[str, float]:
        """Compiling all phases of a small model; the process must be new, and the compiler's cache empty."""
        model, arguments = cogvideox(self.settings["layers"])
        model(**arguments)
        fastercache.compile(
            model, steps=self.steps, cfg="uncond-first", backend=self.settings["backend"], regional=True
        )
        start = time.perf_counter()
        fastercache.warmup(model, progress=False, **arguments)
        return {"compiling all phases (s)": time.perf_counter() - start}

    def shapes(self) -> dict[str, float]:
        """A clip of the embedded pipeline, untouched and with the paper's schedule."""
        pipe = self._once("shapes", self._pipeline)
        found = {}
        for name in ("uncached", "cached"):
            if name == "cached":
                fastercache.compile(pipe, "paper")
            try:
                start = time.perf_counter()
                self._clip(pipe)
                found[f"shapes, {name} (s a clip)"] = time.perf_counter() - start
            finally:
                if name == "cached":
                    fastercache.restore(pipe)
        return found

    def _pipeline(self) -> Any:
        import fastercache.shapes

        pipe = fastercache.shapes.load()
        pipe.set_progress_bar_config(disable=True)
        self._clip(pipe)
        fastercache.compile(pipe, "paper")
        self._clip(pipe)
        fastercache.restore(pipe)
        return pipe

    def _clip(self, pipe: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        options = fastercache.shapes.CALL | {"num_inference_steps": self.settings["steps"], "output_type": "np"}
        pipe("a red circle moving right", generator=generator, **options)


def main() -> None:
    """Lines of JSON: the settings, then one kind of measurement a line; an answer for each."""
    # Answers have the standard output for themselves; what libraries print goes to the errors.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    torch.set_grad_enabled(False)
    worker = Worker(settings)
    about = {"package": str(Path(fastercache.__file__).parent), "ops": implementations()}
    answers.write(json.dumps(about) + "\n")
    with suppress(KeyboardInterrupt):
        for line in sys.stdin:
            answers.write(json.dumps(worker.measure(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
