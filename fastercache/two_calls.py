"""Guidance in two calls: a step of the sampler calls the denoiser once for each branch, so the unconditional call can be saved whole.

Nothing in a call says which branch it is: the order of the two is declared, and that they belong together is checked by their latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from fastercache.errors import RunError
from fastercache.families import BranchOrder, Family, Site
from fastercache.memory import branch_rows
from fastercache.plan import Branch, PlannedStep, group_of

if TYPE_CHECKING:
    from fastercache.engine import Run

BATCH_ORDER: dict[BranchOrder, BranchOrder] = {"cond-then-uncond": "cond-first", "uncond-then-cond": "uncond-first"}
"""The order of two calls -> the order of the two halves in the caches."""


class BothCalls:
    """The shapes of two calls together, each half of them one call's: what the caches are planned from."""

    def __init__(self, family: Family):
        self.family = family

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        return tuple(map(_twice, self.family.site_shapes(model, site, arguments)))

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        return _twice(self.family.prediction_shape(model, arguments))


def _twice(shape: torch.Size) -> torch.Size:
    return torch.Size((2 * shape[0], *shape[1:]))


class TwoCalls:
    """Makes the steps of a run out of pairs of calls. A step is done when its second call is.

    On a step that runs the conditional branch alone the unconditional output is rebuilt. Where the unconditional call comes first, the
    conditional output it needs is computed then, from its own arguments but for those in which the last conditional call differed from the
    unconditional one (the text), and handed out at the conditional call if that has these inputs; otherwise it is computed again.
    """

    def __init__(self, run: Run, order: BranchOrder):
        self.run, self.family = run, run.engine.family
        self.first: Branch = "cond" if order == "cond-then-uncond" else "uncond"
        self.batch_order = BATCH_ORDER[order]
        self._pending: tuple[dict[str, Any], Any] | None = None
        self._early: tuple[dict[str, Any], Any] | None = None
        self._text: dict[str, Any] = {}
        self._last: dict[str, tuple[Any, int | None]] = {}

    @property
    def between(self) -> bool:
        """Whether the second call of a step is still to come."""
        return self._pending is not None

    @property
    def branch(self) -> Branch:
        """Which branch the next call is."""
        return "cond" if (self.first == "cond") != self.between else "uncond"

    def call(self, original: Callable[..., Any], arguments: dict[str, Any], step: PlannedStep) -> Any:
        """One of the two calls of a step: what the untouched model would give, or its stand-in."""
        if self._pending is None:
            output = self._first_call(original, arguments, step)
            self._pending = arguments, output
            return output
        self._check_pair(self._pending[0], arguments)
        if self.run.position == 0:
            self._check_lengths(self._pending[0], arguments)
        output = self._second_call(original, arguments, step, *self._pending)
        self._pending = self._early = None
        return output

    def _first_call(self, original: Callable[..., Any], arguments: dict[str, Any], step: PlannedStep) -> Any:
        if self.first == "cond":
            return self.run.forward(original, arguments, step, "cond")
        if not step.rebuild:
            return self.run.forward(original, arguments, step, "uncond")
        conditional = arguments | self._text
        self._early = conditional, self.run.forward(original, conditional, step, "cond")
        return self._rebuilt(arguments, self._early[1])

    def _second_call(
        self, original: Callable[..., Any], arguments: dict[str, Any], step: PlannedStep, given: dict[str, Any], first: Any
    ) -> Any:
        if self.first == "cond":
            output = self._rebuilt(arguments, first) if step.rebuild else self.run.forward(original, arguments, step, "uncond")
            cond, uncond = first, output
        else:
            if step.split or step.rebuild:  # the next step may have to make the conditional call ahead
                self._text = self._text_of(arguments, given)
            self._last = {name: (value, version(value)) for name, value in arguments.items()}
            if self._early is not None and same_call(self._early[0], arguments):
                output = self._early[1]
            else:
                output = self.run.forward(original, arguments, step, "cond")
            cond, uncond = output, first
        if step.split:
            planes = [self.family.planes(self.family.prediction(one), arguments) for one in (uncond, cond)]
            self.run.split(*planes)
        return output

    def _text_of(self, arguments: Mapping[str, Any], unconditional: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that are the conditional branch's own.

        One that is the very tensor of the last step, unchanged, and not the unconditional call's is its own without a look at what it
        holds, for which the host would wait.
        """
        latents, found = self.family.latents(arguments), {}
        for name, value in arguments.items():
            last, changes = self._last.get(name, (None, None))
            other = unconditional.get(name)
            kept = isinstance(value, torch.Tensor) and value is last and changes is not None and changes == version(value)
            if value is not latents and not (in_place(other, value) if kept else same(other, value)):
                found[name] = value
        return found

    def _rebuilt(self, arguments: dict[str, Any], conditional: Any) -> Any:
        both = self.run.reconstruct(self.family.planes(self.family.prediction(conditional), arguments))
        uncond = both[branch_rows(len(both), self.batch_order, ("uncond",))]
        return self.family.with_prediction(conditional, self.family.unplaned(uncond, arguments))

    def _check_lengths(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
        """The caches are planned by the first call's shapes: `RunError` if they keep outputs of the second that have others."""
        names = [
            name
            for name, value in second.items()
            if isinstance(value, torch.Tensor) and isinstance(first.get(name), torch.Tensor) and value.shape != first[name].shape
        ]
        plan, engine = self.run.plan, self.run.engine
        if not names or plan is None:
            return
        for site in engine.sites:
            group = group_of(plan.groups, site.kind, site.layer)
            if group is None or self.branch not in plan.groups[group].branches:
                continue
            now, planned = (self.family.site_shapes(engine.model, site, call) for call in (second, first))
            if now != planned:
                shapes = " and ".join(str(list(call[names[0]].shape)) for call in (first, second))
                raise RunError(
                    f"argument {names[0]!r} has shapes {shapes} in the two calls of a step, so {site.path} gives outputs of two shapes, "
                    "and both are to be cached; pad both texts to one length, or use the policy 'cfg-only', which caches none"
                )

    def _check_pair(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
        checked: list[tuple[str, Any, Any]] = [("latents", self.family.latents(first), self.family.latents(second))]
        checked.append(("timestep", first.get(self.family.time), second.get(self.family.time)))
        for name, before, now in checked:
            if not same(before, now):
                order = " and ".join(("a conditional", "an unconditional")[:: 1 if self.first == "cond" else -1])
                raise RunError(
                    f"the two calls of step {self.run.position + 1} have different {name}, but here a step is {order} call on the same "
                    "latents: guidance was switched off in the middle, or a call left out; begin a new run (without guidance: cfg='none')"
                )


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal. Tensors of the same memory are known to be; others are compared, which waits for the device."""
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
    if not isinstance(one, torch.Tensor) or one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def version(value: Any) -> int | None:
    """How often a tensor was written to, where torch counts it."""
    return value._version if isinstance(value, torch.Tensor) and not value.is_inference() else None


def same_call(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two calls have equal arguments."""
    return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
