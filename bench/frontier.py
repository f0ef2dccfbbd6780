"""Speed-up against quality of every way to make a clip faster, on the same weights and the same pairs: `python -m
bench.frontier [--pipeline wan]`.

Fewer steps, the paper's schedule, the published policies, calibrated schedules, and others' packages as they ship.
What has a ratio, a list or a threshold gets it from calibration prompts, whose seeds no held-out pair has. Quality is
measured over all pairs, each against the uncached clip of the same pair; seconds over a few of them, the arms in turn.
Everything is kept as it is made, so that an interrupted run goes on where it stopped; a peer that cannot run is listed
with its error.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import frontier_report, frontier_settings, peers, report, shapes
from bench.shapes_quality import scores
from bench.shapes_speed import Stopwatch
from fastercache import policies
from fastercache.errors import FasterCacheError
from fastercache.host import environment, steady
from fastercache.report import metrics
from fastercache.schedule.policies import Policy
from fastercache.schedule.schedule import Schedule
from fastercache.shapes import PIPELINES

PAIRS, TIMED = 64, 8
MOST_ARMS, MOST_SETTINGS, MOST_CALIBRATED = 32, 4, 5
FEWER = (1.8, 3.3)
"""By how much the step counts of the arms with fewer steps are divided: on both sides of 2x and 3x."""
POLICY_RATIO = 2.0
"""Steps over steps that run, of the policies that skip whole steps."""
OTHER_SAMPLER = "DPM-Solver++ 2M"
CONVERGED, CONVERGED_PAIRS = 4, 16
"""Times the steps of the run that every arm's distance is given to, and over how many of the pairs: it costs as much as
all other runs of a pair do that skip three quarters."""
AGREE = 0.2
"""Most difference in dB of an arm's mean PSNR when its clips are made again."""


@dataclass(frozen=True)
class Arm:
    """A row of the table. method: what settings of it are interpolated between. kind: "ours", "steps", "policy" or
    "peer"."""

    name: str
    method: str
    kind: str
    variant: shapes.Variant


# ---- the arms --------------------------------------------------------------------------------------------------------


def own_arms(pipeline: str, steps: int) -> list[Arm]:
    """What needs nothing that is found: uncached, fewer steps, the paper's schedule."""
    base = shapes.Variant("uncached", pipeline=pipeline)
    sampler_file = PIPELINES[pipeline].path / "scheduler" / "scheduler_config.json"
    own = json.loads(sampler_file.read_text())["_class_name"].removesuffix("Scheduler")
    arms = [Arm("uncached", "uncached", "ours", base)]
    for method, sampler in ((f"fewer steps, {own}", None), (f"fewer steps, {OTHER_SAMPLER}", OTHER_SAMPLER)):
        for divisor in FEWER:
            count = max(2, round(steps / divisor))
            name = f"{count} steps, {sampler or own}"
            arms.append(Arm(name, method, "steps", replace(base, name=name, steps=count, sampler=sampler)))
    return [*arms, _scheduled("paper", "paper", "ours", policies.paper, pipeline, steps)]


def _scheduled(name: str, method: str, kind: str, policy: Policy, pipeline: str, steps: int) -> Arm:
    return Arm(name, method, kind, replace(shapes.cached(name, policy, steps), pipeline=pipeline))


def wanted(method: str, names: Sequence[str]) -> bool:
    """Whether arms of a method are among those asked for: what is not is not looked for, either."""
    return not names or any(text.partition(",")[0] in method for text in names)


def policy_arms(
    pipeline: str, steps: int, found: frontier_settings.Found, clips: int, names: Sequence[str] = ()
) -> list[Arm]:
    """The published methods as this package has them."""
    kinds: dict[str, Policy] = {
        "shapes": policies.pab,
        "wan": partial(policies.pab, intervals={"joint": 2, "cross": 6}),
    }
    chosen: dict[str, Policy] = {"fora": policies.fora, "taylorseer": policies.taylorseer, "pab": kinds[pipeline]}
    if any(wanted(f"{name}, ours", names) for name in ("teacache", "magcache", "given")):
        chosen |= frontier_settings.schedules(found, pipeline, steps, clips, POLICY_RATIO)
    methods = {f"{name}, ours": policy for name, policy in chosen.items() if wanted(f"{name}, ours", names)}
    return [_scheduled(name, name, "policy", policy, pipeline, steps) for name, policy in methods.items()]


def calibrated_arms(pipeline: str, steps: int, folder: Path) -> tuple[list[Arm], list[str]]:
    """The schedules of a folder that have so many steps, at most `MOST_CALIBRATED`; and what was left out, and why. An
    index beside them is none."""
    arms: list[Arm] = []
    left_out = []
    paths = sorted(path for path in folder.glob("*.json") if path.name != "index.json")
    for path in sorted(paths, key=lambda path: [float(number) for number in re.findall(r"\d+\.?\d*", path.stem)]):
        try:
            schedule = Schedule.from_json(path)
        except FasterCacheError as error:
            left_out.append(f"{path.name}: {peers.described_error(error)}")
            continue
        if len(schedule) != steps:
            left_out.append(f"{path.name} has {len(schedule)} steps, not {steps}")
        elif len(arms) == MOST_CALIBRATED:
            left_out.append(f"{path.name}: there are {MOST_CALIBRATED} already")
        else:
            policy = shapes.fixed(schedule)
            arms.append(_scheduled(path.stem, "calibrated", "ours", policy, pipeline, steps))
    return arms, left_out


Settings = Callable[[], list[tuple[str, str]]]


def peer_settings(pipeline: str, steps: int, found: frontier_settings.Found, clips: int) -> dict[str, Settings]:
    """Of each peer: its settings, by the name of the arm, found when they are asked for. The first of them is as the
    peer's documentation has it."""

    def searched(method: str, settings: Mapping[float, tuple[str, Callable[[float], str]]]) -> list[tuple[str, str]]:
        """By the ratio of operations wanted: what else is set, in words, and the setting with a threshold."""
        chosen = []
        for ratio, (more, of) in settings.items():
            value = frontier_settings.threshold_for(found, of, ratio, pipeline, steps, clips)
            chosen.append((f"{method}, {more}threshold {value:g}", of(value)))
        return chosen

    def magcache() -> list[tuple[str, str]]:
        ratios = found.get("diffusers MagCache's ratios", lambda: frontier_settings.magcache_ratios(pipeline, steps))

        def of(most: int, share: float) -> tuple[str, Callable[[float], str]]:
            """At most so many steps skipped in a row, after such a share of the steps."""
            more = {"mag_ratios": ratios, "max_skip_steps": most, "retention_ratio": share}
            return f"K {most}, ", lambda value: peers.setting("MagCache", threshold=value, **more)

        return searched("diffusers MagCache", {1.7: of(2, 0.2), 2.4: of(4, 0.2), 3.6: of(6, 0.1)})

    def dbcache(warm_up: int, **more: Any) -> Callable[[float], str]:
        """The first of few blocks is computed on every step; the default of 8 blocks is more than these models have."""
        known = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": min(warm_up, max(1, steps // 6))}
        return lambda value: peers.setting(peers.CACHE_DIT, residual_diff_threshold=value, **known, **more)

    def dbcaches(**more: Any) -> dict[float, tuple[str, Callable[[float], str]]]:
        return {1.7: ("warm-up 8, ", dbcache(8, **more)), 3.6: ("warm-up 4, ", dbcache(4, **more))}

    def taylorseer(**more: Any) -> str:
        return peers.setting("TaylorSeer", taylor_factors_dtype="float32", **more)

    def first_block(value: float) -> str:
        return peers.setting("FirstBlockCache", threshold=value)

    start, last = 681, [-1, 681]  # the paper's schedule begins at the end of the first third
    faster = peers.setting(
        "FasterCache",
        spatial_attention_block_skip_range=3,
        temporal_attention_block_skip_range=3,
        unconditional_batch_skip_range=10,
        spatial_attention_timestep_skip_range=[-1, 901],
        temporal_attention_timestep_skip_range=[-1, 901],
        unconditional_batch_timestep_skip_range=[-1, 901],
    )
    as_paper = peers.setting(
        "FasterCache",
        spatial_attention_timestep_skip_range=last,
        temporal_attention_timestep_skip_range=last,
        unconditional_batch_timestep_skip_range=[-1, start],
        attention_weight_callback="rising",
        temporal_attention_block_skip_range=2,
    )
    broadcast = peers.setting(
        "PyramidAttentionBroadcast",
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=4,
        cross_attention_block_skip_range=6,
    )
    return {
        "diffusers FasterCache": lambda: [
            ("diffusers FasterCache, defaults", peers.setting("FasterCache", temporal_attention_block_skip_range=2)),
            ("diffusers FasterCache, as the paper", as_paper),
            ("diffusers FasterCache, faster", faster),
        ],
        "diffusers PyramidAttentionBroadcast": lambda: [("diffusers PyramidAttentionBroadcast", broadcast)],
        "diffusers FirstBlockCache": lambda: searched(
            "diffusers FirstBlockCache", dict.fromkeys((1.7, 2.4, 3.6), ("", first_block))
        ),
        "diffusers TaylorSeer": lambda: [
            (f"diffusers TaylorSeer, lite, interval {each}", taylorseer(use_lite_mode=True, cache_interval=each))
            for each in (2, 4)
        ],
        "diffusers MagCache": magcache,
        "cache-dit DBCache": lambda: searched("cache-dit DBCache", dbcaches()),
        "cache-dit DBCache, TaylorSeer": lambda: searched(
            "cache-dit DBCache, TaylorSeer", dbcaches(taylorseer_order=1)
        ),
        "cache-dit step mask": lambda: [
            ("cache-dit step mask, fast", dbcache(4, mask_policy="fast", steps_computation_policy="static")(0.08))
        ],
    }


PLAIN = {
    "diffusers FirstBlockCache": peers.setting("FirstBlockCache", threshold=0.05),
    "diffusers MagCache": peers.setting("MagCache", calibrate=True),
    "cache-dit DBCache": peers.setting(peers.CACHE_DIT),
    "cache-dit DBCache, TaylorSeer": peers.setting(peers.CACHE_DIT, taylorseer_order=1),
}
"""The setting under which a peer is listed whose search for one fails."""


def peer_arms(
    pipeline: str, steps: int, found: frontier_settings.Found, clips: int, names: Sequence[str] = ()
) -> list[Arm]:
    """Others' packages. A peer that fails on its first setting is listed once."""
    arms = []
    for method, settings in peer_settings(pipeline, steps, found, clips).items():
        if not wanted(method, names):
            continue
        try:
            chosen = settings()
        except Exception as error:  # its clips will fail, too, and say so in the table
            print(f"{method} cannot be set: {peers.described_error(error)}", flush=True)
            chosen = [(method, PLAIN[method])]
        if len(chosen) > 1 and fails(chosen[0][1], pipeline, steps, found):
            chosen = chosen[:1]
        assert len(chosen) <= MOST_SETTINGS
        for text, name in {text: name for name, text in chosen}.items():
            variant = shapes.Variant(name, pipeline=pipeline, peer=text)
            arms.append(Arm(name, method, "peer", variant))
    return arms


def fails(setting: str, pipeline: str, steps: int, found: frontier_settings.Found) -> bool:
    """Whether a peer cannot make a calibration clip under a setting."""

    def attempt() -> str | None:
        try:
            shapes.generate(
                shapes.Variant("", pipeline=pipeline, peer=setting), steps, shapes.calibration(1, pipeline), False
            )
        except Exception as error:
            return peers.described_error(error)
        return None

    if setting in found.values:  # it ran when its threshold was looked for
        return False
    return found.get(f"error under {setting}", attempt) is not None


def chosen_arms(arms: Sequence[Arm], names: Sequence[str]) -> list[Arm]:
    """The arms whose names contain one of the texts, and uncached, which all are compared with."""
    unknown = [text for text in names if not any(text in arm.name for arm in arms)]
    if unknown:
        raise SystemExit(f"no arm's name contains {unknown[0]!r}; there are: {'; '.join(arm.name for arm in arms)}")
    return [arm for arm in arms if arm.name == "uncached" or not names or any(text in arm.name for text in names)]


# ---- seconds ---------------------------------------------------------------------------------------------------------


def timed_round(arms: Sequence[Arm], pair: shapes.Pair, steps: int, number: int) -> dict[str, dict[str, float]]:
    """One clip of each arm in the round of that number: seconds of the clip and in the denoiser, and PSNR (dB) against
    this round's uncached clip."""
    clips, result = {}, {}
    for arm in shapes.in_turn(arms, number):
        pipe = shapes.pipeline(arm.variant.pipeline)
        own, scale = arm.variant.steps_of(steps), shapes.guidance_scale(arm.variant)
        with shapes.ready(pipe, arm.variant, own), Stopwatch().on(pipe.transformer) as denoiser:
            start = time.perf_counter()
            clips[arm.name] = shapes.call(pipe, pair, own, scale, arm.variant.pipeline)
            result[arm.name] = {"seconds": time.perf_counter() - start, "denoiser_seconds": denoiser.seconds}
    for name, clip in clips.items():
        result[name]["psnr_db"] = psnr(clip, clips["uncached"])
    return result


def rounds(
    arms: Sequence[Arm], pairs: Sequence[shapes.Pair], steps: int, work: Path, deadline: float
) -> list[dict[str, dict[str, float]]]:
    """`timed_round` of each pair in this process; rounds of the same arms, machine and threads are read from disk."""
    threads = steady.choose_threads()
    machine = environment.machine()
    facts = [[arm.name, shapes.identity(arm.variant, steps)] for arm in arms]
    key = json.dumps([facts, machine["cpu"], machine["torch_threads"]], sort_keys=True)
    folder = work / f"rounds-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"seconds: {threads}", flush=True)
    found: list[dict[str, dict[str, float]]] = []
    warm = False
    for number, pair in enumerate(pairs):
        path = folder / f"{pair.seed}.json"
        if not path.exists():
            if time.time() > deadline:
                break
            if not warm:
                timed_round(arms[:1], pair, steps, 0)
                warm = True
            report.write_whole(path, json.dumps(timed_round(arms, pair, steps, number)).encode())
            print(f"round {number + 1} of {len(pairs)}", flush=True)
        found.append(json.loads(path.read_text()))
    return found


def psnr(clip: np.ndarray, reference: np.ndarray) -> float:
    """Of float frames, in dB, at most `shapes.PSNR_CEILING`."""
    return min(metrics.psnr(clip[None], reference[None]), shapes.PSNR_CEILING)


# ---- quality ---------------------------------------------------------------------------------------------------------


def quality(
    arms: Sequence[Arm], pairs: Sequence[shapes.Pair], distant: int, steps: int, work: Path, pipeline: str
) -> dict[str, dict[str, Any]]:
    """Of each arm: PSNR, SSIM and LPIPS of each pair against uncached, whether the prompt is shown, PSNR of the first
    `distant` pairs against the run of `CONVERGED` times the steps, and the facts of its runs."""
    world, perceptual = PIPELINES[pipeline].world, frontier_report.lpips()[0]
    uncached = shapes.kept(arms[0].variant, pairs, steps, work)
    converged = shapes.kept(converged_variant(pipeline, steps), pairs[:distant], steps, work)
    result = {}
    for arm in arms:
        clips = shapes.kept(arm.variant, pairs, steps, work)
        near, ssim = shapes.similarity(clips, uncached)
        result[arm.name] = {
            "psnr_db": near,
            "ssim": ssim,
            "lpips": None if perceptual is None else perceptual(clips.frames, uncached.frames),
            "right": scores(clips, pairs, world)["all_right"],
            "converged_psnr_db": np.asarray([psnr(a, b) for a, b in zip(clips.frames, converged.frames, strict=False)]),
            "facts": clips.facts,
        }
        own = arm.variant.steps_of(steps)
        if "flops_ratio" not in clips.facts:
            result[arm.name]["facts"] = {"flops_ratio": steps / own, "cache_bytes": 0}
    return result


def converged_variant(pipeline: str, steps: int) -> shapes.Variant:
    return shapes.Variant("converged", pipeline=pipeline, steps=CONVERGED * steps)


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    options = shapes.parser(__doc__, PAIRS, "frontier_shapes.json")
    options.add_argument("--pipeline", choices=PIPELINES, default="shapes", help="default: shapes")
    options.add_argument("--schedules", type=Path, default=None, help="folder of calibrated schedules (JSON)")
    options.add_argument("--arms", nargs="+", default=(), metavar="TEXT", help="only arms with a text in their names")
    options.add_argument("--timed", type=int, default=TIMED, help=f"pairs that are timed (default {TIMED})")
    options.add_argument(
        "--calibration-clips",
        type=int,
        default=frontier_settings.CLIPS,
        help=f"clips that settings are found on (default {frontier_settings.CLIPS})",
    )
    args = options.parse_args(arguments)
    frontier_report.need_matplotlib()
    if args.out == options.get_default("out"):
        args.out = args.out.with_name(f"frontier_{args.pipeline}.json")
    folder = args.schedules or PIPELINES[args.pipeline].path / shapes.SCHEDULES
    deadline = float("inf") if args.minutes is None else time.time() + 60 * args.minutes
    steady.steady_allocator()

    found = frontier_settings.found_for(args.pipeline, args.steps, args.calibration_clips, args.work)
    calibrated, left_out = calibrated_arms(args.pipeline, args.steps, folder)
    arms = [
        *own_arms(args.pipeline, args.steps),
        *calibrated,
        *policy_arms(args.pipeline, args.steps, found, args.calibration_clips, args.arms),
        *peer_arms(args.pipeline, args.steps, found, args.calibration_clips, args.arms),
    ]
    arms = chosen_arms(arms, args.arms)
    if len(arms) > MOST_ARMS:
        raise SystemExit(f"{len(arms)} arms, and at most {MOST_ARMS} are wanted; --arms names those to run")
    print(f"{len(arms)} arms: {'; '.join(arm.name for arm in arms)}", flush=True)

    pairs = shapes.held_out(args.pairs, args.pipeline)

    def make(variants: Sequence[shapes.Variant], pairs: Sequence[shapes.Pair]) -> tuple[int, dict[str, str]]:
        minutes = None if args.minutes is None else (deadline - time.time()) / 60
        return shapes.make_clips(variants, pairs, args.steps, work=args.work, processes=args.processes, minutes=minutes)

    distant, _ = make([converged_variant(args.pipeline, args.steps)], pairs[:CONVERGED_PAIRS])
    n, failed = make([arm.variant for arm in arms], pairs)
    distant = min(n, distant)
    running = [arm for arm in arms if arm.name not in failed]
    measured = quality(running, pairs[:n], distant, args.steps, args.work, args.pipeline)
    timed = rounds(running, pairs[: min(args.timed, n)], args.steps, args.work, deadline)

    rows = frontier_report.rows(arms, measured, failed, timed, pairs[:n], shapes.calibration_prompts(args.pipeline))
    comparison = frontier_report.compare(arms, measured, timed)
    bars = frontier_report.bars(comparison, frontier_report.repeated(measured, timed), AGREE)
    data = {
        "settings": shapes.settings(args.steps, args.pairs, n, args.pipeline)
        | {
            "timed_pairs": len(timed),
            "threads": environment.machine()["torch_threads"],
            "calibration_clips": args.calibration_clips,
            "calibration_prompts": shapes.calibration_prompts(args.pipeline),
            "converged_steps": CONVERGED * args.steps,
            "converged_pairs": distant,
            "found": frontier_settings.reported(found),
            "schedules_left_out": left_out,
            "peers": {name: environment.version(name) for name in ("diffusers", peers.CACHE_DIT)},
        },
        "rows": rows,
        "comparison": comparison,
        "bars": bars,
        "rounds": timed,
        "per_pair": {name: {"psnr_db": one["psnr_db"].tolist()} for name, one in measured.items()},
    }
    plot = args.out.with_suffix(".svg")
    described = shapes.described(args.steps, args.pairs, n, args.pipeline)
    if args.arms:
        described += f" A part of the arms: those whose names contain {' or '.join(map(repr, args.arms))}."
    body = frontier_report.body(data, described, plot.name)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    frontier_report.plot(rows, f'"{args.pipeline}", {args.steps} steps', plot)
    command = "python -m bench.frontier" + ("" if args.pipeline == "shapes" else f" --pipeline {args.pipeline}")
    report.write(args.out, f"{args.pipeline.capitalize()}: speed-up against quality", command, data, body)


if __name__ == "__main__":
    main()
