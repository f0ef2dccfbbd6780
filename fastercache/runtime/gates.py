"""What stands at a site: a gate, which lets the part of the model compute and stores what it gives, or gives a blend in
its place.

A gate reads its cadence's mode, its coefficients and its rings, and nothing else: so torch.compile can trace it, with
the mode as a constant of the graph and the tensors as its inputs. They are reached from the patched module, and so
Dynamo takes their addresses to be static, as a buffer's are: a CUDA graph reads and writes them in place
(`tests/test_cuda_graphs.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from fastercache.cache.ring import Ring, half
from fastercache.models.family import Block
from fastercache.schedule.branches import Branch, BranchLayout
from fastercache.schedule.plan import Cadence, SiteMode

GateMode = Literal["compute", "push", "blend"]


class Part(NamedTuple):
    """One blend or push: with which of its cadence's vectors of coefficients, and about which half of the ring's rows
    and of the output's."""

    vector: int
    ring_half: int | None
    output_half: int | None


@dataclass(eq=False)
class CadenceState:
    """What the sites of one cadence do now.

    coefficients: one tensor, or one for each branch, rewritten in place before every step. thread: the one whose call
    this is about; the sites compute for any other, which calls the model uncached. A graph is run by it alone.
    """

    coefficients: tuple[torch.Tensor, ...]
    mode: GateMode = "compute"
    parts: tuple[Part, ...] = ()
    thread: int | None = None

    @property
    def acts(self) -> bool:
        """Whether the sites do anything but compute in this call."""
        return self.mode != "compute" and (torch.compiler.is_dynamo_compiling() or self.thread == threading.get_ident())


def mode_of(
    cadence: Cadence, mode: SiteMode, branches: tuple[Branch, ...], layout: BranchLayout
) -> tuple[GateMode, tuple[Part, ...]]:
    """What the plan's mode means for the gates of a cadence, in a call that runs `branches`."""

    def part(used: tuple[Branch, ...]) -> Part:
        vector = len(cadence.coefficients) - 1 if used == ("uncond",) else 0
        return Part(vector, layout.half(cadence.branches, used), layout.half(branches, used))

    if mode.action == "blend":
        each = [(branch,) for branch in branches] if len(cadence.coefficients) > 1 else [branches]
        return "blend", tuple(map(part, each))
    pushed = tuple(branch for branch in mode.push if branch in branches)
    if mode.action == "compute" and pushed:
        return "push", (part(pushed),)
    return "compute", ()


class ModuleGate:
    """Stands around a module whose output is kept, such as an attention. `state` is `None` where the schedule does not
    name the site."""

    def __init__(self) -> None:
        self.state: CadenceState | None = None
        self.rings: tuple[Ring, ...] = ()

    def open(self, state: CadenceState | None, rings: tuple[Ring, ...]) -> None:
        self.state, self.rings = state, rings

    def __call__(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        state = self.state
        if state is None or not state.acts:
            return original(*args, **kwargs)
        if state.mode == "blend":
            outputs = tuple(_blended(ring, state) for ring in self.rings)
            return outputs if len(outputs) > 1 else outputs[0]
        output = original(*args, **kwargs)
        computed = output if isinstance(output, tuple) else (output,)
        for part in state.parts:
            for ring, tensor in zip(self.rings, computed, strict=True):
                ring.push(half(tensor, part.output_half), state.coefficients[part.vector], part.ring_half)
        return output


class FeedingGate:
    """Stands around a module whose tokens a gated one alone reads, as its norm: while that is blended, one token is
    enough."""

    def __init__(self, reader: ModuleGate):
        self.reader = reader

    def __call__(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        state = self.reader.state
        if state is None or state.mode != "blend" or not state.acts:
            return original(*args, **kwargs)
        return original(*map(_one_token, args), **{name: _one_token(value) for name, value in kwargs.items()})


def _one_token(value: Any) -> Any:
    return value[:, :1] if isinstance(value, torch.Tensor) and value.dim() > 2 else value


def _blended(ring: Ring, state: CadenceState) -> torch.Tensor:
    parts, coefficients = state.parts, state.coefficients
    if len(parts) == 1:
        return ring.blend(coefficients[parts[0].vector], parts[0].ring_half)
    output = ring.new_output()
    for part in parts:
        ring.blend(coefficients[part.vector], part.ring_half, half(output, part.output_half))
    return output


class Interval:
    """A site on the residual stream: what lies between its entry and its exit, and the rings of what that added.

    at_exit: how an entry's tensor looks at the exit, where the model has turned its dimensions in between.
    """

    def __init__(self, at_exit: Callable[[torch.Tensor, torch.Size], torch.Tensor]):
        self.at_exit = at_exit
        self.state: CadenceState | None = None
        self.rings: tuple[Ring, ...] = ()
        self.entries: tuple[torch.Tensor, ...] | None = None

    def open(self, state: CadenceState | None, rings: tuple[Ring, ...]) -> None:
        self.state, self.rings, self.entries = state, rings, None

    @property
    def mode(self) -> GateMode:
        return self.state.mode if self.state is not None and self.state.acts else "compute"

    def enter(self, entries: tuple[torch.Tensor, ...]) -> None:
        self.entries = entries

    def reused(self, streams: tuple[Any, ...]) -> tuple[Any, ...]:
        """The streams at the exit, with what the interval would have added blended from the rings; the others pass."""
        assert self.state is not None and self.entries is not None
        outputs, coefficients = list(streams), self.state.coefficients
        for number, (ring, entry) in enumerate(zip(self.rings, self.entries, strict=False)):
            total = self.at_exit(entry, ring.output_shape).clone(memory_format=torch.contiguous_format)
            for part in self.state.parts:
                ring.blend_add(half(total, part.output_half), coefficients[part.vector], part.ring_half)
            outputs[number] = total
        self.entries = None
        return tuple(outputs)

    def push(self, exits: Sequence[torch.Tensor]) -> None:
        """Store what the interval added to each stream that is kept."""
        assert self.state is not None and self.entries is not None
        for part in self.state.parts:
            coefficients = self.state.coefficients[part.vector]
            for ring, entry, out in zip(self.rings, self.entries, exits, strict=False):
                entry = self.at_exit(entry, out.shape)
                ring.push_residual(
                    half(out, part.output_half), half(entry, part.output_half), coefficients, part.ring_half
                )
        self.entries = None


class BlockGate:
    """Stands around one of the repeated blocks, for the block as a site and for the stack that it is a part of."""

    def __init__(self, block: Block, own: Interval, stack: Interval, first: bool, last: bool):
        self.block, self.own, self.stack, self.first, self.last = block, own, stack, first, last

    def __call__(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        own, stack = self.own, self.stack
        mode, around = own.mode, stack.mode
        if mode == around == "compute":
            return original(*args, **kwargs)
        streams = self.block.streams_in(args, kwargs)
        if around != "compute" and self.first:
            stack.enter(streams[: len(stack.rings)])  # the streams that are read after the stack come first
        if around == "blend":
            return self.block.result(stack.reused(streams) if self.last else streams)
        if mode != "compute":
            own.enter(streams)
        output = self.block.result(own.reused(streams)) if mode == "blend" else original(*args, **kwargs)
        stored = around == "push" and self.last
        if mode == "push" or stored:
            exits = self.block.streams_out(output)
            if mode == "push":
                own.push(exits)
            if stored:
                stack.push(exits)
        return output
