"""Which code serves an op: registration with torch, the choice for each kind of device, and what replaces a kernel that
does not launch."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from fastercache.ops.registry import OPS, Op, Sizes
from fastercache.triton_kernels import _triton

_library = torch.library.Library("fastercache", "DEF")  # the registrations live as long as this object


def _load(name: str, what: str) -> str | None:
    """Loads the library `<name>*.so`, which registers itself. Returns why it could not, or None."""
    paths = sorted(Path(__file__).parents[1].glob(f"{name}.*"))
    if not paths:
        return (
            f"the {what} library was not built (no fastercache/{name}*.so); installing with "
            "FASTERCACHE_BUILD=require shows why"
        )
    try:
        torch.ops.load_library(str(paths[0]))
    except Exception as error:
        built = re.search(rb"fastercache built with torch ([\d.]+)", paths[0].read_bytes())
        version = built[1].decode() if built else "an unknown version"
        return (
            f"{paths[0].name} was built with torch {version} and does not load with the installed torch "
            f"{torch.__version__}: {error}"
        )
    return None


def _find_missing() -> dict[str, str | None]:
    """Loads the libraries. Returns for each way to serve an op why it is not to be had, or None."""
    if os.environ.get("FASTERCACHE_FORCE_REFERENCE") == "1":
        return dict.fromkeys(("C++", "CUDA C++", "Triton"), "FASTERCACHE_FORCE_REFERENCE=1 is set")
    return {
        "C++": _load("_ops", "C++"),
        "CUDA C++": _load("_ops_cuda", "CUDA C++") if torch.version.cuda else "the installed torch has no CUDA",
        "Triton": f"Triton cannot be imported ({_triton.MISSING})" if _triton.MISSING else None,
    }


_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
"""The kinds of devices that something faster than PyTorch is made for, and the dispatcher's name for each."""
_MISSING = _find_missing()
_CHOSEN: dict[str, dict[str, str]] = {}
_REPLACED: list[tuple[str, str]] = []
"""Kind of device, and a sentence on an op that could not be launched there."""
_LAUNCHED: set[tuple[str, Sizes]] = set()
_LOCK = threading.Lock()


def define(op: Op) -> Callable[..., None]:
    """Adds an op to `OPS` and to torch's dispatcher, and chooses what serves it. Returns what the dispatcher calls for
    it."""
    OPS[op.name] = op
    _library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"fastercache::{op.name}", lambda *args: None, lib=_library)
    if op.fallback:
        _library.impl(
            op.name, op.reference, "CompositeExplicitAutograd"
        )  # on every kind of device that has nothing of its own
    chosen = {kind: next(how for how in found if _MISSING.get(how) is None) for kind, found in _candidates(op).items()}
    if chosen["cuda"] == "Triton":
        _library.impl(op.name, op.triton, "CUDA")
    _CHOSEN[op.name] = chosen
    return getattr(torch.ops.fastercache, op.name).default


def _candidates(op: Op) -> dict[str, list[str]]:
    """What may serve an op on each kind of device, best first."""
    last = "PyTorch" if op.fallback else "none"
    on_cuda = [*(["CUDA C++"] if op.cuda else []), *(["Triton"] if op.triton else []), last]
    return {"cpu": [*(["C++"] if op.cpp else []), last], "cuda": on_cuda}


def implementations() -> dict[str, dict[str, str]]:
    """Which code serves each op: `{op: {"cpu": "C++" | "PyTorch" | "none", "cuda": "CUDA C++" | "Triton" | "PyTorch" |
    "none"}}`."""
    return {name: dict(chosen) for name, chosen in _CHOSEN.items()}


def implementation(name: str, device: torch.device) -> str:
    """Which code serves an op on a device of any kind: as in `implementations`; plain PyTorch, or none, where nothing
    is made for it."""
    return _CHOSEN[name].get(device.type, "PyTorch" if OPS[name].fallback else "none")


def fallback_reasons(device: torch.device | None = None) -> list[str]:
    """Why something slower serves the ops, one sentence for each cause; empty when nothing falls back. Of all devices,
    or of one."""
    if device is not None and device.type not in _KEYS:
        return [f"On {device.type}, the ops run on PyTorch: fastercache has faster ones for the CPU and for CUDA only."]
    reasons = []
    if _MISSING["C++"]:
        reasons.append(("cpu", f"The CPU ops run on PyTorch: {_MISSING['C++']}."))
    if _MISSING["Triton"]:
        reasons.append(("cuda", f"The CUDA ops run on PyTorch: {_MISSING['Triton']}."))
    elif _MISSING["CUDA C++"] and torch.version.cuda:
        in_cuda = ", ".join(op.name for op in OPS.values() if op.cuda)
        reasons.append(("cuda", f"On CUDA, {in_cuda} run on Triton: {_MISSING['CUDA C++']}."))
    return [sentence for kind, sentence in (*reasons, *_REPLACED) if device is None or kind == device.type]


def packed_missing(device: torch.device) -> str | None:
    """Why packed rings cannot be used on a device, or None where they can."""
    missing = [name for name, op in OPS.items() if not op.fallback and implementation(name, device) == "none"]
    if not missing:
        return None
    return " ".join([f"nothing serves {', '.join(missing)} on {device.type}.", *fallback_reasons(device)])


def prepare(
    names: Iterable[str],
    device: torch.device,
    dtype: torch.dtype,
    rings: Iterable[tuple[int, int]] = (),
    planes: tuple[int, int, int] | None = None,
    prediction: Iterable[int] | None = None,
) -> bool:
    """Launches each of the named ops, on tensors without content, so that nothing is compiled or loaded in the middle
    of a run.

    What cannot be launched (Triton has no C compiler, or CUDA C++ no image for this GPU) is replaced by what comes
    next, in this process and on all devices of the kind; `fallback_reasons` then says why.

    Args:
        names: of the ops that will be called.
        device, dtype, rings, planes, prediction: as in `fastercache.ops.registry.Sizes`.

    Returns:
        Whether something serves each of them still; `packed_missing` says what does not.

    Raises:
        ValueError: what one of the ops will be called with is not given.
    """
    names = tuple(names)
    sizes = Sizes(device, dtype, tuple(sorted(set(rings))), planes, None if prediction is None else tuple(prediction))
    with _LOCK:
        for name in names:
            if (name, sizes) in _LAUNCHED or implementation(name, device) in ("PyTorch", "none"):
                continue
            examples = list(OPS[name].examples(sizes))
            if not examples:
                raise ValueError(
                    f"there is nothing to call {name} with: give rings, planes or prediction, whichever it works on"
                )
            for arguments in examples:
                _launch(name, device.type, arguments)
            _LAUNCHED.add((name, sizes))
    return all(implementation(name, device) != "none" for name in names)


def _launch(name: str, kind: str, arguments: tuple[Any, ...]) -> None:
    """Calls what serves an op on a kind of device, and replaces it for as long as it fails."""
    while (how := _CHOSEN[name][kind]) not in ("PyTorch", "none"):
        serve: Any = OPS[name].triton if how == "Triton" else getattr(torch.ops.fastercache, name).default
        try:
            serve(*arguments)
            return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            text = (str(error).strip() or repr(error)).splitlines()[0]
            _replace(name, kind, f"it cannot be launched in {how} ({type(error).__name__}: {text})")


def _replace(name: str, kind: str, why: str) -> None:
    """Let the next candidate serve an op. Triton that cannot be imported is not one."""
    found = _candidates(OPS[name])[kind]
    rest = found[found.index(_CHOSEN[name][kind]) + 1 :]
    how = next(one for one in rest if one != "Triton" or _triton.MISSING is None)

    def refuse(*arguments: Any) -> None:
        raise NotImplementedError(f"nothing serves {name} on {kind}: {why}")

    served_by = {"Triton": OPS[name].triton, "PyTorch": OPS[name].reference, "none": refuse}[how]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that a kernel is replaced
        _library.impl(name, served_by, _KEYS[kind])
    _CHOSEN[name][kind] = how
    _REPLACED.append((kind, f"On {kind}, {name} {f'runs on {how}' if how != 'none' else 'is not to be had'}: {why}."))
