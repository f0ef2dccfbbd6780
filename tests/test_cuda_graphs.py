"""mode="reduce-overhead": what CUDA graphs do to memory, played on the CPU, and the real ones where there is a GPU."""

from __future__ import annotations

import gc
import os
import runpy
from pathlib import Path

import pytest
import torch
from models import MODELS, arguments, latte
from test_graphs import STEPS, cached, fresh, graphs_of, sample  # noqa: F401

import fastercache

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Replayed:
    """A backend of torch.compile that uses memory as Inductor's CUDA graphs do.

    A tensor whose address is not known to be static is copied to a place of its own before a replay, and must not be
    written to. Outputs lie at the same addresses in every replay, and the memory is shared: a replay of any graph
    overwrites what the last one gave.
    """

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.moving: list[int] = []
        self._outputs: list[torch.Tensor] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list, **_):
        placeholders = graph.graph.find_nodes(op="placeholder")
        static = [
            node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None for node in placeholders
        ]
        self.graphs.append(graph)
        self.moving.append(
            sum(x.nbytes for x, fixed in zip(inputs, static, strict=True) if not fixed and isinstance(x, torch.Tensor))
        )
        given: list[torch.Tensor] = []

        def replay(*arguments):
            for output in self._outputs:
                output.fill_(torch.nan)
            moved = [
                x if fixed or not isinstance(x, torch.Tensor) else x.clone()
                for x, fixed in zip(arguments, static, strict=True)
            ]
            before = [x.clone() for x in moved]
            results = graph(*moved)
            written = [
                not torch.equal(x, was) for x, was, fixed in zip(moved, before, static, strict=True) if not fixed
            ]
            assert not any(written), "a graph writes to a tensor without a static address: Inductor would not record it"
            if not given:
                given.extend(map(torch.empty_like, results))
                self._outputs.extend(given)
            for output, result in zip(given, results, strict=True):
                output.copy_(result)
            return tuple(given)

        return replay


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("format", ["model", "int8"])
def test_predictions_outlive_the_next_replay(family, format):
    """Known from others as "accessing tensor output of CUDAGraphs that has been overwritten": a sampler may keep its
    last predictions."""
    if format != "model" and fastercache.ops.packed_missing(torch.device("cpu")):
        pytest.skip("packed caches need the C++ library")
    expected = sample(cached(MODELS[family](torch.float32), cache_format=format))
    backend = Replayed()
    model = cached(MODELS[family](torch.float32), backend=backend, mode="reduce-overhead", cache_format=format)
    for seed in (0, 1, 0):
        outputs = sample(model, seed=seed)
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
    assert len(backend.graphs) == graphs_of(model) == 3


def test_only_the_inputs_of_the_call_are_copied_for_a_replay():
    """Weights, caches and coefficients are used in place."""
    backend = Replayed()
    model = cached(latte(), backend=backend, mode="reduce-overhead")
    sample(model)
    given = sum(value.nbytes for value in arguments(model, 4).values() if isinstance(value, torch.Tensor))
    assert max(backend.moving) <= given


def test_caches_allocated_anew_cost_no_graph():
    backend = Replayed()
    model = cached(latte(), backend=backend, mode="reduce-overhead")
    first = sample(model)
    fastercache.release(model)
    gc.collect()
    assert torch.equal(sample(model), first) and len(backend.graphs) == 3


@pytest.mark.parametrize("folder", [".", "ops"])
def test_kernels_are_interpreted_only_where_there_is_no_gpu(folder, monkeypatch):
    conftest = Path(__file__).parent / folder / "conftest.py"
    for gpu in (True, False):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        runpy.run_path(str(conftest))
        assert os.environ.get("TRITON_INTERPRET") == (None if gpu else "1")


@needs_gpu
@pytest.mark.parametrize("family", MODELS)
def test_recorded_on_a_gpu(family):
    """Every phase is recorded, none is left out, nothing waits for the GPU, and the predictions are those of eager
    steps."""
    from torch._dynamo.utils import counters

    def on_gpu(**options):
        return cached(MODELS[family](torch.float32).cuda(), **options)

    def run(model, seed=0):
        inputs = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in arguments(model, 4, seed).items()}
        torch.cuda.set_sync_debug_mode("error" if seed else "default")
        try:
            return torch.stack([model(**inputs)[0] for _ in range(STEPS)])
        finally:
            torch.cuda.set_sync_debug_mode("default")

    expected = run(on_gpu())
    model = on_gpu(backend="inductor", mode="reduce-overhead")
    for _ in range(3):
        outputs = run(model)
    torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-3)
    run(model, seed=1)
    assert counters["inductor"]["cudagraph_skips"] == 0 and graphs_of(model) == 3
    memory = torch.cuda.memory_allocated()
    for seed in range(2, 5):
        run(model, seed)
    gc.collect()
    assert torch.cuda.memory_allocated() <= memory
