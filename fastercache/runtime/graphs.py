"""One compiled graph for each phase of a schedule: torch.compile with nothing decided inside.

Dynamo keeps the graphs of a function with the function's code object, and takes a change of phase for a recompilation
of it. So each graph gets a code object of its own: a copy of `_forward`, whose phase never changes. What does change
from step to step, the coefficients, is read from tensors.
"""

from __future__ import annotations

import logging
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastercache.errors import CompileError
from fastercache.models.hooks import ModelState, first_change, refuse_offloading_inside, state_of
from fastercache.models.patching import ForwardPatch

logger = logging.getLogger("fastercache")

MOST_INPUTS = 4
"""Kinds of inputs whose graphs are kept; beyond that those of the oldest are dropped."""

Graphs = dict[Hashable, Callable[..., Any]]
"""The compiled forwards of one phase for one kind of inputs, by kind of block; the whole model's under `None`."""


@dataclass(frozen=True)
class GraphOptions:
    """`backend`, `mode`: as torch.compile has them. `regional`: compile the repeated block, once for all layers, not
    the whole model."""

    backend: str | Callable[..., Any]
    mode: str | None = None
    regional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.backend, str) and not callable(self.backend):
            raise CompileError(
                f"backend is {self.backend!r}; pass a name of torch.compile's, such as 'inductor', a callable, or None "
                "for no graphs"
            )
        if not isinstance(self.mode, str | None) or not isinstance(self.regional, bool):
            raise CompileError(
                f"mode is {self.mode!r} and regional {self.regional!r}; pass mode=None or a name, and regional=True or "
                "False"
            )
        if isinstance(self.backend, str) and self.backend not in torch._dynamo.list_backends(exclude_tags=()):
            raise CompileError(
                f"backend is {self.backend!r}; torch.compile has {', '.join(torch._dynamo.list_backends())}"
            )
        if self.mode is not None and self.mode not in torch._inductor.list_mode_options():
            raise CompileError(
                f"mode is {self.mode!r}; torch.compile has {', '.join(torch._inductor.list_mode_options())}"
            )
        if self.regional and self.cuda_graphs:
            raise CompileError(self.no_regions())

    def no_regions(self) -> str:
        """Why `regional` does not go with CUDA graphs."""
        chosen = f"mode={self.mode!r}" if self.mode is not None else f"backend={self.backend!r}"
        return (
            f"regional=True with {chosen}, which uses CUDA graphs here: a CUDA graph replays fixed addresses, and "
            "every layer has weights of its own; pass regional=False, or a mode without CUDA graphs ('default', "
            "'max-autotune-no-cudagraphs'), and leave torch._inductor.config.triton.cudagraphs off"
        )

    @property
    def cuda_graphs(self) -> bool:
        """Whether graphs compiled now would be CUDA graphs on a GPU: by the mode, the backend, or Inductor's own
        configuration."""
        if self.backend == "cudagraphs":
            return True
        own: dict[str, Any] = torch._inductor.list_mode_options(self.mode) if self.mode is not None else {}
        if not isinstance(self.backend, str):
            # One made from Inductor's: torch's own wrapper with `mode` or `options`, or a partial of `compile_fx`.
            for options in (
                getattr(self.backend, "config", None),
                getattr(self.backend, "keywords", {}).get("config_patches"),
            ):
                own = own | (dict(options) if isinstance(options, Mapping) else {})
        elif self.backend != "inductor":
            return bool(own.get(_CUDA_GRAPHS, False))
        return bool(own.get(_CUDA_GRAPHS, torch._inductor.config.triton.cudagraphs))


_CUDA_GRAPHS = "triton.cudagraphs"
"""Inductor's setting."""


def input_signature(arguments: Mapping[str, Any]) -> tuple[Hashable, ...]:
    """What the graphs of a call depend on: shape, dtype and device of tensors, and the value of everything else."""
    return tuple((name, _described(value)) for name, value in arguments.items())


def _described(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, (list, tuple, dict)):
        from torch.utils._pytree import tree_flatten

        leaves, structure = tree_flatten(value)
        return str(structure), tuple(map(_described, leaves))
    return repr(value)


def _in_plain_strides(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, and where a dimension has one element, with the stride it would have in a new tensor: Dynamo guards
    that, too."""
    x = x.contiguous()
    if 1 not in x.shape:
        return x
    strides = [1]
    for size in reversed(x.shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return x.as_strided(x.shape, strides[::-1])


def _forward(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


class PhaseGraphs:
    """The compiled forwards of one model, by its inputs' shapes, by phase and, where they are regional, by kind of
    block.

    blocks: the repeated blocks, patched where the graphs are regional.
    """

    def __init__(self, model: nn.Module, options: GraphOptions, blocks: Iterable[nn.Module]):
        self.model, self.options = model, options
        self.cuda_graphs = options.cuda_graphs
        """Whether any graph kept may be a CUDA graph: Inductor's configuration counts as it is when a run begins."""
        self._compiled = list(blocks) if options.regional else [model]
        refuse_offloading_inside(model, model.modules(), self._compiled, options.regional)
        self._state: ModelState | None = None
        self._weights: Hashable = None
        self._recompiled = 0
        self._graphs: OrderedDict[tuple[Hashable, ...], dict[Hashable, Graphs]] = OrderedDict()
        self._current: Graphs | None = None
        self._thread: int | None = None
        self._blocks = [_BlockGraph(self, block) for block in self._compiled] if options.regional else []

    def __len__(self) -> int:
        """Graphs compiled and kept."""
        return len(self._all())

    def describe(self) -> str:
        """For people."""
        backend = self.options.backend if isinstance(self.options.backend, str) else "a backend of your own"
        what = "one a phase and kind of block" if self.options.regional else "one a phase"
        return f"{len(self)} graphs by {backend}{f', mode {self.options.mode}' if self.options.mode else ''}, {what}"

    def set_kinds(self, kinds: Iterable[Hashable]) -> None:
        """Say, for each block, what tells it from blocks that need another graph."""
        for block, kind in zip(self._blocks, kinds, strict=False):
            block.kind = type(block.block), kind

    def begin_run(self, modules: Sequence[nn.Module]) -> str | None:
        """Look at the model's modules again: graphs belong to the kinds of weights and the adapters it had. A note if
        it has changed.

        Raises:
            CompileError: weights are offloaded inside what is compiled, since it was; or Inductor has been set to use
                CUDA graphs, which regional graphs cannot be.
        """
        refuse_offloading_inside(self.model, modules, self._compiled, self.options.regional)
        self.cuda_graphs = self.cuda_graphs or self.options.cuda_graphs
        if self.cuda_graphs and self.options.regional:
            raise CompileError(self.options.no_regions())
        before, self._state = self._state, state_of(modules)
        self._weights, self._recompiled = hash(self._state), self._recompilations()
        if before is None or before == self._state or any(inputs[0] == self._weights for inputs in self._graphs):
            return None
        where = first_change(before, self.model)
        note = f"the model has changed since its graphs were compiled (first at {where!r}): it gets graphs of its own"
        logger.warning(note)
        return note

    def end_run(self) -> str | None:
        """A note if Dynamo compiled graphs again since the run began, for something that no key of theirs tells."""
        count = self._recompilations() - self._recompiled
        if count <= 0:
            return None
        return (
            f"{count} graphs were compiled again during the run: something in the model changed "
            "(TORCH_LOGS=recompiles says what)"
        )

    def _recompilations(self) -> int:
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        codes = [graph._torchdynamo_orig_callable.__code__ for graph in self._all()]
        return sum(max(len(_debug_get_cache_entry_list(code)) - 1, 0) for code in codes)

    def _all(self) -> list[Any]:
        return [graph for phases in self._graphs.values() for graphs in phases.values() for graph in graphs.values()]

    def of(self, inputs: tuple[Hashable, ...], phase: Hashable) -> Graphs:
        """The graphs of a phase, for inputs of a kind: asked for once a run, as looking them up takes longer than a
        step's own work."""
        inputs = (self._weights, *inputs)
        if inputs not in self._graphs:
            while len(self._graphs) >= MOST_INPUTS:
                dropped, phases = self._graphs.popitem(last=False)
                count = sum(map(len, phases.values()))
                logger.warning(
                    "dropped %d graphs, compiled for inputs %s: %d other kinds are in use",
                    count,
                    dropped[1:],
                    MOST_INPUTS,
                )
            self._graphs[inputs] = {}
        return self._graphs[inputs].setdefault(phase, {})

    def call(
        self, forward: Callable[..., Any], graphs: Graphs, arguments: dict[str, Any], blocks_run: bool = True
    ) -> Any:
        """Run the model's `forward` by the graphs of a phase; compiles what is not compiled yet. blocks_run: whether
        any block computes.

        Raises:
            CompileError: the model cannot be traced as one graph; names what torch stumbled on.
        """
        self._current, self._thread = graphs, threading.get_ident()
        try:
            if self.options.regional:
                output = forward(**arguments)
                if not graphs and blocks_run:
                    raise CompileError(
                        f"regional=True compiles nothing here: {type(self.model).__name__} runs the parts of its "
                        f"{type(self._compiled[0]).__name__} blocks without the blocks' own forward; pass "
                        "regional=False"
                    )
                return output
            if not self.cuda_graphs:
                return self.graph(None)(forward, (), arguments)
            from torch.utils._pytree import tree_map_only

            # The next replay overwrites this one's outputs, which a sampler may keep for its next step.
            torch.compiler.cudagraph_mark_step_begin()
            return tree_map_only(torch.Tensor, torch.Tensor.clone, self.graph(None)(forward, (), arguments))
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise CompileError(
                f"a graph of {type(self.model).__name__} was compiled {torch._dynamo.config.recompile_limit} times, "
                "as often as torch allows: something in the model changes from step to step; backend=None runs it "
                "without graphs. What "
                f"torch says:\n{error}"
            ) from error
        except torch._dynamo.exc.RecompileError:  # of torch._dynamo.config.error_on_recompile
            raise
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()
            smaller = "" if self.options.regional else "regional=True compiles its repeated blocks alone, and "
            raise CompileError(
                f"{type(self.model).__name__} does not compile as one graph: {reason[0] if reason else error!r}; "
                f"{smaller}backend=None "
                f"runs it without graphs. What torch says:\n{error}"
            ) from error
        finally:
            self._current = None

    def graph(self, kind: Hashable) -> Callable[..., Any]:
        """The compiled forward of a kind of block, or of the whole model (`None`), in the current phase."""
        graphs = self._current
        assert graphs is not None
        if kind not in graphs:
            code = _forward.__code__.replace(co_name=f"graph_{len(self)}")
            function = types.FunctionType(code, _forward.__globals__, code.co_name)
            logger.info("compiling graph %d", len(self) + 1)
            graphs[kind] = torch.compile(
                function, fullgraph=True, dynamic=False, backend=self.options.backend, mode=self.options.mode
            )
        return graphs[kind]

    def detach(self) -> None:
        """Take the patches out of the blocks and drop all graphs."""
        for block in self._blocks:
            block.patch.remove()
        self._graphs.clear()

    @property
    def in_step(self) -> bool:
        """Whether this thread is in a call of the model that runs by graphs."""
        return self._current is not None and self._thread == threading.get_ident()


class _BlockGraph:
    """Stands around one repeated block: runs the graph of its kind."""

    def __init__(self, graphs: PhaseGraphs, block: nn.Module):
        self.graphs, self.block = graphs, block
        self.kind: Hashable = None
        self.patch = ForwardPatch(block, self)

    def __call__(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.graphs.in_step:
            return original(*args, **kwargs)
        from torch.utils._pytree import tree_map_only

        # The first layer often gets a transposed view where the others get what a layer gives: one copy a step saves a
        # graph a phase.
        args, kwargs = tree_map_only(torch.Tensor, _in_plain_strides, (args, kwargs))
        return self.graphs.graph(self.kind)(original, args, kwargs)
