"""What a run did, in numbers and in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from fastercache.report.run_flops import RunFlops
from fastercache.schedule.plan import Action, Plan
from fastercache.schedule.sites import RESIDUAL_KINDS


@dataclass(frozen=True)
class SiteSteps:
    """Steps on which the sites of one kind were computed, blended, or not run (idle, or the branch did not run), in one
    branch."""

    branch: str
    kind: str
    computed: int
    blended: int
    skipped: int


@dataclass(frozen=True)
class Kept:
    """Bytes of one process's caches: shards of the sites' results, and what every process has whole, which is the text
    in them, the maps of the difference of the branches, and predictions with their latents."""

    shards: int = 0
    text: int = 0
    maps: int = 0
    predictions: int = 0


@dataclass(frozen=True)
class Share:
    """One process's part of a run that several make together.

    collectives: made by the calls of the model. saved_by_reuse, saved_by_calls_not_made: those that the calls of an
        uncached run would have made besides. added_by_caching: made outside of the model's calls, after the run began.
    """

    processes: int
    rank: int
    collectives: int
    saved_by_reuse: int
    saved_by_calls_not_made: int
    added_by_caching: int
    kept: Kept

    def __str__(self) -> str:
        kept = ", ".join(f"{size / 1e6:.1f} MB {what}" for what, size in vars(self.kept).items() if size)
        return (
            f"processes: {self.processes}, this is number {self.rank}; collectives: {self.collectives} made, "
            f"{self.saved_by_reuse} saved by reuse and {self.saved_by_calls_not_made} by calls not made, "
            f"{self.added_by_caching} added by caching; kept here: {kept or 'nothing'}"
        )


@dataclass
class Summary:
    """The last run of a compiled model. `print` it; `as_dict` gives the same as plain data.

    steps, steps_done: planned and made calls of the denoiser. cache_format: "model", "int8" or "int8-int4"
        (`fastercache.cache.formats`).
    cache_bytes_planned, cache_bytes: before the run and as allocated.
    implementations: of each op that ran, such as `{"ring_blend": "C++"}`. compiled: the graphs of the model, if it is
        compiled.
    share: this process's part, where several make a video together. notes: what fell back and why, and what went wrong.
    """

    model: str
    family: str
    schedule: str
    guidance: str
    steps: int
    steps_done: int = 0
    sites: tuple[SiteSteps, ...] = ()
    cache_format: str = "model"
    cache_bytes_planned: int = 0
    cache_bytes: int = 0
    implementations: dict[str, str] = field(default_factory=dict)
    compiled: str = ""
    share: Share | None = None
    notes: list[str] = field(default_factory=list)
    chart: str = ""
    _count_flops: Callable[[], RunFlops] | None = field(default=None, repr=False)

    @property
    def flops(self) -> RunFlops:
        """Operations of the whole schedule and of the same run uncached, counted when first asked for (a second or
        two)."""
        if self._count_flops is None:
            raise ValueError("no schedule ran: there are no operations to compare")
        result = self._count_flops()
        self._count_flops = lambda: result
        return result

    @property
    def skipped_anything(self) -> bool:
        return any(row.blended or row.skipped for row in self.sites)

    def as_dict(self) -> dict[str, Any]:
        plain = {key: value for key, value in vars(self).items() if not key.startswith("_")}
        share = None if self.share is None else vars(self.share) | {"kept": vars(self.share.kept)}
        return plain | {"sites": [vars(row) for row in self.sites], "share": share}

    def __str__(self) -> str:
        done = f"{self.steps_done} of {self.steps} steps" if self.steps_done != self.steps else f"{self.steps} steps"
        lines = [
            f"{self.model} ({self.family}): schedule {self.schedule!r}, {done}, guidance {self.guidance}",
            self.chart,
        ]
        if self.sites:
            lines.append(f"{'branch':<8}{'sites':<14}{'computed':>9}{'blended':>9}{'not run':>9}   (steps)")
            lines += [
                f"{row.branch:<8}{row.kind:<14}{row.computed:>9}{row.blended:>9}{row.skipped:>9}" for row in self.sites
            ]
        stored = "the model's dtype, lossless" if self.cache_format == "model" else self.cache_format
        lines.append(
            f"cache: {self.cache_bytes / 1e6:.1f} MB in {stored} (planned {self.cache_bytes_planned / 1e6:.1f} MB)"
        )
        if self.implementations:
            lines.append("ops: " + ", ".join(f"{op} in {how}" for op, how in self.implementations.items()))
        if self.compiled:
            lines.append(f"compiled: {self.compiled}")
        if self.share is not None:
            lines.append(str(self.share))
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(line for line in lines if line)


@lru_cache(maxsize=16)
def count_sites(plan: Plan, steps_done: int) -> tuple[SiteSteps, ...]:
    """Tally the steps made by branch and kind of site.

    Sites of one kind that do the same are one entry; where others of the kind differ, it has its layers, as in
    `mlp[14:43]`. Blocks and the stack are left out where they are never reused: what lies inside them says it all.
    """
    groups: dict[tuple[str, tuple[Action, ...]], list[int]] = {}
    modes = [None if step.phase is None else plan.phases[step.phase].modes for step in plan.steps[:steps_done]]
    by_cadence: list[tuple[Action, ...]] = [
        tuple("idle" if mode is None else mode[number].action for mode in modes) for number in range(len(plan.cadences))
    ]
    for site, number in zip(plan.sites, plan.cadence_of, strict=True):
        actions = by_cadence[number]
        if site.kind not in RESIDUAL_KINDS or "blend" in actions:
            groups.setdefault((site.kind, actions), []).append(site.layer)
    names = [kind for kind, _ in groups]
    tally = []
    for branch in plan.branches:
        for (kind, actions), layers in groups.items():
            ran = [action for action, step in zip(actions, plan.steps, strict=False) if branch in step.branches]
            name = kind if names.count(kind) == 1 else f"{kind}[{_ranges(layers)}]"
            tally.append(
                SiteSteps(
                    branch, name, ran.count("compute"), ran.count("blend"), steps_done - len(ran) + ran.count("idle")
                )
            )
    return tuple(tally)


def _ranges(layers: Sequence[int]) -> str:
    """Layers as selectors have them: `0:4`, or `0:4,6:8` where they do not follow one another."""
    found: list[list[int]] = []
    for layer in sorted(set(layers)):
        if found and found[-1][1] == layer:
            found[-1][1] += 1
        else:
            found.append([layer, layer + 1])
    return ",".join(f"{first}:{stop}" for first, stop in found)


@lru_cache(maxsize=16)
def ops_called(plan: Plan, steps_done: int, rings: str) -> tuple[str, ...]:
    """Names of the ops that the first steps of a plan call, in order. rings: the prefix of those on its rings, "ring"
    or "packed"."""
    called: set[str] = set()
    steps = plan.steps[:steps_done]
    for number in {step.phase for step in steps if step.phase is not None}:
        for site, cadence in zip(plan.sites, plan.cadence_of, strict=True):
            mode, residual = plan.phases[number].modes[cadence], site.kind in RESIDUAL_KINDS
            if rings and mode.action == "blend":
                called.add(f"{rings}_blend_add" if residual else f"{rings}_blend")
            if rings and mode.push:
                called.add(f"{rings}_push_residual" if residual else f"{rings}_push")
    for step in steps:
        called |= {"cfg_split"} if step.split else set()
        called |= {"cfg_reconstruct"} if step.rebuild else set()
        called |= {"ring_push"} if step.push_prediction else set()
        called |= {"prediction_blend"} if step.sum_prediction else set()
    return tuple(sorted(called))


def combined_share(parts: Sequence[Share]) -> Share | None:
    """Of models that share a run's steps: collectives are added up, of what is kept the larger counts."""
    if not parts:
        return None
    counts = ("collectives", "saved_by_reuse", "saved_by_calls_not_made", "added_by_caching")
    return replace(
        parts[0],
        **{name: sum(getattr(part, name) for part in parts) for name in counts},
        kept=max((part.kept for part in parts), key=lambda kept: sum(vars(kept).values())),
    )


def combined(parts: Sequence[Summary]) -> Summary:
    """One summary of a run whose steps were divided between models: what they did is added up, the larger cache
    counts."""
    tally: dict[tuple[str, str], list[int]] = {}
    for row in (row for part in parts for row in part.sites):
        counts = tally.setdefault((row.branch, row.kind), [0, 0, 0])
        for index, count in enumerate((row.computed, row.blended, row.skipped)):
            counts[index] += count
    charts = [part.chart.splitlines() for part in parts]
    return replace(
        parts[0],
        model=" + ".join(part.model for part in parts),
        steps=sum(part.steps for part in parts),
        steps_done=sum(part.steps_done for part in parts),
        sites=tuple(SiteSteps(*key, *counts) for key, counts in tally.items()),
        cache_bytes_planned=max(part.cache_bytes_planned for part in parts),
        cache_bytes=max(part.cache_bytes for part in parts),
        share=combined_share([part.share for part in parts if part.share is not None]),
        implementations={name: how for part in parts for name, how in part.implementations.items()},
        notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
        chart="\n".join(
            lines[0] + "".join(line.split()[1] for line in lines[1:]) for lines in zip(*charts, strict=True)
        ),
        _count_flops=lambda: RunFlops(
            sum(part.flops.uncached for part in parts), sum(part.flops.cached for part in parts)
        ),
    )
