"""The ops as torch sees them: schemas, fake implementations, compilation, error messages, fallbacks."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastercache import ops
from fastercache.ops import dispatch
from fastercache.ops.registry import OPS as REGISTRY
from fastercache.triton_kernels import _triton
from fastercache.triton_kernels import cfg_split as split

from .helpers import OPS, generator, make_coefficients, nan, randn


def arguments(name, dtype=torch.float32):
    """Valid arguments of an op, one of them a view with gaps."""
    rng = generator(0)
    ring = randn([3, 4, 5, 6], dtype, rng)[:, 2:]
    x, gate = randn([2, 5, 6], dtype, rng, "permuted"), randn([2, 1, 6], dtype, rng)
    cond, low, high = randn([2, 5, 6], dtype, rng), *(randn([2, 5, 6], ops.map_dtype(dtype), rng) for _ in range(2))
    coefficients = make_coefficients(
        [1.5, -0.5], [2, 1], push=1, low=1.0, high=1.2, now=0.4, newest=-0.3, previous=-0.5, fresh=0.9
    )
    packed = torch.zeros(2, 5, ops.PackedLine(6, 8).bytes, dtype=torch.uint8)
    return {
        "ring_push": {"ring": ring, "x": x, "coefficients": coefficients},
        "ring_push_residual": {"ring": ring, "x": x, "entry": cond, "coefficients": coefficients},
        "ring_blend": {"ring": ring, "coefficients": coefficients, "out": x.contiguous()},
        "ring_blend_add": {"x": x.contiguous(), "gate": gate, "ring": ring, "coefficients": coefficients},
        "packed_push": {"ring": packed, "x": x, "bits": 8},
        "packed_push_residual": {"ring": packed, "x": x, "entry": cond, "bits": 8},
        "packed_blend": {"ring": packed, "coefficients": coefficients, "out": x.contiguous(), "bits": 8},
        "packed_blend_add": {
            "x": x.contiguous(),
            "gate": gate,
            "ring": packed,
            "coefficients": coefficients,
            "bits": 8,
        },
        "cfg_split": {"low": low, "high": high, "uncond": x, "cond": cond, "radius": 1},
        "cfg_reconstruct": {
            "out": randn([4, 5, 6], dtype, rng),
            "cond": x,
            "low": low,
            "high": high,
            "coefficients": coefficients,
            "cond_half": 1,
        },
        "prediction_blend": {
            "out": nan([2, 5, 6], dtype),
            "ring": ring,
            "newest": cond,
            "now": x,
            "coefficients": coefficients,
        },
    }[name]


def optional_arguments(dtype=torch.float32):
    """What some ops may be given besides."""
    previous, fresh = (
        randn([2, 5, 6], ops.map_dtype(dtype), generator(1)),
        randn([2, 5, 6], dtype, generator(2), "permuted"),
    )
    return {"cfg_reconstruct": {"previous": previous}, "prediction_blend": {"fresh": fresh}}


def in_schema_order(name, given):
    """Positional arguments of the dispatcher's op; None for optional ones that are not given."""
    op = getattr(torch.ops.fastercache, name).default
    return tuple(given.get(argument.name) for argument in op._schema.arguments)


needs_packed = pytest.mark.skipif(
    ops.packed_missing(torch.device("cpu")) is not None, reason="packed rings need the C++ library"
)
EACH_OP = [pytest.param(name, marks=needs_packed if name.startswith("packed") else ()) for name in OPS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EACH_OP)
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(torch.ops.fastercache, name).default, in_schema_order(name, arguments(name, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", optional_arguments())
def test_opcheck_with_optional_arguments(name, dtype):
    given = arguments(name, dtype) | optional_arguments(dtype)[name]
    torch.library.opcheck(getattr(torch.ops.fastercache, name).default, in_schema_order(name, given))


@pytest.mark.parametrize("name", EACH_OP)
def test_fake_tensors(name):
    """An op on meta tensors, the whole function with its checks, gives the shape and dtype and touches no memory."""
    real = arguments(name, torch.bfloat16)
    if name == "ring_blend":
        del real["out"]  # then the op makes it
    out = getattr(ops, name)(
        **{key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in real.items()}
    )
    expected = getattr(ops, name)(**real)
    if expected is None:
        assert out is None
    else:
        assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_compiles_to_one_graph_that_other_rows_reuse():
    def step(ring, x, gate, coefficients):
        ops.ring_push(ring[:, 2:], x, coefficients)
        y = x * 1.0
        ops.ring_blend_add(y, gate, ring[:, 2:], coefficients)
        return y + ops.ring_blend(ring[:, 2:], coefficients)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    rng = generator(0)
    for push in (0, 1, 2):
        ring, x, gate = randn([3, 4, 5, 6], torch.float32, rng), randn([2, 5, 6], torch.float32, rng), torch.ones(1)
        coefficients = make_coefficients([1.5, -0.5], [push, (push + 1) % 3], push=push)
        other = ring.clone()
        with torch.compiler.set_stance("default" if push == 0 else "fail_on_recompile"):
            assert torch.equal(compiled(ring, x, gate, coefficients), step(other, x, gate, coefficients))
        assert torch.equal(ring, other)


def test_reconstruct_in_place_compiles():
    def step(out, low, high, coefficients):
        out = out + 0
        ops.cfg_reconstruct(out, out[2:], low, high, coefficients, 1)
        return out

    args = arguments("cfg_reconstruct")
    given = [args[key] for key in ("out", "low", "high", "coefficients")]
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(*given), step(*given))


def test_a_prediction_corrected_in_place_compiles():
    def step(fresh, ring, newest, now, coefficients):
        fresh = fresh * 1.0
        ops.prediction_blend(fresh, ring, newest, now, coefficients, fresh)
        return fresh

    args = arguments("prediction_blend")
    given = [args["newest"] + 1, *(args[key] for key in ("ring", "newest", "now", "coefficients"))]
    assert torch.equal(torch.compile(step, backend="aot_eager", fullgraph=True)(*given), step(*given))


@pytest.mark.parametrize("name", ["out and newest", "out and now"])
def test_a_prediction_does_not_replace_its_latents(name):
    given = arguments("prediction_blend")
    given[name.split()[-1]] = given["out"]
    with pytest.raises(ValueError, match=f"{name} are one tensor"):
        ops.prediction_blend(**given)


def overlapping(shape):
    return torch.zeros(shape[1:]).expand(shape)


ERRORS = [
    ("ring_push", {"ring": torch.zeros(3, 2, 5, 6, dtype=torch.int32)}, TypeError, "ring has dtype torch.int32"),
    ("ring_push", {"ring": torch.zeros(())}, ValueError, r"ring has shape \[\], expected \[slots"),
    ("ring_push", {"ring": torch.zeros(0, 2, 5, 6)}, ValueError, "at least one slot"),
    ("ring_push", {"ring": torch.zeros(3, 2, 6, 5).transpose(2, 3)}, ValueError, r"ring has strides \[60, 30, 1, 5\]"),
    ("ring_push", {"ring": overlapping((3, 2, 5, 6))}, ValueError, "slots of 60 elements 0 apart"),
    ("ring_push", {"x": torch.zeros(2, 5, 7)}, ValueError, r"x has shape \[2, 5, 7\], expected \[2, 5, 6\]"),
    (
        "ring_push",
        {"x": torch.zeros(2, 5, 6, dtype=torch.float16)},
        TypeError,
        "x has dtype torch.float16, expected torch.float32",
    ),
    ("ring_push", {"x": torch.zeros(2, 5, 6, device="meta")}, ValueError, "x is on meta, expected cpu"),
    ("ring_push", {"coefficients": torch.zeros(15)}, ValueError, r"coefficients has shape \[15\], expected \[16\]"),
    ("ring_push", {"coefficients": torch.zeros(16, 1)}, ValueError, r"coefficients has shape \[16, 1\]"),
    (
        "ring_push",
        {"coefficients": torch.zeros(16, dtype=torch.float64)},
        TypeError,
        "coefficients has dtype torch.float64",
    ),
    (
        "ring_push",
        {"coefficients": torch.zeros(16, device="meta")},
        ValueError,
        "coefficients is on meta, expected cpu",
    ),
    ("ring_push", {"coefficients": torch.zeros(32)[::2]}, ValueError, r"coefficients has strides \[2\]"),
    ("ring_push", {"coefficients": make_coefficients(push=3)}, (RuntimeError, IndexError), "slot 3|out of bounds"),
    ("ring_push", {"coefficients": make_coefficients(push=-1)}, (RuntimeError, IndexError), "slot -1|out of bounds"),
    (
        "ring_push_residual",
        {"entry": torch.zeros(2, 5, 7)},
        ValueError,
        r"entry has shape \[2, 5, 7\], expected \[2, 5, 6\]",
    ),
    (
        "ring_push_residual",
        {"entry": torch.zeros(2, 5, 6).half()},
        TypeError,
        "entry has dtype torch.float16, expected torch.float32",
    ),
    (
        "ring_push_residual",
        {"entry": torch.zeros(2, 5, 6, device="meta")},
        ValueError,
        "entry is on meta, expected cpu",
    ),
    (
        "ring_push_residual",
        {"coefficients": make_coefficients(push=3)},
        (RuntimeError, IndexError),
        "slot 3|out of bounds",
    ),
    (
        "ring_blend",
        {"coefficients": make_coefficients([1.0], [7])},
        (RuntimeError, IndexError),
        "slot 7|out of (range|bounds)",
    ),
    ("ring_blend", {"coefficients": torch.zeros(17)}, ValueError, r"coefficients has shape \[17\]"),
    ("ring_blend", {"out": torch.zeros(2, 6, 5)}, ValueError, r"out has shape \[2, 6, 5\], expected \[2, 5, 6\]"),
    ("ring_blend", {"out": torch.zeros(2, 6, 5).mT}, ValueError, "out has strides"),
    ("packed_push", {"bits": 2}, ValueError, "bits is 2, expected one of 0, 4, 8"),
    (
        "packed_push",
        {"x": torch.zeros(2, 5, 6, dtype=torch.float64)},
        TypeError,
        "x has dtype torch.float64, expected one of",
    ),
    ("packed_push", {"x": torch.zeros(())}, ValueError, r"x has shape \[\], expected \[..., channels\]"),
    ("packed_push", {"x": torch.zeros(2, 4, 6)}, ValueError, r"ring has shape \[2, 5, 48\], expected \[2, 4, 48\]"),
    ("packed_push", {"ring": torch.zeros(2, 5, 48)}, TypeError, "ring has dtype torch.float32, expected torch.uint8"),
    ("packed_push", {"ring": torch.zeros(2, 5, 96, dtype=torch.uint8)[..., ::2]}, ValueError, "ring has strides"),
    (
        "packed_push",
        {"ring": torch.zeros(2 * 5 * 48 + 1, dtype=torch.uint8)[1:].view(2, 5, 48)},
        ValueError,
        "ring begins 1 bytes into its storage, expected a multiple of 16",
    ),
    (
        "packed_push_residual",
        {"entry": torch.zeros(2, 4, 6)},
        ValueError,
        r"entry has shape \[2, 4, 6\], expected \[2, 5, 6\]",
    ),
    (
        "packed_push_residual",
        {"entry": torch.zeros(2, 5, 6).half()},
        TypeError,
        "entry has dtype torch.float16, expected torch.float32",
    ),
    (
        "packed_blend",
        {"coefficients": make_coefficients([1.0, 2.0, 3.0], [0, 1, 2])},
        RuntimeError,
        "use 3 taps, a packed ring of these bits holds 2",
    ),
    ("packed_blend", {"out": torch.zeros(2, 6, 5).mT}, ValueError, "out has strides|ring has shape"),
    ("packed_blend_add", {"gate": torch.zeros(3, 1, 6)}, ValueError, r"gate has shape \[3, 1, 6\]"),
    ("packed_blend_add", {"x": torch.zeros(1, 5, 6).expand(2, 5, 6)}, ValueError, "expected no broadcast dimension"),
    ("ring_blend_add", {"x": torch.zeros(2, 6, 5).transpose(1, 2)}, ValueError, "expected 1 in the last dimension"),
    ("ring_blend_add", {"x": torch.zeros(1, 5, 6).expand(2, 5, 6)}, ValueError, "expected no broadcast dimension"),
    (
        "ring_blend_add",
        {"gate": torch.zeros(2, 1, 6, dtype=torch.bfloat16)},
        TypeError,
        "gate has dtype torch.bfloat16",
    ),
    ("ring_blend_add", {"gate": torch.zeros(3, 1, 6)}, ValueError, r"gate has shape \[3, 1, 6\]"),
    ("ring_blend_add", {"gate": torch.zeros(1, 2, 5, 6)}, ValueError, r"gate has shape \[1, 2, 5, 6\]"),
    ("ring_blend_add", {"gate": torch.zeros(1, device="meta")}, ValueError, "gate is on meta"),
    ("cfg_split", {"uncond": torch.zeros(2, 5, 6, dtype=torch.int64)}, TypeError, "uncond has dtype torch.int64"),
    ("cfg_split", {"uncond": torch.zeros(6)}, ValueError, r"expected \[..., H, W\]"),
    ("cfg_split", {"cond": torch.zeros(1, 5, 6)}, ValueError, r"cond has shape \[1, 5, 6\]"),
    ("cfg_split", {"low": torch.zeros(2, 5, 6, dtype=torch.float64)}, TypeError, "low has dtype torch.float64"),
    ("cfg_split", {"high": torch.zeros(2, 6, 5).mT}, ValueError, "high has strides"),
    ("cfg_split", {"radius": 3}, ValueError, "radius is 3 for planes of 5 x 6"),
    ("cfg_split", {"radius": -1}, ValueError, "radius is -1"),
    ("cfg_split", {"radius": 1.0}, TypeError, "radius is 1.0, expected an int"),
    ("cfg_reconstruct", {"out": torch.zeros(3, 5, 6)}, ValueError, r"out has shape \[3, 5, 6\], expected \[4, 5, 6\]"),
    ("cfg_reconstruct", {"out": torch.zeros(4, 6, 5).mT}, ValueError, "out has strides"),
    ("cfg_reconstruct", {"cond": torch.zeros(2, 5, 6, dtype=torch.int8)}, TypeError, "cond has dtype torch.int8"),
    ("cfg_reconstruct", {"cond": torch.zeros(())}, ValueError, "cond has no dimension"),
    ("cfg_reconstruct", {"low": torch.zeros(4, 5, 6)}, ValueError, r"low has shape \[4, 5, 6\]"),
    ("cfg_reconstruct", {"coefficients": torch.zeros(2, 8)}, ValueError, r"coefficients has shape \[2, 8\]"),
    ("cfg_reconstruct", {"cond_half": 2}, ValueError, "cond_half is 2"),
    (
        "cfg_reconstruct",
        {"previous": torch.zeros(4, 5, 6)},
        ValueError,
        r"previous has shape \[4, 5, 6\], expected \[2, 5, 6\]",
    ),
    ("cfg_reconstruct", {"previous": torch.zeros(2, 6, 5).mT}, ValueError, "previous has strides"),
    ("prediction_blend", {"out": torch.zeros(2, 6, 5).mT}, ValueError, "out has strides"),
    ("prediction_blend", {"out": torch.zeros(2, 5, 6).half()}, TypeError, "out has dtype torch.float16"),
    ("prediction_blend", {"newest": torch.zeros(2, 6, 5).mT}, ValueError, "newest has strides"),
    ("prediction_blend", {"newest": torch.zeros(5, 6)}, ValueError, r"newest has shape \[5, 6\], expected \[2, 5, 6\]"),
    (
        "prediction_blend",
        {"now": torch.zeros(2, 5, 6).double()},
        TypeError,
        "now has dtype torch.float64, expected torch.float32",
    ),
    ("prediction_blend", {"fresh": torch.zeros(2, 5, 6, device="meta")}, ValueError, "fresh is on meta, expected cpu"),
    (
        "prediction_blend",
        {"coefficients": make_coefficients([1.0], [7])},
        (RuntimeError, IndexError),
        "slot 7|out of (range|bounds)",
    ),
]


@pytest.mark.parametrize("name,wrong,error,message", ERRORS)
def test_errors_name_the_bad_value(name, wrong, error, message):
    if error is RuntimeError and name.startswith("packed") and ops.packed_missing(torch.device("cpu")):
        pytest.skip("packed rings need the C++ library")
    with pytest.raises(error, match=message):
        getattr(ops, name)(**(arguments(name) | wrong))


def test_low_and_high_must_differ():
    low = torch.zeros(2, 5, 6)
    with pytest.raises(ValueError, match="one tensor"):
        ops.cfg_split(**(arguments("cfg_split") | {"low": low, "high": low}))


def test_prepare_checks_its_radius():
    ops.prepare_cfg_split(60, 90, 12, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="radius is 30 for planes of 60 x 90"):
        ops.prepare_cfg_split(60, 90, 30, torch.bfloat16, "cpu")


def in_new_process(script, **environment):
    """What `script` prints as JSON in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


REPORT = """
import json, sys
{before}
import torch
from fastercache import ops
ring = torch.zeros(2, 3)
coefficients = torch.zeros(16)
ops.ring_push(ring, torch.ones(3), coefficients)
print(json.dumps([ops.implementations()["ring_blend"], ops.fallback_reasons(), ring.tolist()]))
"""


def test_the_reference_can_be_forced():
    chosen, reasons, ring = in_new_process(REPORT.format(before=""), FASTERCACHE_FORCE_REFERENCE="1")
    assert chosen == {"cpu": "PyTorch", "cuda": "PyTorch"} and ring == [[1, 1, 1], [0, 0, 0]]
    assert len(reasons) == 2 and all("FASTERCACHE_FORCE_REFERENCE" in reason for reason in reasons)


def test_it_works_without_triton():
    chosen, reasons, ring = in_new_process(
        REPORT.format(before="sys.modules['triton'] = None"), FASTERCACHE_FORCE_REFERENCE="0"
    )
    assert chosen["cuda"] == "PyTorch" and ring == [[1, 1, 1], [0, 0, 0]]
    assert any("Triton cannot be imported" in reason for reason in reasons)


def test_a_library_that_does_not_load_is_reported(tmp_path):
    """A copy of the package with a damaged library imports, says so with both versions, and works."""
    package = tmp_path / "fastercache"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copytree(os.path.dirname(ops.__file__), package / "ops")
    (package / "_ops.so").write_bytes(b"fastercache built with torch 2.11.0\0")
    (package / "triton_kernels").symlink_to(os.path.dirname(_triton.__file__))
    before = f"sys.path.insert(0, {str(tmp_path)!r})"
    chosen, reasons, ring = in_new_process(REPORT.format(before=before), FASTERCACHE_FORCE_REFERENCE="0")
    assert chosen["cpu"] == "PyTorch" and ring == [[1, 1, 1], [0, 0, 0]]
    assert f"built with torch 2.11.0 and does not load with the installed torch {torch.__version__}" in reasons[0]


@pytest.mark.parametrize("name", EACH_OP)
def test_prepare_launches_every_op_once(name, monkeypatch):
    """With arguments that the public function takes, and again only for other sizes."""
    signature, launched = inspect.signature(getattr(ops, name)), []
    order = [argument.name for argument in getattr(torch.ops.fastercache, name).default._schema.arguments]
    monkeypatch.setattr(
        dispatch, "_launch", lambda name, kind, given: launched.append(dict(zip(order, given, strict=False)))
    )
    monkeypatch.setattr(dispatch, "_CHOSEN", {name: {"cpu": "C++"}})
    monkeypatch.setattr(dispatch, "_LAUNCHED", set())

    def prepare(channels):
        sizes = {"rings": [(channels, 8), (channels, 4)], "planes": (9, 12, 2), "prediction": (2, 4, 9, 12)}
        return ops.prepare([name], torch.device("cpu"), torch.bfloat16, **sizes)

    assert prepare(24) and launched
    for given in launched:
        getattr(ops, name)(*(given.get(parameter) for parameter in signature.parameters))
    count = len(launched)
    assert prepare(24) and len(launched) == count
    assert prepare(32) and len(launched) > count


def test_kept_predictions_are_pushed_before_they_are_needed(monkeypatch):
    """A schedule that keeps predictions alone has no rings: their push is launched for their shape and type."""
    launched = []
    monkeypatch.setattr(
        dispatch, "_launch", lambda name, kind, given: launched.append((name, given[0].shape, given[0].dtype))
    )
    monkeypatch.setattr(dispatch, "_CHOSEN", {name: {"cpu": "C++"} for name in ("ring_push", "prediction_blend")})
    monkeypatch.setattr(dispatch, "_LAUNCHED", set())
    ops.prepare(["ring_push", "prediction_blend"], torch.device("cpu"), torch.float16, prediction=[3, 5])
    assert launched == [("ring_push", (1, 3, 5), torch.float32)] + 2 * [("prediction_blend", (3, 5), torch.float32)]
    with pytest.raises(ValueError, match="nothing to call ring_push with: give rings, planes or prediction"):
        ops.prepare(["ring_push"], torch.device("cpu"), torch.float16)


@pytest.mark.parametrize("name", OPS)
def test_the_cpp_library_holds_what_its_op_says(name):
    if ops.implementations()["cfg_split"]["cpu"] != "C++":
        pytest.skip("the C++ library is not built")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastercache::{name}", "CPU") == REGISTRY[name].cpp


@pytest.mark.parametrize("name", OPS)
def test_the_cuda_sources_hold_what_their_op_says(name):
    source = (Path(__file__).parents[2] / "csrc" / "bindings" / "cuda.cpp").read_text()
    assert (f'm.impl("{name}"' in source) == REGISTRY[name].cuda


def test_implementations_name_every_op():
    assert set(ops.implementations()) == set(OPS)
    for name, chosen in ops.implementations().items():
        stand_in = "none" if name.startswith("packed") else "PyTorch"
        assert chosen["cpu"] in ("C++", stand_in) and chosen["cuda"] in ("CUDA C++", "Triton", stand_in)


BROKEN_LAUNCHES = """
import dataclasses, json
from types import SimpleNamespace
import torch
from fastercache import ops
from fastercache.ops import dispatch
from fastercache.ops.registry import OPS, Sizes
Sizes.zeros = lambda sizes, *shape, dtype=None: torch.zeros(shape, dtype=dtype or sizes.dtype)  # there need be no GPU
tried = []
def broken(*arguments):
    tried.append(1)
    raise RuntimeError("{error}")
for name in {names}:
    {break_it}
names, cuda = list(OPS), torch.device("cuda")
def prepare():
    return ops.prepare(names, cuda, torch.float32, rings=[(128, 8)], planes=(16, 16, 3), prediction=(2, 16, 16))
served = prepare()
first = len(tried)
again = prepare()
chosen = {{name: how["cuda"] for name, how in ops.implementations().items()}}
print(json.dumps([served, again, chosen, ops.fallback_reasons(cuda), ops.packed_missing(cuda), len(tried) - first]))
"""
needs_triton = pytest.mark.skipif(_triton.MISSING is not None, reason="needs Triton")


@needs_triton
def test_a_triton_kernel_that_cannot_be_launched_is_replaced_as_a_run_begins():
    """Plain PyTorch serves what it can; packed rings are refused with the reason, and nothing is tried twice. Kernels
    that launch stay."""
    break_it = "OPS[name] = dataclasses.replace(OPS[name], triton=broken)"
    names = ["ring_blend", "packed_blend", "cfg_split"]
    script = BROKEN_LAUNCHES.format(names=names, error="Failed to find C compiler", break_it=break_it)
    served, again, chosen, reasons, missing, tries = in_new_process(script, FASTERCACHE_FORCE_REFERENCE="0")
    assert not served and not again and tries == 0
    assert (chosen["ring_blend"], chosen["cfg_split"], chosen["packed_blend"]) == ("PyTorch", "PyTorch", "none")
    assert any(
        "ring_blend runs on PyTorch" in one and "RuntimeError: Failed to find C compiler" in one for one in reasons
    )
    assert all(how in ("Triton", "CUDA C++") for name, how in chosen.items() if name not in names)
    assert sum("launched" in reason for reason in reasons) == len(names)
    assert "nothing serves packed_blend on cuda" in missing and "Failed to find C compiler" in missing


@needs_triton
def test_triton_serves_the_pushes_where_no_built_image_fits():
    names = [op.name for op in REGISTRY.values() if op.cuda]
    break_it = (
        "dispatch._CHOSEN[name]['cuda'] = 'CUDA C++'; setattr(torch.ops.fastercache, "
        "name, SimpleNamespace(default=broken))"
    )
    error = "CUDA error: no kernel image is available for execution on the device"
    script = BROKEN_LAUNCHES.format(names=names, error=error, break_it=break_it)
    served, _, chosen, reasons, missing, _ = in_new_process(script, FASTERCACHE_FORCE_REFERENCE="0")
    assert served and missing is None and names == ["packed_push", "packed_push_residual", "ring_push"]
    for name in names:
        assert chosen[name] == "Triton"
        assert any(f"{name} runs on Triton" in reason and "no kernel image" in reason for reason in reasons)


@needs_triton
def test_without_the_cuda_library_triton_serves_both_pushes():
    if ops.implementations()["ring_push"]["cuda"] == "CUDA C++":
        pytest.skip("the CUDA library is built")
    assert ops.packed_missing(torch.device("cuda")) is None or "FORCE_REFERENCE" in ops.packed_missing(
        torch.device("cuda")
    )


PLAIN = [name for name in OPS if not name.startswith("packed")]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_pytorch_serves_devices_of_other_kinds(name):
    """What the dispatcher calls for such a device gives what the CPU does: run here on tensors of the CPU."""
    for key in ("MPS", "XPU", "PrivateUse1"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastercache::{name}", key)
    theirs, ours = arguments(name), arguments(name)
    op = getattr(torch.ops.fastercache, name).default
    op(*in_schema_order(name, theirs))
    op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *in_schema_order(name, ours))
    for key, value in ours.items():
        if isinstance(value, torch.Tensor) and key != "coefficients":
            torch.testing.assert_close(value, theirs[key], msg=key)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_devices_of_other_kinds_have_a_name_for_what_serves_them(kind):
    device = torch.device(kind)
    assert {ops.implementation(name, device) for name in PLAIN} == {"PyTorch"}
    assert ops.fallback_reasons(device) == [
        f"On {kind}, the ops run on PyTorch: fastercache has faster ones for the CPU and for CUDA only."
    ]
    assert (
        f"nothing serves packed_blend, packed_blend_add, packed_push, packed_push_residual on {kind}"
        in ops.packed_missing(device)
    )


def test_the_split_needs_no_float64(monkeypatch):
    given, expected = arguments("cfg_split"), arguments("cfg_split")
    split.reference_cfg_split(**expected)
    monkeypatch.setattr(split, "has_float64", lambda device: False)
    split.reference_cfg_split(**given)
    for name in ("low", "high"):
        torch.testing.assert_close(given[name], expected[name])
