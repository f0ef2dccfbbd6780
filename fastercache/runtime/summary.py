"""The summary of a run that has ended."""

from __future__ import annotations

from fastercache import ops
from fastercache.cache.formats import format_of
from fastercache.report.run_flops import RunFlops
from fastercache.report.summary import Summary, count_sites, ops_called
from fastercache.runtime.run import Run


def summary_of(run: Run, note: str | None) -> Summary:
    """What a run did. note: how it ended, where that was not after its last step."""
    gated, plan, device = run.gated, run.plan, run.key[2]
    graphs = gated.graphs
    recompiled = graphs.end_run() if graphs is not None else None
    notes = [*([note] if note else []), *run.notes, *([recompiled] if recompiled else []), *run.host.notes]
    if not run.done and note is None:
        notes.append(f"stopped after {run.position} of {len(plan.steps)} steps")
    notes += ops.fallback_reasons(device)
    # Only what the count needs: the run itself is gone when somebody asks.
    host, layout, shapes, autocast = run.host, run.layout, run.shapes, run.autocast

    def count() -> RunFlops:
        from fastercache.report.flops import count_run  # it needs private names of torch's

        with host.natively():  # the operations of other kernels are not known to torch's counter
            return count_run(gated.model, gated.family, gated.sites, plan, layout, shapes, autocast)

    called = ops_called(plan, run.position, format_of(run.cache_format).ops)
    return Summary(
        model=type(gated.model).__name__,
        family=gated.family.name,
        schedule=plan.schedule.name,
        guidance=layout.name,
        steps=len(plan.steps),
        steps_done=run.position,
        sites=count_sites(plan, run.position),
        cache_format=run.cache_format,
        cache_bytes_planned=run.planned_bytes,
        cache_bytes=run.cache_bytes,
        implementations={op: ops.implementation(op, device) for op in called},
        compiled="" if graphs is None else graphs.describe(),
        share=None if host.processes is None else host.processes.share(run.position, run.guidance.calls),
        notes=notes,
        chart=plan.chart,
        _count_flops=count,
    )
