"""Seconds a step on 1 to 64 GPUs, on paper: `python -m bench.parallel_cost`. Nothing here was measured.

Counted from the shapes of a system: floating-point operations, bytes that pass through the GPU's memory, and bytes that
pass between GPUs. What a GPU and its links do of each in a second is assumed, below.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bench import report
from fastercache import policies
from fastercache.report.published import SYSTEMS, Block, Part, System, sites_of
from fastercache.schedule.plan import Plan, make_plan

COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes.

    flops: dense bfloat16 operations a second at peak. efficiency: share of that in matrix products and attention.
    memory: bytes a second at peak; memory_share: of that in element-wise work. inside, between: bytes a second that one
    GPU sends, to GPUs of its node and to others. node: GPUs in one. latency: seconds that a collective takes besides.
    """

    flops: float = 989e12
    efficiency: float = 0.45
    memory: float = 3.35e12
    memory_share: float = 0.8
    inside: float = 450e9
    between: float = 50e9
    link_share: float = 0.7
    node: int = 8
    latency: float = 30e-6


@dataclass(frozen=True)
class Case:
    """A system with what its attentions exchange.

    width: channels of the residual stream. tokens: of the video. exchanged: by a kind of site, how many tensors of
    `[tokens, width]` one such site passes between processes. passes: readings and writings of such a tensor in a block,
    outside of products and attention, by its kind of attention. heads: that have to divide among
    processes; 0: any. frames: where these are divided.
    """

    system: System
    width: int
    tokens: int
    exchanged: Mapping[str, int]
    passes: int = 16
    heads: int = 0
    frames: int = 0

    def divides(self, count: int) -> bool:
        """Whether a call can be divided between so many processes."""
        return not self.heads or self.heads % count == 0

    def shard(self, count: int) -> float:
        """Share of the tokens that a process has; frames that do not divide are filled up."""
        return -(-self.frames // count) / self.frames if self.frames else 1 / count


def wan(width: int = 5120, hidden: int = 13824, layers: int = 40, text: int = 512) -> Case:
    """Wan 2.1 14B, 81 frames of 720 x 1280: 21 latent frames of 45 x 80 patches."""
    tokens = 21 * 45 * 80
    output = ((tokens, width),)
    joint = 4 * tokens * width**2 + 2 * tokens**2 * width
    cross = 2 * (tokens + text) * width**2 + 2 * tokens * text * width
    mlp = 2 * tokens * width * hidden
    blocks = [
        Block(
            (
                Part("joint", layer, joint, output),
                Part("cross", layer, cross, output),
                Part("mlp", layer, mlp, output),
            ),
            output,
        )
        for layer in range(layers)
    ]
    source = "huggingface.co/Wan-AI/Wan2.1-T2V-14B-Diffusers, transformer/config.json"
    prediction = math.prod((16, 21, 90, 160))
    system = System("wan-14b", source, "81 frames of 720x1280", 50, sites_of(blocks), prediction, 14_290_000_000)
    return Case(system, width, tokens, {"joint": 4}, heads=40)


def open_sora() -> Case:
    """Open-Sora 1.2, 192 frames: 57 latent frames of 30 x 53 patches; around an attention over time frames are
    exchanged for patches, and back."""
    return Case(SYSTEMS["open-sora-1.2"], 1152, 57 * 30 * 53, {"temporal": 2}, frames=57)


def seconds(case: Case, plan: Plan, count: int, machine: Machine) -> tuple[float, float]:
    """Of a mean step of a plan on `count` GPUs: in all, and between GPUs."""
    work = links = 0.0
    for step in plan.steps:
        if step.phase is None:
            continue
        phase, rows = plan.phases[step.phase], len(step.branches)
        one, between = _call(case, plan, phase.modes, count, machine)
        work, links = work + rows * one, links + rows * between
    return (work + links) / len(plan.steps), links / len(plan.steps)


def _call(case: Case, plan: Plan, modes: tuple, count: int, machine: Machine) -> tuple[float, float]:
    """One branch of a step: seconds of a GPU's own work, and of its links."""
    share = case.shard(count)
    stream = 2 * case.tokens * case.width * share  # bytes of this process's shard of the residual stream
    operations = passed = exchanges = 0.0
    collectives = 1  # the gathered prediction
    for site, number in zip(case.system.sites, plan.cadence_of, strict=True):
        mode, kind = modes[number], site.node.kind
        if kind == "block":
            passed += case.passes * stream
        if kind in ("stack", "block") or mode.action == "idle":
            continue
        if mode.action == "blend":
            passed += 3 * stream  # two taps and their sum
            continue
        passed += stream * len(mode.push)
        operations += 2 * site.macs * share
        tensors = case.exchanged.get(kind, 0)
        exchanges, collectives = exchanges + tensors * stream, collectives + tensors
    weights = 2 * case.system.parameters
    own = operations / (machine.flops * machine.efficiency)
    own += (passed + weights) / (machine.memory * machine.memory_share)
    if count == 1:
        return own, 0.0
    return own, collectives * machine.latency + _sent(exchanges, count, machine)


def _sent(shard: float, count: int, machine: Machine) -> float:
    """Seconds of an exchange in which each GPU sends every other one 1 / count of its shard; the links inside a node
    and between nodes are used at once, the slower decides."""
    near = min(count, machine.node) - 1
    inside = shard * near / count / (machine.inside * machine.link_share)
    between = shard * (count - 1 - near) / count / (machine.between * machine.link_share)
    return max(inside, between)


def rows(case: Case, machine: Machine) -> list[list[str]]:
    steps, tree = case.system.steps, case.system.tree
    uncached, scheduled = (make_plan(policy(steps, True), True, tree) for policy in (policies.none, policies.paper))
    alone = seconds(case, uncached, 1, machine)[0]
    found = []
    for count in COUNTS:
        (plain, links), (cached, _) = (seconds(case, plan, count, machine) for plan in (uncached, scheduled))
        maps = 4 * scheduled.maps * case.system.prediction
        kept = maps + (case.system.cache_bytes(scheduled, "model") - maps) * case.shard(count)
        found.append(
            [
                str(count) if case.divides(count) else f"({count})",
                f"{plain:.3g}",
                f"{links / plain:.0%}",
                f"{alone / plain:.1f}x",
                f"{cached:.3g}",
                f"{alone / cached:.1f}x",
                f"{kept / 1e9:.2f}",
            ]
        )
    return found


HEADER = (
    "GPUs",
    "s a step, uncached",
    "of it between GPUs",
    "against 1",
    "s a step, scheduled",
    "against 1 uncached",
    "cache, GB each",
)


def tables(machine: Machine = Machine()) -> dict[str, str]:
    """By system: a Markdown table."""
    cases = {"Open-Sora 1.2, 192 frames of 480x854": open_sora(), "Wan 2.1 14B, 81 frames of 720x1280": wan()}
    return {name: report.table(HEADER, rows(case, machine)) for name, case in cases.items()}


def assumptions(machine: Machine = Machine()) -> str:
    """What the tables take for granted, as a list in Markdown."""
    return "\n".join(
        [
            f"- A GPU: {machine.flops / 1e12:.0f} TFLOP/s in bfloat16, of which {machine.efficiency:.0%} are reached; "
            f"{machine.memory / 1e12:.3g} TB/s of memory, of which {machine.memory_share:.0%}.",
            f"- Links: {machine.inside / 1e9:.0f} GB/s a GPU to the {machine.node - 1} others of its node, "
            f"{machine.between / 1e9:.0f} GB/s to those of other nodes, of which {machine.link_share:.0%} are reached; "
            f"{machine.latency * 1e6:.0f} microseconds a collective.",
            f"- {Case.passes} readings or writings of the residual stream in a block beside products and attention, "
            "and all weights once a branch.",
            "- Guidance with two branches, the paper's schedule, no overlap of work and links; the means of 30 steps "
            "of Open-Sora and of 50 of Wan.",
        ]
    )


def main() -> None:
    print(f"{assumptions()}\n")
    for name, table in tables().items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
