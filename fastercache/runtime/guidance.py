"""How a step of the sampler becomes calls of the model: one strategy for each layout of the two branches of guidance.

A strategy owns what is particular to its layout: how arguments are narrowed to a branch, how the difference of the
branches is taken, where a rebuilt branch or a whole prediction is put. The rest of the runtime does not know which
layout it is in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fastercache.errors import RunError
from fastercache.models.family import Family
from fastercache.runtime.outputs import Outputs
from fastercache.schedule.branches import Branch, BranchLayout
from fastercache.schedule.plan import BOTH, PlannedStep

Forward = Callable[[dict[str, Any], PlannedStep, tuple[Branch, ...]], Any]
"""Calls the model on arguments that hold the rows of those branches, with its sites acting as the step says."""


class Guidance(ABC):
    """Makes the outputs of one run, call by call.

    batch: rows of a call that holds all branches. calls: of the denoiser in one step. between_calls: whether a step has
    begun whose last call is still to come.
    """

    calls = 1
    between_calls = False

    def __init__(self, family: Family, layout: BranchLayout, outputs: Outputs, forward: Forward, batch: int):
        self.family, self.layout, self.outputs, self.forward, self.batch = family, layout, outputs, forward, batch

    def close(self) -> None:
        """After the last call: let go of the caches."""
        self.outputs = None  # type: ignore[assignment]

    @property
    def next_branch(self) -> Branch | None:
        """Which branch the next call is, where a call is one."""
        return None

    @abstractmethod
    def call(self, arguments: dict[str, Any], step: PlannedStep, number: int) -> Any:
        """One call of the denoiser in step `number` (from 1): what the untouched model would give, or its stand-in."""


class OneBranch(Guidance):
    """A run without guidance."""

    def call(self, arguments: dict[str, Any], step: PlannedStep, number: int) -> Any:
        if step.phase is None:
            return self.outputs.stand_in(arguments)
        return self.outputs.finished(self.forward(arguments, step, step.branches), arguments, step)


class OneBatch(Guidance):
    """Both branches in one call, as the two halves of its batch."""

    def __init__(self, family: Family, layout: BranchLayout, outputs: Outputs, forward: Forward, batch: int):
        super().__init__(family, layout, outputs, forward, batch)
        self._cond, self._uncond = (layout.rows(batch, (branch,)) for branch in BOTH)

    def call(self, arguments: dict[str, Any], step: PlannedStep, number: int) -> Any:
        if step.phase is None:
            return self.outputs.stand_in(arguments)
        if step.rebuild:
            output = self._rebuilt(arguments, step)
        else:
            output = self.forward(arguments, step, step.branches)
            if step.split:
                planes = self.family.planes(self.family.prediction(output), arguments)
                self.outputs.split(planes[self._uncond], planes[self._cond])
        return self.outputs.finished(output, arguments, step)

    def _rebuilt(self, arguments: dict[str, Any], step: PlannedStep) -> Any:
        family = self.family
        output = self.forward(family.narrow(arguments, self.batch, self._cond), step, step.branches)
        cond = family.planes(family.prediction(output), arguments)
        return family.with_prediction(output, family.unplaned(self.outputs.rebuilt(cond), arguments))


class TwoCalls(Guidance):
    """A call for each branch, so that the unconditional one can be saved whole. A step is done when its second call is.

    Nothing in a call says which branch it is: the order of the two is declared, and that they belong together is
        checked by their latents.

    On a step that runs the conditional branch alone the unconditional output is rebuilt. Where the unconditional call
    comes first, the conditional output it needs is computed then, from its own arguments but for those in which the
    last conditional call differed from the unconditional one (the text), and handed out at the conditional call if that
    has these inputs; otherwise it is computed again.
    """

    calls = 2

    def __init__(self, family: Family, layout: BranchLayout, outputs: Outputs, forward: Forward, batch: int):
        super().__init__(family, layout, outputs, forward, batch)
        self.first = layout.order[0]
        self._pending: tuple[dict[str, Any], Any] | None = None
        self._early: tuple[dict[str, Any], Any] | None = None
        self._text: dict[str, Any] = {}
        self._last: dict[str, tuple[Any, int | None]] = {}

    @property
    def next_branch(self) -> Branch:
        return self.layout.order[self.between_calls]

    def call(self, arguments: dict[str, Any], step: PlannedStep, number: int) -> Any:
        branch = self.next_branch
        if self._pending is None:
            output = None if step.phase is None else self._first_call(arguments, step)
            self._pending, self.between_calls = (arguments, output), True
        else:
            given, first = self._pending
            self._check_pair(given, arguments, number)
            output = None if step.phase is None else self._second_call(arguments, step, given, first)
            self._pending, self._early, self.between_calls = None, None, False
        rows = self.layout.half(BOTH, (branch,))
        return (
            self.outputs.stand_in(arguments, rows)
            if step.phase is None
            else self.outputs.finished(output, arguments, step, rows)
        )

    def _first_call(self, arguments: dict[str, Any], step: PlannedStep) -> Any:
        if self.first == "cond":
            return self.forward(arguments, step, ("cond",))
        if not step.rebuild:
            return self.forward(arguments, step, ("uncond",))
        conditional = arguments | self._text
        self._early = conditional, self.forward(conditional, step, ("cond",))
        return self._rebuilt(arguments, self._early[1])

    def _second_call(self, arguments: dict[str, Any], step: PlannedStep, given: dict[str, Any], first: Any) -> Any:
        if self.first == "cond":
            output = self._rebuilt(arguments, first) if step.rebuild else self.forward(arguments, step, ("uncond",))
            cond, uncond = first, output
        else:
            if step.split or step.rebuild:  # the next step may have to make the conditional call ahead
                self._text = self._text_of(arguments, given)
            self._last = {name: (value, version(value)) for name, value in arguments.items()}
            if self._early is not None and same_call(self._early[0], arguments):
                output = self._early[1]
            else:
                output = self.forward(arguments, step, ("cond",))
            cond, uncond = output, first
        if step.split:
            planes = [self.family.planes(self.family.prediction(one), arguments) for one in (uncond, cond)]
            self.outputs.split(*planes)
        return output

    def _text_of(self, arguments: Mapping[str, Any], unconditional: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that are the conditional branch's own.

        One that is the very tensor of the last step, unchanged, and not the unconditional call's is its own without a
        look at what it holds, for which the host would wait.
        """
        latents, found = self.family.latents(arguments), {}
        for name, value in arguments.items():
            last, changes = self._last.get(name, (None, None))
            other = unconditional.get(name)
            kept = (
                isinstance(value, torch.Tensor) and value is last and changes is not None and changes == version(value)
            )
            if value is not latents and not (in_place(other, value) if kept else same(other, value)):
                found[name] = value
        return found

    def _rebuilt(self, arguments: dict[str, Any], conditional: Any) -> Any:
        both = self.outputs.rebuilt(self.family.planes(self.family.prediction(conditional), arguments))
        uncond = both[self.layout.rows(len(both), ("uncond",))]
        return self.family.with_prediction(conditional, self.family.unplaned(uncond, arguments))

    def _check_pair(self, first: Mapping[str, Any], second: Mapping[str, Any], number: int) -> None:
        checked: list[tuple[str, Any, Any]] = [("latents", self.family.latents(first), self.family.latents(second))]
        checked.append(("timestep", first.get(self.family.time), second.get(self.family.time)))
        for name, before, now in checked:
            if not same(before, now):
                order = " and ".join(("a conditional", "an unconditional")[:: 1 if self.first == "cond" else -1])
                raise RunError(
                    f"the two calls of step {number} have different {name}, but here a step is {order} call on the "
                    "same latents: guidance was switched off in the middle, or a call left out; begin a new run "
                    "(without guidance: cfg='none')"
                )


def guidance_of(layout: BranchLayout) -> type[Guidance]:
    """The strategy for a layout."""
    return OneBranch if not layout.guided else TwoCalls if layout.two_calls else OneBatch


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal. Tensors of the same memory are known to be; others are compared, which waits for
    the device."""
    from torch.utils._pytree import tree_flatten

    (ones, structure), (others, other_structure) = tree_flatten(one), tree_flatten(other)
    return structure == other_structure and all(map(_same_leaf, ones, others))


def _same_leaf(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is other or (type(one) is type(other) and one == other)
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return in_place(one, other) or torch.equal(one, other)


def in_place(one: Any, other: Any) -> bool:
    """Whether two tensors are the same memory, seen alike."""
    if (
        not isinstance(one, torch.Tensor)
        or one.shape != other.shape
        or one.dtype != other.dtype
        or one.device != other.device
    ):
        return False
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def version(value: Any) -> int | None:
    """How often a tensor was written to, where torch counts it."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def same_call(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two calls have equal arguments."""
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
