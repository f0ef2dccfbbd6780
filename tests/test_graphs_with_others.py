"""Models that other libraries have changed, before fastercache compiled them and since: adapters, quantized weights,
offloading."""

from __future__ import annotations

import logging
from itertools import product

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from diffusers.hooks import apply_group_offloading
from longer import longer
from models import MODELS, arguments, cogvideox
from test_generic import inputs_of, skyreels
from test_graphs import STEPS, cached, fresh, graphs_of, sample  # noqa: F401
from test_pipelines import CALL, PROMPT, is_original, load
from torch._dynamo.testing import CompileCounter

import fastercache
from fastercache import CompileError, Schedule, ScheduleError, Step

CPU = torch.device("cpu")


def close(model, expected, **changes):
    torch.testing.assert_close(sample(model, **changes), expected, rtol=1e-10, atol=1e-12)


class TestLoRA:
    @pytest.fixture(autouse=True)
    def peft(self):
        return pytest.importorskip("peft")

    @staticmethod
    def add(model, name="default"):
        """An adapter of random weights on the attention and the MLP of every block."""
        from peft import LoraConfig

        torch.manual_seed(5)
        targets = ["to_q", "to_out.0", "net.0.proj"]
        model.add_adapter(
            LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), adapter_name=name
        )
        return model.to(torch.float64).requires_grad_(False)

    @staticmethod
    def scaled(model, scale):
        model.set_adapters(["default"], [scale])
        return model.requires_grad_(False)

    @pytest.mark.parametrize("regional", [longer(False), True])
    def test_loaded_before(self, regional):
        expected = sample(cached(self.add(cogvideox())))
        assert (expected - sample(cached(cogvideox()))).abs().max() > 0.01
        counter = CompileCounter()
        model = cached(self.add(cogvideox()), backend=counter, regional=regional)
        close(model, expected)
        sample(model, seed=1)
        assert counter.frame_count == graphs_of(model) == 3
        assert fastercache.summary(model).flops.ratio > 1

    @pytest.mark.parametrize(
        ("change", "regional"),
        [
            (lambda test, model: model.disable_adapters(), True),
            (lambda test, model: test.scaled(model, 0.5), True),
            (lambda test, model: test.scaled(model, 0.5), False),
            (lambda test, model: model.fuse_lora(lora_scale=0.5), True),
            (lambda test, model: model.unload_lora(), False),
        ],
        ids=["disabled", "scaled", "scaled whole", "fused", "unloaded whole"],
    )
    def test_changed_after(self, change, regional, caplog):
        changed = self.add(cogvideox())
        change(self, changed)
        expected = sample(cached(changed))
        counter = CompileCounter()
        model = cached(self.add(cogvideox()), backend=counter, regional=regional)
        sample(model)
        change(self, model)
        with caplog.at_level(logging.WARNING, logger="fastercache"):
            close(model, expected)
        for said in (caplog.text, str(fastercache.summary(model))):
            assert "the model has changed since its graphs were compiled" in said and "transformer_blocks.0" in said
        close(model, expected)
        assert counter.frame_count == 6 and "has changed" not in str(fastercache.summary(model))

    def test_loaded_after_and_back_again(self):
        counter = CompileCounter()
        model = cached(cogvideox(), backend=counter, regional=True)
        without = sample(model)
        close(self.add(model), sample(cached(self.add(cogvideox()))))
        assert counter.frame_count == 6
        model.unload_lora()
        close(model, without)
        assert counter.frame_count == 6

    def test_a_scale_that_changes_within_a_run(self):
        """Dynamo compiles again where no run begins: right, and said; until its limit, which is."""

        def run(model, scales):
            inputs = arguments(model, 4)
            return torch.stack([self.scaled(model, scale)(**inputs)[0] for scale in scales])

        model = cached(self.add(cogvideox()), backend="eager", regional=True)
        scales = [1.0] * 8 + [0.5] * 4
        with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2):
            torch.testing.assert_close(
                run(model, scales), run(cached(self.add(cogvideox())), scales), rtol=1e-10, atol=1e-12
            )
            assert "graphs were compiled again during the run" in str(fastercache.summary(model))
            with pytest.raises(CompileError, match="was compiled 2 times, as often as torch allows"):
                run(model, [1 - step / STEPS for step in range(STEPS)])

    def test_unloaded_under_group_offloading(self):
        """diffusers takes its hooks off and puts them on again then; no patch may be lost with them."""
        model = self.add(cogvideox())
        group_offload(model, "leaf_level")
        cached(model)
        sample(model)
        model.unload_lora()
        close(model, sample(cached(cogvideox())))
        assert fastercache.summary(model).skipped_anything


class TestTorchao:
    @pytest.fixture(autouse=True, params=["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
    def quantize(self, request):
        quantization = pytest.importorskip("torchao.quantization")

        def quantize(model):
            quantization.quantize_(model, getattr(quantization, request.param)())
            return model

        return quantize

    @pytest.mark.parametrize("regional", [longer(False), True])
    def test_quantized_before(self, quantize, regional):
        expected = sample(cached(quantize(cogvideox(torch.float32))))
        assert not torch.equal(expected, sample(cached(cogvideox(torch.float32))))
        counter = CompileCounter()
        model = cached(quantize(cogvideox(torch.float32)), backend=counter, regional=regional)
        torch.testing.assert_close(sample(model), expected)
        sample(model, seed=1)
        assert counter.frame_count == graphs_of(model) == 3

    def test_operations_are_counted(self, quantize):
        plain, quantized = cached(cogvideox(torch.float32)), cached(quantize(cogvideox(torch.float32)))
        before = sample(plain), sample(quantized)
        assert fastercache.summary(quantized).flops == fastercache.summary(plain).flops
        assert all(map(torch.equal, before, (sample(plain), sample(quantized))))

    @pytest.mark.parametrize("mode", ["eager", longer("whole"), "regional"])
    def test_quantized_after(self, quantize, mode):
        model = cached(cogvideox(torch.float32), **COMPILED[mode])
        sample(model)
        torch.testing.assert_close(sample(quantize(model)), sample(cached(quantize(cogvideox(torch.float32)))))
        assert mode == "eager" or ("has changed" in str(fastercache.summary(model)) and graphs_of(model) == 6)


def test_inductor_runs_int8_weights():
    quantization = pytest.importorskip("torchao.quantization")
    eager, compiled = cogvideox(torch.float32), cogvideox(torch.float32)
    for model in (eager, compiled):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    torch.testing.assert_close(
        sample(cached(compiled, backend="inductor", regional=True)), sample(cached(eager)), rtol=1e-4, atol=1e-4
    )


def group_offload(model, level):
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    apply_group_offloading(model, onload_device=CPU, offload_device=CPU, offload_type=level, **blocks)


OFFLOADING = {
    "model": lambda model: cpu_offload_with_hook(model, CPU),
    "sequential": lambda model: cpu_offload(model, CPU),
    "leaf": lambda model: group_offload(model, "leaf_level"),
    "block": lambda model: group_offload(model, "block_level"),
}
COMPILED = {"eager": {}, "whole": {"backend": "eager"}, "regional": {"backend": "eager", "regional": True}}
REFUSED = {
    (
        "sequential",
        "whole",
    ): "AlignDevicesHook moves .* inside CogVideoXTransformer3DModel.*regional=True.*or compile with backend=None",
    ("sequential", "regional"): "AlignDevicesHook moves .* inside CogVideoXBlock.*enable_model_cpu_offload",
    ("leaf", "whole"): "group offloading moves .* inside CogVideoXTransformer3DModel",
    ("leaf", "regional"): "group offloading moves .* inside CogVideoXBlock",
    ("block", "whole"): "group offloading moves .*'transformer_blocks.0' inside CogVideoXTransformer3DModel",
}


TWICE = {("model", "whole", "before"), ("block", "regional", "before")}
"""Compiled as they are the other way round, too."""


@pytest.mark.parametrize(
    "how, mode, when",
    [longer(*case) if case in TWICE else case for case in product(OFFLOADING, COMPILED, ("before", "after"))],
)
def test_offloading(how, mode, when):
    """With the CPU as the device, too: what hooks are there, and what they replace, is the same."""
    model, first = cogvideox(), when == "before"
    if (how, mode) in REFUSED:
        if first:
            OFFLOADING[how](model)
            with pytest.raises(CompileError, match=REFUSED[how, mode]):
                cached(model, **COMPILED[mode])
        else:
            cached(model, **COMPILED[mode])
            OFFLOADING[how](model)
            with pytest.raises(CompileError, match=REFUSED[how, mode]):
                sample(model)
            fastercache.restore(model)
        cached(model)  # as it advises
    else:
        if first:
            OFFLOADING[how](model)
        cached(model, **COMPILED[mode])
        if not first:
            OFFLOADING[how](model)
    expected = sample(cached_model := cached(cogvideox()))
    close(model, expected)
    assert fastercache.summary(model).skipped_anything
    assert fastercache.summary(model).flops == fastercache.summary(cached_model).flops
    close(model, expected)  # counting has left the weights alone
    fastercache.restore(model)
    inputs = arguments(model, 4)
    assert torch.equal(model(**inputs)[0], cogvideox()(**inputs)[0])


def test_hooks_taken_off_leave_the_patches_and_restore_leaves_nothing():
    for put, take in (
        (OFFLOADING["model"], lambda model: remove_hook_from_module(model, recurse=True)),
        (OFFLOADING["block"], lambda model: model._diffusers_hook.remove_hook("group_offloading", recurse=True)),
    ):
        for first in (True, False):
            model = cogvideox()
            if first:
                put(model)
            cached(model, backend="eager", regional=True)
            if not first:
                put(model)
            take(model)
            close(model, sample(cached(cogvideox())))
            assert fastercache.summary(model).skipped_anything
            fastercache.restore(model)
            assert all(is_original(module) for module in model.modules())


def test_block_level_offloading_of_alternating_blocks():
    model = MODELS["latte"]()
    group_offload(model, "block_level")
    close(cached(model, backend="eager", regional=True), sample(cached(MODELS["latte"]())))


def test_an_unknown_family_is_observed_underneath_its_hooks():
    model, expected = skyreels(), skyreels()
    group_offload(model, "leaf_level")
    inputs = inputs_of(model, 2)
    outputs = []
    for sampler in (model, expected):
        fastercache.compile(sampler, "dynamic-only", steps=9, cfg="uncond-first")
        outputs.append(torch.stack([sampler(**inputs)[0] for _ in range(9)]))
    assert torch.equal(*outputs)


def test_layerwise_casting_runs_without_graphs():
    def casting(**options):
        model = cogvideox(torch.float32)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        return cached(model, **options)

    inputs = arguments(cogvideox(torch.float32), 4)
    model = casting()
    first = [model(**inputs)[0] for _ in range(STEPS)]
    plain = cached(cogvideox(torch.float32))
    sample(plain)
    assert fastercache.summary(model).flops == fastercache.summary(plain).flops
    assert all(map(torch.equal, first, [model(**inputs)[0] for _ in range(STEPS)]))
    with pytest.raises(CompileError, match="does not compile as one graph"):
        casting(backend="eager")(**inputs)


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED)
def test_a_replaced_site_is_refused(options):
    model = cached(cogvideox(), **options)
    sample(model)
    other = cogvideox(seed=1).transformer_blocks[1]
    model.transformer_blocks[1] = other
    with pytest.raises(
        CompileError, match=r"transformer_blocks\.1(\.attn1)? of .* was replaced after fastercache\.compile"
    ):
        sample(model)
    fastercache.restore(model)
    sample(cached(model, **options))


class TestChanges:
    """Of the schedule, the step count and the weights' dtype (see tests/test_graphs.py, too)."""

    def test_another_schedule(self):
        counter = CompileCounter()
        model = cached(cogvideox(), backend=counter)
        sample(model)
        with pytest.raises(CompileError, match="compiled by fastercache already"):
            cached(model, schedule="plain", backend=counter)
        fastercache.restore(model)
        close(cached(model, schedule="plain", backend=counter), sample(cached(cogvideox(), schedule="plain")))
        assert counter.frame_count == 6

    def test_a_fixed_schedule_has_its_step_count(self):
        model = cogvideox()
        schedule = Schedule((Step(), Step(), *(Step("both", ("joint",), (1.5, -0.5)) for _ in range(4))))
        fastercache.compile(model, schedule, backend="eager")
        with (
            pytest.raises(ScheduleError, match="has 6 steps, but this run has 7"),
            fastercache.run(model, steps=7, cfg="uncond-first"),
        ):
            sample(model, 7)
        with fastercache.run(model, steps=6, cfg="uncond-first"):
            sample(model, 6)

    def test_another_dtype_within_a_run(self):
        """Of the weights alone: they do not fit the inputs. Of both: another run."""
        model = cached(cogvideox(torch.float32), backend="eager", regional=True)
        sample(model, 5)
        inputs = arguments(model, 4)
        with pytest.raises(RuntimeError, match=r"dtype|type"):
            model.to(torch.bfloat16)(**inputs)
        model.to(torch.float32)
        expected = sample(cached(cogvideox(torch.float32).to(torch.bfloat16).to(torch.float32)))
        torch.testing.assert_close(sample(model), expected)
        sample(model, 5)
        model.to(torch.float64)
        close(model, sample(cached(cogvideox(torch.float32).to(torch.bfloat16).to(torch.float64))))


def test_a_pipeline_with_group_offloading():
    pipe = load()
    pipe.set_progress_bar_config(disable=True)
    settings = CALL | {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "latent"}

    def frames():
        return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **settings).frames

    fastercache.compile(pipe)
    expected = frames()
    fastercache.restore(pipe)
    fastercache.compile(pipe, backend="eager", regional=True)
    group_offload(pipe.transformer, "block_level")
    torch.testing.assert_close(frames(), expected)
    torch.testing.assert_close(frames(), expected)
    assert "6 graphs by eager" in str(fastercache.summary(pipe))
