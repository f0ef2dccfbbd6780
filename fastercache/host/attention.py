"""diffusers' attention backends: what a model runs on, setting one and putting back what was there, and timing those
that are installed.

diffusers is imported only for models that have its attention processors.
"""

from __future__ import annotations

import re
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fastercache.errors import CompileError

EXACT = (
    "native",
    "_native_cudnn",
    "_native_flash",
    "_native_efficient",
    "_native_math",
    "_native_npu",
    "_native_xla",
    "flash",
    "_flash_3",
    "xformers",
    "flex",
)
"""Those that "auto" times. Not the quantized ones (sage), which change the video, nor those that a name with "hub"
would download, nor the `varlen` ones, which read their masks back on every call."""
MOST_SCORES = 2**30
"""Bytes of attention scores up to which `_native_math`, which holds them all, is timed."""
CHECKED_ROWS = 16
MARGIN = 0.05
"""How much faster than `native` the pick has to be: `native` often is the same kernel, and noise should not decide
between them."""

_MISSING = object()


def _dispatch() -> Any:
    from diffusers.models import attention_dispatch

    return attention_dispatch


def why_missing(name: str) -> str | None:
    """Why a backend is not to be had on this machine, None if it is. Whether it runs a model, the model's first call
    shows."""
    dispatch = _dispatch()
    try:
        backend = dispatch.AttentionBackendName(name)
    except ValueError:
        return "diffusers has no such backend"
    if backend not in dispatch._AttentionBackendRegistry._backends:
        return "diffusers has no implementation of it"
    try:
        dispatch._check_attention_backend_requirements(backend)
    except RuntimeError as error:
        return str(error).strip().rstrip(".")
    return None


def available() -> list[str]:
    """Names of the backends whose requirements are installed."""
    return [backend.value for backend in _dispatch().AttentionBackendName if why_missing(backend.value) is None]


@dataclass
class _Call:
    """One kind of call of the attention that a model makes: its arguments, with `query`, `key`, `value` as shapes, and
    how often."""

    arguments: dict[str, Any]
    device: torch.device
    count: int = 0

    @property
    def scores_bytes(self) -> int:
        query, key = self.arguments["query"], self.arguments["key"]
        return query.shape[0] * query.shape[2] * query.shape[1] * key.shape[1] * query.element_size()

    def with_values(self) -> dict[str, Any]:
        """The same call on random values; the random state that a user seeds is not touched."""
        generator = torch.Generator(self.device).manual_seed(0)
        values = {
            name: torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype, device=self.device).normal_(
                generator=generator
            )
            for name, shape in self.arguments.items()
            if name in ("query", "key", "value")
        }
        return self.arguments | values


class Attention:
    """The attention backend of one model. Without a call of `use` it stays as the user set it.

    notes: what the summary says about it. divided: whether several processes share the work of each call.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.notes: list[str] = []
        settable = hasattr(model, "set_attention_backend")
        self._modules = [module for module in model.modules() if hasattr(module, "processor")] if settable else []
        self._before: list[tuple[Any, Any]] = []
        self._set_to: str | None = None
        self._to_time = False
        self.divided = False

    def _processors(self) -> list[Any]:
        """Those that ask which backend to use. A class that begins with a backend of its own runs on no other."""
        found = (module.processor for module in self._modules)
        return [processor for processor in found if getattr(type(processor), "_attention_backend", _MISSING) is None]

    def _as_set(self) -> list[tuple[Any, Any]]:
        """Each processor, and what is set on it, if anything is."""
        return [(processor, vars(processor).get("_attention_backend", _MISSING)) for processor in self._processors()]

    @property
    def backends(self) -> tuple[str, ...]:
        """What the processors run on now, as set on them or by `diffusers.attention_backend`: one name, or one each if
        they differ."""
        processors = self._processors()
        if not processors:
            return ()
        active = _dispatch()._AttentionBackendRegistry._active_backend
        names = tuple(map(_name, (processor._attention_backend or active for processor in processors)))
        return names[:1] if len(set(names)) == 1 else names

    def use(self, name: str) -> None:
        """Set a backend, or plan to time them at the first call ("auto").

        Raises:
            CompileError: the model has only one, or the backend is unknown or not installed. Nothing is changed then.
        """
        name = _name(name)
        if not self._processors():
            only = (
                f"{type(self.model).__name__} has one attention backend only: its processors "
                "do not ask diffusers for another"
            )
            if name != "auto":
                raise CompileError(f"attention_backend={name!r}: {only}; leave the option out")
            self.notes.append(f"attention: nothing to choose, {only}")
        elif name == "auto":
            self._to_time = True
        elif (reason := why_missing(name)) is not None:
            raise CompileError(
                f"attention_backend={name!r}: {reason}; available here: {', '.join(available())}, and 'auto'"
            )
        else:
            self._set(name)

    def restore(self) -> None:
        """Put back what was there before `use`, except where something else has been set since."""
        for processor, value in self._before:
            if processor._attention_backend == self._set_to:
                _put(processor, value)
        self._before, self._set_to, self._to_time = [], None, False

    def _set(self, name: str) -> None:
        registry = _dispatch()._AttentionBackendRegistry
        active = registry._active_backend
        self._before, self._set_to = self._as_set(), name
        try:
            self.model.set_attention_backend(name)  # type: ignore[operator]
        except Exception as error:  # a download, a clash with context parallelism
            self.restore()
            raise CompileError(
                f"attention_backend={name!r}: {_reason(error)}; available here: {', '.join(available())}"
            ) from error
        finally:
            # diffusers also makes it the default of every other model, and `reset_attention_backend` leaves that so.
            registry.set_active_backend(active)

    @contextmanager
    def natively(self) -> Iterator[None]:
        """The model runs on `native` inside this block."""
        native = _dispatch().AttentionBackendName.NATIVE if self._modules else None
        before = self._as_set()
        try:
            for processor, _ in before:
                processor._attention_backend = native
            yield
        finally:
            for processor, value in before:
                _put(processor, value)

    def refusal(self, error: BaseException) -> CompileError | None:
        """The error to raise for one that a backend other than `native` made, which may be anything that kernels and
        compilers raise."""
        other = [name for name in dict.fromkeys(self.backends) if name != "native"]
        if not other or not isinstance(error, Exception) or not _from_attention(error):
            return None
        return CompileError(
            f"{type(self.model).__name__} does not run on the attention backend {' and '.join(map(repr, other))}: "
            f"{_reason(error)}; choose another, such as 'native', by attention_backend= or model.set_attention_backend"
        )

    def settle(
        self, forward: Callable[..., Any], arguments: Mapping[str, Any], compiler: str | Callable[..., Any] | None
    ) -> None:
        """Time the backends if that was asked for and has not been done, and set the fastest.

        One uncached call of `forward` notes which attention calls the model makes. Those are timed, not the model,
        whose other work is the same whatever the backend and takes seconds. compiler: torch.compile's backend, where
        the model will run compiled: each backend then is timed as a full graph, since `flex` without one is another
            algorithm, and not every kernel can be traced.
        """
        if not self._to_time:
            return
        with torch.no_grad():
            calls: dict[Any, _Call] = {}
            with self.natively(), _noted(calls):
                forward(**arguments)
            try:
                self.notes.append(self._time(list(calls.values()), compiler))
            except (
                Exception
            ) as error:  # `native`, against which the others are held, fails alone: out of memory, or not traced
                self.notes.append(f"attention: {', '.join(self.backends)} (auto: not timed, {_reason(error)})")
        self._to_time = False

    def _time(self, calls: list[_Call], compiler: str | Callable[..., Any] | None) -> str:
        """Set the fastest, and say what was timed."""
        divided = self.divided or any(call.arguments["parallel_config"] is not None for call in calls)
        if not calls or divided:
            raise RuntimeError(
                "the attention is divided between processes"
                if divided
                else "diffusers dispatched no attention in this call"
            )
        names = [name for name in EXACT if why_missing(name) is None and (name != "flex" or compiler is not None)]
        seconds, left_out = dict.fromkeys(names, 0.0), dict[str, str]()
        for number, call in enumerate(calls):
            trial = _Trial(call)
            for name in list(seconds):
                try:
                    seconds[name] += call.count * trial.seconds(name, f"attention_{name}_{number}", compiler)
                except (
                    Exception
                ) as error:  # whatever a kernel, its launcher or a compiler says of shapes that it does not take
                    if name == "native":
                        raise
                    del seconds[name]
                    left_out[name] = _reason(error)
        fastest = min(seconds, key=lambda name: seconds[name])
        if seconds[fastest] > (1 - MARGIN) * seconds["native"]:
            fastest = "native"
        self._set(fastest)
        times = ", ".join(
            f"{name} {1e3 * seconds[name]:.3g} ms" for name in sorted(seconds, key=lambda name: seconds[name])
        )
        same: dict[str, list[str]] = {}
        for name, reason in left_out.items():
            same.setdefault(reason, []).append(name)
        out = "".join(f"; not {', '.join(names)}: {reason}" for reason, names in same.items())
        return f"attention: {fastest} (auto: {times} a call of the model{out})"


def _name(backend: Any) -> str:
    return getattr(backend, "value", backend)


def _put(processor: Any, value: Any) -> None:
    if value is _MISSING:
        vars(processor).pop("_attention_backend", None)
    else:
        processor._attention_backend = value


@contextmanager
def _noted(calls: dict[Any, _Call]) -> Iterator[None]:
    """Gather the kinds of calls that this thread makes of the `native` backend."""
    registry, native = _dispatch()._AttentionBackendRegistry, _dispatch().AttentionBackendName.NATIVE
    original, thread = registry._backends[native], threading.get_ident()

    def note(**arguments: Any) -> Any:
        if threading.get_ident() == thread:
            device = arguments["query"].device
            kept = {name: value for name, value in arguments.items() if name not in ("_parallel_config", "return_lse")}
            kept |= {name: torch.empty_like(arguments[name], device="meta") for name in ("query", "key", "value")}
            kept["parallel_config"] = arguments.get("_parallel_config")
            kind = tuple(
                (value.shape, value.dtype) if isinstance(value, torch.Tensor) else repr(value)
                for value in kept.values()
            )
            calls.setdefault(kind, _Call(kept, device)).count += 1
        return original(**arguments)

    registry._backends[native] = note
    try:
        yield
    finally:
        registry._backends[native] = original


def _attend(attend: Callable[..., torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
    return attend(**arguments)


def _runner(
    name: str, label: str, compiler: str | Callable[..., Any] | None
) -> Callable[[dict[str, Any]], torch.Tensor]:
    """Calls a backend as a model does, compiled alone; a graph of its own, as in `fastercache.runtime.graphs`."""
    attend = partial(_dispatch().dispatch_attention_fn, backend=_dispatch().AttentionBackendName(name))
    if compiler is None:
        return partial(_attend, attend)
    function = types.FunctionType(_attend.__code__.replace(co_name=label), _attend.__globals__, label)
    return partial(torch.compile(function, fullgraph=True, dynamic=False, backend=compiler), attend)


class _Trial:
    """A kind of call on random values, with its exact result at some rows of queries spread over all (the whole of it
    would not fit)."""

    def __init__(self, call: _Call):
        self.call, self.arguments = call, call.with_values()
        query, mask = self.arguments["query"], self.arguments.get("attn_mask")
        wide = torch.float64 if query.dtype in (torch.float32, torch.float64) else torch.float32
        count = query.shape[1]
        # Of a causal call the first rows are a causal call, too.
        last = min(CHECKED_ROWS, count) - 1 if self.arguments.get("is_causal") else count - 1
        self.rows = torch.linspace(0, last, min(CHECKED_ROWS, count), device=query.device).round().long()
        if isinstance(mask, torch.Tensor):
            mask = mask[..., self.rows, :] if mask.ndim > 2 and mask.shape[-2] == count > 1 else mask
            mask = mask.to(wide) if mask.is_floating_point() else mask
        exact = self.arguments | {"query": query[:, self.rows].to(wide), "attn_mask": mask}
        exact |= {name: self.arguments[name].to(wide) for name in ("key", "value")}
        self.exact = _runner("native", "", None)(exact)
        self.limit = 3 * torch.finfo(query.dtype).eps * float(self.exact[self.exact.isfinite()].abs().max())

    def seconds(self, name: str, label: str, compiler: str | Callable[..., Any] | None) -> float:
        """The time of one call by a backend. `RuntimeError` if it is further from the exact result than three times
        `native`, the first."""
        if name == "_native_math" and self.call.scores_bytes > MOST_SCORES:
            raise RuntimeError(f"would hold {self.call.scores_bytes / 1e9:.1f} GB of scores")
        if (
            name == "flex" and self.arguments.get("attn_mask") is not None
        ):  # compiles alone, but not inside LTX-Video (torch 2.13)
            raise RuntimeError("compiles with a tensor for a mask in some models only")
        run = partial(_runner(name, label, compiler), self.arguments)
        # A row with every key masked has no exact value.
        off = float((run()[:, self.rows].to(self.exact.dtype) - self.exact)[self.exact.isfinite()].abs().max())
        if name == "native":
            self.limit = max(self.limit, 3 * off)
        if not off <= self.limit:
            raise RuntimeError(
                f"differs from the exact result by {off:.2g}, where {self.limit:.2g} is the dtype's own error"
            )
        return _seconds(run, self.call.device)


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    """The shortest of at least three runs, and of as many as fit in 20 ms."""
    shortest, spent, runs = float("inf"), 0.0, 0
    while runs < 3 or spent < 0.02:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        shortest, spent, runs = min(shortest, elapsed), spent + elapsed, runs + 1
    return shortest


def _from_attention(error: BaseException) -> bool:
    """Whether it came through diffusers' dispatch: in its traceback or, where torch traced the model, in the one that
    torch quotes."""
    traceback, file = error.__traceback__, _dispatch().__file__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == file:
            return True
        traceback = traceback.tb_next
    return file in str(error)


def _reason(error: BaseException) -> str:
    """The line of a message that says what is wrong; of those of torch's tracer, what the traced code raised."""
    text = str(error).strip()
    quoted = re.search(r"""(?:raised exception|got) \w+\((?:\[ConstantVariable\(str: )?(['"])(.*?)\1\)""", text)
    lines = (quoted[2] if quoted else text).splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0].rstrip(".")
