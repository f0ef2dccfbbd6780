"""A model with gates at its sites: what a plan's phases do to it, call by call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import nn

from fastercache.cache.cache import Cache
from fastercache.errors import CompileError
from fastercache.models.family import Family
from fastercache.models.patching import ForwardPatch, Route
from fastercache.models.site import Site
from fastercache.runtime.gates import (
    BlockGate,
    CadenceState,
    FeedingGate,
    GateMode,
    Interval,
    ModuleGate,
    Part,
    mode_of,
)
from fastercache.runtime.graphs import GraphOptions, Graphs, PhaseGraphs, input_signature
from fastercache.schedule.branches import Branch, BranchLayout
from fastercache.schedule.plan import Plan
from fastercache.schedule.sites import RESIDUAL_KINDS

Modes = tuple[tuple[GateMode, tuple[Part, ...]], ...]
"""Of each cadence: what its gates do."""
MOST_KNOWN = 16
"""Plans of which is kept what they mean for the gates."""


class _Acting:
    """What the sites of a model do in the runs of one plan: worked out when first asked for, as it takes longer than a
    step's own work."""

    def __init__(self, plan: Plan, layout: BranchLayout, sites: Sequence[Site], blocks: Sequence[str]):
        self.plan, self.layout, self._sites = plan, layout, sites
        self.used = [index for index, number in enumerate(plan.cadence_of) if plan.cadences[number].slots]
        """The sites that ever blend."""
        self.gates_blocks = any(sites[index].kind in RESIDUAL_KINDS for index in self.used)
        self.kinds = self._kinds_of_blocks(blocks)
        self.modes: dict[tuple[int, tuple[Branch, ...]], Modes] = {}
        """By phase and the branches that a call runs."""
        self._runs_blocks: dict[int, bool] = {}

    def modes_of(self, phase: int, branches: tuple[Branch, ...]) -> Modes:
        self.modes[phase, branches] = modes = tuple(
            mode_of(cadence, mode, branches, self.layout)
            for cadence, mode in zip(self.plan.cadences, self.plan.phases[phase].modes, strict=True)
        )
        return modes

    def runs_blocks(self, phase: int) -> bool:
        """Whether any block computes in a phase, where blocks are sites: otherwise it has no graph of a block."""
        if phase not in self._runs_blocks:
            modes, numbers = self.plan.phases[phase].modes, self.plan.cadence_of
            blocks = [
                modes[number].action for site, number in zip(self._sites, numbers, strict=True) if site.kind == "block"
            ]
            self._runs_blocks[phase] = "compute" in blocks or not blocks
        return self._runs_blocks[phase]

    def _kinds_of_blocks(self, blocks: Sequence[str]) -> list[Hashable]:
        """What tells the blocks apart that need graphs of their own: the cadences of the sites inside."""
        kinds: dict[str, list[Hashable]] = {path: [] for path in blocks}
        for index, site in enumerate(self._sites):
            if site.kind not in RESIDUAL_KINDS:
                path = next(path for path in blocks if site.path.startswith(f"{path}."))
                kinds[path].append((site.kind, self.plan.cadence_of[index]))
        return [tuple(kind) for kind in kinds.values()]


class GatedModel:
    """One model, its sites, and the gates in front of those that a plan names. `detach` leaves the model as it was.

    graphs: its compiled phases, `None` where it runs eagerly.
    """

    def __init__(self, model: nn.Module, family: Family, options: GraphOptions | None):
        self.model, self.family = model, family
        self.sites: list[Site] = family.sites(model)
        self.tree = tuple(site.node for site in self.sites)
        self._blocks = family.block_paths(model)
        blocks = [model.get_submodule(path) for path in self._blocks]
        self._gates: dict[int, ModuleGate | Interval] = {}
        self._route: Route | None = None
        self._patches: list[ForwardPatch] = []
        self._open: list[ModuleGate | Interval] = []
        self._states: list[CadenceState] = []
        self._known: list[_Acting] = []
        self._now: Modes | None = None
        self.graphs = PhaseGraphs(model, options, blocks) if options is not None else None
        self._graphs: dict[tuple[int, tuple[Branch, ...]], Graphs] = {}

    def check(self, modules: Sequence[nn.Module]) -> str | None:
        """Before a run: `CompileError` if the model is not the one that was compiled any more, a note if it is one that
        costs new graphs."""
        if self._route is not None:
            self._route.check()
        present = set(map(id, modules))
        for site in self.sites:
            if site.module is not None and id(site.module) not in present:
                raise CompileError(
                    f"{site.path} of {type(self.model).__name__} was replaced after fastercache.compile, perhaps by "
                    "an adapter around it, and what is cached would miss that; call fastercache.restore and compile "
                    "again"
                )
        return self.graphs.begin_run(modules) if self.graphs is not None else None

    # ---- gates -------------------------------------------------------------------------------------------------------

    def open(self, plan: Plan, cache: Cache, layout: BranchLayout) -> None:
        """Let the sites act by a plan from now on, on these caches, in the calls of this thread."""
        self._acting, self._format = self._acting_by(plan, layout), cache.plan.format
        vectors, thread = cache.vectors, threading.get_ident()
        self._states = [
            CadenceState(tuple([vectors[i] for i in cadence.coefficients]), thread=thread) for cadence in plan.cadences
        ]
        self._now = None
        self._graphs.clear()
        if self._acting.gates_blocks:
            self._gate_blocks()
        for index in self._acting.used:
            gate = self._gate(index)
            gate.open(self._states[plan.cadence_of[index]], cache.rings(index))
            self._open.append(gate)
        if self.graphs is not None:
            self.graphs.set_kinds(self._acting.kinds)

    def _acting_by(self, plan: Plan, layout: BranchLayout) -> _Acting:
        for known in self._known:
            if known.plan is plan and known.layout is layout:
                return known
        if len(self._known) >= MOST_KNOWN:
            del self._known[0]
        self._known.append(_Acting(plan, layout, self.sites, self._blocks))
        return self._known[-1]

    def close(self) -> None:
        """Let the sites compute, and hold no cache."""
        for gate in self._open:
            gate.open(None, ())
        self._open.clear()
        self._states.clear()
        self._now = None
        self._graphs.clear()

    def detach(self) -> None:
        """Take every patch out, and drop the graphs."""
        self.close()
        for patch in reversed(self._patches):
            patch.remove()
        self._patches.clear()
        self._gates.clear()
        if self._route is not None:
            self._route.remove()
            self._route = None
        if self.graphs is not None:
            self.graphs.detach()

    def _gate(self, index: int) -> ModuleGate | Interval:
        """The gate of a site; put in front of its module when a plan first names it, as every gate costs each call some
        time."""
        if index not in self._gates:
            module = self.sites[index].module
            assert module is not None
            self._gates[index] = gate = ModuleGate()
            self._patches.append(ForwardPatch(module, gate, traced=True))
            if self.graphs is None:  # a graph leaves out by itself what nothing reads
                feeding = self.family.idling(self.model, self.sites[index])
                self._patches += [ForwardPatch(one, FeedingGate(gate)) for one in feeding]
        return self._gates[index]

    def _gate_blocks(self) -> None:
        blocks = [index for index, site in enumerate(self.sites) if site.kind == "block"]
        if blocks[0] in self._gates:
            return
        stack = next(index for index, site in enumerate(self.sites) if site.kind == "stack")
        self._gates[stack] = whole = Interval(self.family.at_exit)
        # Under the gates; over the blocks' graphs, as no graph for all can hold a function that finds each by number.
        self._route = self.family.route(self.model)
        for index in blocks:
            block = self.sites[index].block
            assert block is not None
            self._gates[index] = own = Interval(self.family.at_exit)
            gate = BlockGate(block, own, whole, index == blocks[0], index == blocks[-1])
            # Around the block's own graph where graphs are regional; inside the model's where it is compiled whole.
            regional = self.graphs is not None and self.graphs.options.regional
            self._patches.append(ForwardPatch(block.module, gate, traced=not regional))

    # ---- calls -------------------------------------------------------------------------------------------------------

    def forward(
        self,
        original: Callable[..., Any],
        arguments: dict[str, Any],
        phase: int,
        branches: tuple[Branch, ...],
        context: Hashable,
    ) -> Any:
        """Call the model, with its sites in a phase of the plan. branches: whose rows the arguments hold. context: of
        the host's, that graphs depend on."""
        key = phase, branches
        modes = self._acting.modes.get(key) or self._acting.modes_of(phase, branches)
        if modes is not self._now:
            self._now = modes
            for state, (mode, parts) in zip(self._states, modes, strict=True):
                state.mode, state.parts = mode, parts
        if self.graphs is None:
            return original(**arguments)
        graphs = self._graphs.get(key)
        if graphs is None:
            inputs = (context, *input_signature(arguments))
            graphs = self._graphs[key] = self.graphs.of(inputs, self._identity(phase, branches))
        return self.graphs.call(original, graphs, arguments, self._acting.runs_blocks(phase))

    def _identity(self, phase: int, branches: tuple[Branch, ...]) -> Hashable:
        """Everything in plan and caches that a graph of this phase depends on: the same for every plan for which it is
        the same graph."""
        plan = self._acting.plan
        kept = tuple((cadence.slots, cadence.branches, len(cadence.coefficients)) for cadence in plan.cadences)
        return self._acting.layout.order, self._format, plan.cadence_of, kept, plan.phases[phase].modes, branches
