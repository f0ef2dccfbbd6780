"""Compiled phases: how many graphs there are, that nothing is compiled twice or read back, and that they compute what
eager steps do.

Most tests use torch's "eager" and "aot_eager" backends: tracing and guards are those of every backend, and take
seconds.
"""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from functools import partial
from itertools import product
from typing import ClassVar

import pytest
import torch
from accelerate import cpu_offload_with_hook
from longer import longer
from models import MODELS, arguments, call, cogvideox, latte, stdit3
from torch._dynamo.testing import CompileCounter
from torch._inductor.compile_fx import compile_fx

import fastercache
from bench.graphs import DeviceReads
from fastercache import CompileError, RunError, Schedule, Step, policies
from fastercache.cache.cache import Cache
from fastercache.models.registry import family_of
from fastercache.runtime.graphs import GraphOptions
from fastercache.schedule.plan import make_plan

STEPS = 12


class CudaGraphs:
    """A backend that only traces, and says that it uses CUDA graphs as torch's own wrapper of Inductor does."""

    config: ClassVar = {"triton.cudagraphs": True}

    def __call__(self, graph, inputs, **_):
        return graph.forward


BLOCK_KINDS = {"latte": 2, "cogvideox": 1}


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test, and any recompilation is an error."""
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def sample(model, steps=STEPS, rows=4, seed=0):
    """Predictions of one run, each step's input made from the last one's output."""
    inputs, outputs = arguments(model, rows, seed), []
    for _ in range(steps):
        prediction = model(**inputs)[0]
        outputs.append(prediction)
        latents = inputs["hidden_states"]
        inputs = inputs | {
            "hidden_states": latents
            - 0.1 * (prediction[:, : latents.shape[1]] if latents.shape != prediction.shape else prediction)
        }
    return torch.stack(outputs)


def cached(model, **options):
    return fastercache.compile(model, options.pop("schedule", "paper"), steps=STEPS, cfg="uncond-first", **options)


small = partial(cogvideox, layers=1)
"""Where the number of layers is not what is tested: tracing takes as long as there are layers."""


def graphs_of(model):
    return len(model._fastercache_engine.gated.graphs)


PHASES = {"paper": 3, "plain": 3, "dynamic-only": 2, "cfg-only": 2, "none": 1}
FIRST = {  # each policy, and each family in each way
    ("latte", False, "paper"),
    ("latte", True, "paper"),
    ("cogvideox", True, "paper"),
    ("cogvideox", False, "dynamic-only"),
    ("latte", True, "plain"),
    ("latte", False, "cfg-only"),
    ("latte", True, "none"),
}


@pytest.mark.parametrize(
    "family, regional, policy",
    [case if case in FIRST else longer(*case) for case in product(MODELS, (False, True), PHASES)],
)
def test_one_graph_for_each_phase(family, regional, policy):
    """And for each kind of block, where they are regional; no other prompt, seed or run adds one."""
    expected = sample(cached(MODELS[family](), schedule=policy))
    counter = CompileCounter()
    model = cached(MODELS[family](), schedule=policy, backend=counter, regional=regional)
    for seed in (0, 1, 2):
        outputs = sample(model, seed=seed)
        if seed == 0:
            torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == graphs_of(model) == PHASES[policy] * (BLOCK_KINDS[family] if regional else 1)
    assert f"{counter.frame_count} graphs by" in str(fastercache.summary(model))


def test_layers_that_the_schedule_treats_alike_share_a_graph():
    counter = CompileCounter()
    schedule = Schedule((Step(), Step(), *(Step("both", ("joint[1:]",), (1.5, -0.5)) for _ in range(STEPS - 2))))
    model = cached(cogvideox(layers=4), schedule=schedule, backend=counter, regional=True)
    sample(model)
    assert counter.frame_count == 2 * 2  # two phases; the first layer, which is never reused, and the others


def test_strides_of_a_single_row_do_not_matter():
    """CogVideoX gives its first layer a slice, whose one row on single-branch steps has the stride of the whole."""
    counter = CompileCounter()
    sample(cached(cogvideox(layers=3), backend=counter, regional=True), rows=2)
    assert counter.frame_count == 3


@pytest.mark.parametrize("format", ["model", "int8"])
def test_inductor_is_as_near_to_eager_cached_as_uncached(format):
    """Error of the compiled run against the eager one, held against what compiling does to the untouched model."""
    if format != "model" and fastercache.ops.packed_missing(torch.device("cpu")):
        pytest.skip("packed caches need the C++ library")
    untouched = latte(torch.float32)
    exact = untouched(**arguments(untouched, 4))[0]
    compiling = (torch.compile(untouched, fullgraph=True)(**arguments(untouched, 4))[0] - exact).abs().max()
    eager = cached(latte(torch.float32), cache_format=format)
    compiled = cached(latte(torch.float32), cache_format=format, backend="inductor", regional=True)
    inputs = arguments(eager, 4)
    pairs = [(eager(**inputs)[0], compiled(**inputs)[0]) for _ in range(STEPS)]
    errors = [float((a - b).abs().max()) for a, b in pairs]
    if format == "model":
        assert max(errors) <= 3 * float(compiling) + 1e-12
    else:  # a code that is halfway between two may fall either way: one step of 127
        assert max(errors) <= 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("family", MODELS)
def test_no_tensor_is_read_inside_a_run(family):
    """In eager mode, which the dispatcher sees step by step; a read inside a graph would break it, and graphs are
    full."""
    model = cached(MODELS[family]())
    inputs = arguments(model, 4)
    with DeviceReads() as mode:
        for _ in range(STEPS):
            model(**inputs)
    assert mode.reads == 0
    with DeviceReads() as mode:
        torch.ones(1).item()
    assert mode.reads == 1


def test_other_shapes_get_graphs_of_their_own_and_the_oldest_go(caplog):
    counter = CompileCounter()
    model = cached(small(), backend=counter, regional=False)
    for rows in (2, 4, 2, 4):
        sample(model, rows=rows)
    # Rows of both branches and of one: 2, 4 and 1, 2; the single-branch inputs of 4 are not those of the full steps of
    # 2.
    assert counter.frame_count == graphs_of(model) == 6
    with caplog.at_level(logging.WARNING, logger="fastercache"):
        for rows in (6, 8):
            sample(model, rows=rows)
    assert "dropped" in caplog.text
    assert graphs_of(model) < counter.frame_count == 12


def test_another_step_count_reuses_the_graphs():
    counter = CompileCounter()
    model = small()
    fastercache.compile(model, backend=counter)
    for steps in (STEPS, 20, 31):
        with fastercache.run(model, steps=steps, cfg="uncond-first"):
            sample(model, steps)
    assert counter.frame_count == 3


def test_runs_that_store_at_other_steps_do_not_share_a_graph():
    """The full step's output is read later in the second schedule only; its phase and its groups are those of the
    first."""
    reuse = Step("cond", ("joint",), (1.0,))
    schedules = {5: (Step(), Step("cond"), reuse, reuse, reuse), 6: (Step(), reuse, Step("cond"), reuse, reuse, reuse)}
    counter = CompileCounter()

    def policy(steps, guidance):
        return Schedule(schedules.get(steps, (Step(),) * steps))

    model, eager = fastercache.compile(small(), policy, backend=counter), fastercache.compile(small(), policy)
    for steps in (5, 6, 5):
        outputs = []
        for one in (model, eager):
            with fastercache.run(one, steps=steps, cfg="uncond-first"):
                outputs.append(sample(one, steps))
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 3 + 1


def test_weights_of_another_dtype_get_graphs_of_their_own():
    counter = CompileCounter()
    model = cached(small(torch.float32), backend=counter)
    sample(model)
    model.to(torch.bfloat16)
    assert sample(model).dtype == torch.bfloat16
    model.to(torch.float32)
    expected = sample(cached(small(torch.float32).to(torch.bfloat16).to(torch.float32)))
    torch.testing.assert_close(sample(model), expected)
    assert counter.frame_count == 6


def test_warmup_compiles_all_phases_and_leaves_nothing_else():
    counter = CompileCounter()
    model = cached(latte(), backend=counter)
    expected = sample(cached(latte()))
    assert fastercache.warmup(model, progress=False, **arguments(model, 4)) is model
    assert counter.frame_count == 3 and "no run has ended" in str(fastercache.summary(model))
    torch.testing.assert_close(sample(model), expected, rtol=1e-10, atol=1e-12)
    assert counter.frame_count == 3
    with pytest.raises(CompileError, match="nothing to warm up"):
        fastercache.warmup(cached(latte()), **arguments(model, 4))


def test_a_model_that_does_not_compile_says_what_torch_stumbled_on():
    model = latte()
    forward = type(model.transformer_blocks[0]).forward

    class Block(type(model.transformer_blocks[0])):
        def forward(self, *args, **kwargs):
            torch._dynamo.graph_break()
            return forward(self, *args, **kwargs)

    model.transformer_blocks[0].__class__ = Block
    cached(model, backend="eager")
    with pytest.raises(CompileError, match=r"does not compile as one graph: .*(?s:.*)graph_break"):
        sample(model)
    fastercache.restore(model)
    sample(cached(model))


def test_a_forward_that_reads_its_inputs_compiles_by_blocks():
    """Open-Sora's counts each prompt's tokens on the host: no full graph of the whole."""
    model = fastercache.compile(stdit3(torch.float32), steps=STEPS, cfg="uncond-first", backend="eager")
    inputs = call(model, 2)
    with pytest.raises(CompileError, match=r"STDiT3 does not compile as one graph.*regional=True compiles"):
        model(**inputs)
    fastercache.restore(model)
    runs = []
    for options in ({}, {"backend": "eager", "regional": True}):
        fastercache.compile(model, steps=STEPS, cfg="uncond-first", **options)
        runs.append([model(**inputs) for _ in range(STEPS)])
        summary = fastercache.summary(model)
        fastercache.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)) and "6 graphs" in summary.compiled


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"backend": "fast"}, "backend is 'fast'; torch.compile has .*inductor"),
        ({"backend": "inductor", "mode": "quick"}, "mode is 'quick'; torch.compile has .*reduce-overhead"),
        ({"mode": "reduce-overhead"}, "without a backend"),
        ({"regional": True}, "without a backend"),
        ({"backend": "inductor", "mode": "reduce-overhead", "regional": True}, "a CUDA graph replays fixed addresses"),
    ],
)
def test_options_that_cannot_be(wrong, message):
    model = latte()
    with pytest.raises(CompileError, match=message):
        cached(model, **wrong)
    cached(model)


@pytest.mark.parametrize(
    "options, expected",
    [
        (GraphOptions("inductor"), False),
        (GraphOptions("inductor", "reduce-overhead"), True),
        (GraphOptions("inductor", "max-autotune"), True),
        (GraphOptions("inductor", "max-autotune-no-cudagraphs"), False),
        (GraphOptions("cudagraphs"), True),
        (GraphOptions("eager"), False),
        (GraphOptions(torch._TorchCompileInductorWrapper(None, {"triton.cudagraphs": True}, False)), True),
        (GraphOptions(torch._TorchCompileInductorWrapper("reduce-overhead", None, False)), True),
        (GraphOptions(partial(compile_fx, config_patches={"triton.cudagraphs": True})), True),
        (GraphOptions(compile_fx), False),
    ],
)
def test_what_counts_as_cuda_graphs(options, expected):
    assert options.cuda_graphs == expected
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        assert options.cuda_graphs == (options.backend != "eager")


def test_inductors_own_setting_of_cuda_graphs_counts_when_a_run_begins(allocated):
    """Predictions of a replay are copied out, and the caches stay; once recorded, graphs stay what they are."""
    model = cached(latte(), backend=CompileCounter())
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        first = sample(model)
    assert alive(allocated)[0] > 0
    assert torch.equal(sample(model), first) and len(allocated) == 1
    regional = cached(latte(), backend=CompileCounter(), regional=True)
    with torch._inductor.config.patch({"triton.cudagraphs": True}), pytest.raises(CompileError, match="cudagraphs off"):
        sample(regional)


@pytest.fixture
def allocated(monkeypatch):
    """Weak references to the tensors of every cache allocated, newest last."""
    found = []
    allocate = Cache.__init__

    def init(self, *arguments):
        allocate(self, *arguments)
        found.append([weakref.ref(ring.tensor) for site in self._rings for ring in self.rings(site)])

    monkeypatch.setattr(Cache, "__init__", init)
    return found


def alive(allocated):
    gc.collect()
    return [sum(ref() is not None for ref in refs) for refs in allocated]


@pytest.mark.parametrize("backend", ["eager", longer("aot_eager"), "inductor"])
def test_a_compiled_run_frees_its_caches_and_new_ones_compile_nothing(backend, allocated):
    """No graph, guard or example input holds them, and tensors at other addresses are no recompilation (`fresh`: that
    is an error)."""
    build = latte if backend == "inductor" else small  # Inductor has compiled that one for another test
    model = cached(build(torch.float32), backend=backend, regional=backend == "inductor")
    sample(model)
    count = graphs_of(model)
    assert alive(allocated) == [0]
    between = torch.empty(1000)  # so that the next caches lie elsewhere
    sample(model, seed=1)
    assert alive(allocated) == [0, 0] and graphs_of(model) == count and not fastercache.summary(model).notes
    del between


def test_cuda_graphs_keep_their_caches_in_place_until_released_and_restore_frees_all(allocated):
    model = cached(small(), backend=CudaGraphs())
    first = sample(model)
    sample(model, seed=1)
    assert len(allocated) == 1 and alive(allocated)[0] > 0
    fastercache.release(model)
    assert alive(allocated) == [0]
    sample(model)
    engine = model._fastercache_engine
    graphs = weakref.ref(engine.gated.graphs)
    fastercache.restore(model)
    del engine
    assert alive(allocated) == [0, 0] and graphs() is None
    torch.testing.assert_close(sample(cached(model)), first, rtol=1e-10, atol=1e-12)


def test_a_model_that_is_offloaded_after_its_calls_keeps_no_caches(allocated):
    """Its weights move between calls, so no graph's addresses would stay, and what comes next needs the memory."""
    model = small()
    cpu_offload_with_hook(model, torch.device("cpu"))
    cached(model, backend=CudaGraphs())
    sample(model)
    assert alive(allocated) == [0]


def test_caches_of_few_kinds_of_runs_stay_for_cuda_graphs_within_the_budget(allocated, caplog):
    model = cached(small(), backend=CudaGraphs())
    for rows in (2, 4, 2, 4):
        sample(model, rows=rows)
    assert len(allocated) == 2 and all(alive(allocated)) and not fastercache.summary(model).notes
    both = sum(cache.bytes for cache in model._fastercache_engine._caches._kept.values())
    fastercache.restore(model)

    del allocated[:]
    cached(model, backend=CudaGraphs(), max_cache_bytes=both - 1)
    sample(model, rows=2)
    with caplog.at_level(logging.WARNING, logger="fastercache"):
        sample(model, rows=4)
    assert "made room" in caplog.text and "made room" in str(fastercache.summary(model))
    assert alive(allocated)[0] == 0 and alive(allocated)[1] > 0


def test_two_compiled_models_in_two_threads():
    models = [cached(latte(seed=seed), backend="eager") for seed in (0, 1)]
    expected = [sample(model) for model in models]
    found: dict[int, torch.Tensor] = {}

    def work(index):
        with torch.no_grad():
            found[index] = torch.stack([sample(models[index]) for _ in range(5)])

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index][n], expected[index]) for index in (0, 1) for n in range(5))


def test_an_error_in_a_compiled_run_leaves_nothing_behind():
    model = latte()
    fastercache.compile(model, backend="eager")
    with fastercache.run(model, steps=STEPS, cfg="uncond-first"):
        fresh_run = sample(model)
    with pytest.raises(RunError, match="batch of 3"), fastercache.run(model, steps=STEPS, cfg="uncond-first"):
        sample(model, 1, rows=3)
    with fastercache.run(model, steps=STEPS, cfg="uncond-first"):
        sample(model, 5, seed=3)
    with fastercache.run(model, steps=STEPS, cfg="uncond-first"):
        assert torch.equal(sample(model), fresh_run)


def test_policies_have_few_phases():
    """PAB's three kinds of attention have a cadence each, so that their meetings are phases of their own."""
    sites = [site.node for site in family_of(latte()).sites(latte())]
    for name in policies.BY_NAME:
        phases = make_plan(policies.get(name)(50, True), True, sites).phases
        assert len(phases) <= (6 if name == "pab" else 4), (name, len(phases))
