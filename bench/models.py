"""Whole denoisers with random weights at their published sizes, on a GPU: `python -m bench.models --out DIR`.

CogVideoX-2B is measured in one configuration after another: eager and compiled, uncached and cached, with the attention
that PyTorch chooses and with the fastest, with caches in int8, with CUDA graphs; and, beside the paper's schedule and
one that skips whole steps, diffusers' own FasterCache, MagCache and FirstBlockCache. A *run* is the 50 calls of the
denoiser with guidance and an Euler step between them; no text encoder, no decoder. The two configurations of the bar
are timed over whole runs; the others over a part of the schedule that has all its phases, from which the time of the
run follows. Nothing is timed before it is held against the eager model.

The other systems run a part of their schedule from end to end, eager: does it fit, what does it take.

DIR/models.json and DIR/models.md are written anew after every configuration. What does not fit into `--minutes` is
named there. `--device cpu --scale small` rehearses all of it on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import published, report
from bench.model_peers import measure_peer
from bench.model_report import ATTENTION_ALONE, BAR_MODEL, bars, body_of, factors, same_attention
from bench.model_runs import (
    CONFIGURATIONS,
    Case,
    Configuration,
    Row,
    attention_rows,
    described_failure,
    difference,
    end_to_end,
    free,
    measure,
)
from fastercache import ops, policies
from fastercache.errors import FasterCacheWarning
from fastercache.host import environment
from fastercache.report import flops
from fastercache.report.published import SYSTEMS

SHORT_NAMES = [configuration.name.lower().replace(", ", "-").replace(" ", "-") for configuration in CONFIGURATIONS]
LAST_SECONDS = 12.0
"""Kept for writing."""


class TimeIsUp(BaseException):
    """Ends what is being measured."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """`TimeIsUp` inside the block after so many seconds."""

    def ring(*_: Any) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attention_note(case: Case) -> str:
    if case.system.startswith("cogvideox"):
        return (
            "CogVideoX calls `F.scaled_dot_product_attention` itself: diffusers' `set_attention_backend` has no "
            "effect on it."
        )
    return "A configuration runs under one of them."


class Session:
    """Measures what was asked for, in order, while there is time, and writes after each."""

    def __init__(self, args: argparse.Namespace, end: float):
        self.args, self.end = args, end
        self.dtype = getattr(torch, args.dtype)
        self.document: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "scale": args.scale,
            "dtype": args.dtype,
            "backend": args.backend,
            "blends": args.blends,
            "models": {},
            "rows": [],
            "bars": [],
            "not_measured": [],
        }
        self.latents: dict[str, torch.Tensor] = {}

    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def rehearsal(self) -> bool:
        return self.args.scale != "published" or self.args.device != "cuda"

    def save(self) -> None:
        document = self.document
        for model, about in document["models"].items():
            about["factors"] = factors(
                document["rows"], model, about["flops"]["ratio"], same_attention(about["attention"])
            )
        about = document["models"].get(BAR_MODEL, {"flops": {"ratio": None}, "attention": []})
        rows = [] if self.rehearsal or about.get("steps") != SYSTEMS[BAR_MODEL].steps else document["rows"]
        document["bars"] = bars(rows, about["flops"]["ratio"], same_attention(about["attention"]))
        title = "Whole models" if not self.rehearsal else "Whole models, rehearsed"
        command = "python -m bench.models"
        path = self.args.out / "models.json"
        report.write(
            path,
            title,
            command,
            document,
            body_of(document, self.rehearsal),
            commit_measured=self.args.commit,
            quiet=True,
        )

    def row(self, model: str, configuration: str, call: Callable[[Row], None], **more: Any) -> Row:
        """Run one measurement into a row, whatever becomes of it."""
        row: Row = {
            "model": model,
            "configuration": configuration,
            "correct": False,
            "outcome": "",
            "notes": [],
            **more,
        }
        start = time.monotonic()
        try:
            with time_limit(self.left()):
                call(row)
        except TimeIsUp:
            row["outcome"] = "ended: the time was up"
        except Exception as error:  # the next configuration may do better
            row["outcome"] = described_failure(error)
        row["took_s"] = time.monotonic() - start
        latents = row.pop("latents", None)
        if latents is not None:
            self.latents[configuration] = latents
        self.document["rows"].append(row)
        free()
        print(
            f"{model}, {configuration}: {row['outcome']}, {row.get('seconds')} s; took {row['took_s']:.0f} s",
            flush=True,
        )
        self.save()
        return row

    def system(self, name: str, chosen: Sequence[Configuration]) -> None:
        """All that is to be measured of a system."""
        args = self.args
        schedule = f"{name}/{args.schedule}" if f"{name}/{args.schedule}" in policies.PRESETS else f"{name}/paper"
        if self.left() < args.least_seconds:
            self.document["not_measured"] += [f"{name}, {c.name}" for c in chosen] or [f"{name}, end to end"]
            return
        try:
            with time_limit(self.left()):
                steps = args.steps if chosen and args.steps else SYSTEMS[name].steps
                case = Case(name, args.scale, args.device, self.dtype, steps, schedule)
        except (TimeIsUp, Exception) as error:
            self.row(name, "end to end" if not chosen else "all", partial(_fail, error), schedule=schedule)
            return
        if not chosen:
            self.row(name, "end to end", partial(end_to_end, case), schedule=schedule)
            return
        meta = published.build(name, args.scale)
        sites = case.family.sites(meta[0])
        counted = flops.count_run(meta[0], case.family, sites, case.plan, case.layout, meta[1])
        about: dict[str, Any] = {
            "video": SYSTEMS[name].video if args.scale == "published" else "small",
            "steps": steps,
            "schedule": schedule,
            "chart": case.schedule.chart(),
            "part_steps": len(case.part),
            "attention": [],
            "attention_note": attention_note(case),
            "flops": {"uncached": counted.uncached, "cached": counted.cached, "ratio": counted.ratio},
            "difference": None,
            "factors": [],
        }
        self.document["models"][name] = about
        self.row(name, ATTENTION_ALONE, partial(self.attention, case, about))
        self.latents = {}
        cases = {None: case}
        for configuration in chosen:
            if configuration.attention == "fastest" and same_attention(about["attention"]):
                continue
            if self.left() < args.least_seconds:
                self.document["not_measured"].append(f"{name}, {configuration.name}")
                self.save()
                continue
            if configuration.peer is not None:
                call = partial(measure_peer, case, configuration, args.backend)
                self.row(name, configuration.name, call, peer=configuration.peer)
                continue
            if configuration.schedule not in cases:
                cases[configuration.schedule] = case.following(str(configuration.schedule))
            call = partial(measure, cases[configuration.schedule], configuration, args.backend, self.left)
            self.row(name, configuration.name, call, cache_format=configuration.cache_format, mode=configuration.mode)
            uncached, cached = (self.latents.get(key) for key in ("compiled uncached", "compiled cached"))
            if uncached is not None and cached is not None:
                about["difference"] = difference(cached, uncached)
        self.save()

    def attention(self, case: Case, about: dict[str, Any], row: Row) -> None:
        about["attention"] = attention_rows(case)
        fastest = next(entry["backend"] for entry in about["attention"] if entry["fastest"])
        row |= {"correct": True, "outcome": "measured", "attention": fastest}


def _fail(error: BaseException, row: Row) -> None:
    raise error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for models.json and models.md")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=tuple(SYSTEMS),
        default=["cogvideox-2b"],
        help="in this order (default: cogvideox-2b)",
    )
    parser.add_argument(
        "--configurations",
        nargs="*",
        choices=SHORT_NAMES,
        default=None,
        help="default: all of cogvideox-2b; none, and a run from end to end, of the others",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=published.SCALES, default="published")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=None, help="of a run (default: the published number)")
    parser.add_argument(
        "--schedule",
        choices=("released", "paper"),
        default="released",
        help="the preset (default: released, else paper)",
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--blends",
        choices=("op", "plain"),
        default="op",
        help="compiled blends: the op (default), or plain operations, which Inductor may fuse",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument(
        "--least-seconds", type=float, default=20.0, help="nothing begins with less time left (default 20)"
    )
    parser.add_argument("--commit", default=None, help="the commit measured, where git cannot tell")
    parser.add_argument(
        "--threads", type=int, default=environment.cores(), help="torch threads (default: one for each core)"
    )
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; `--device cpu --scale small` rehearses without one")
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore", FasterCacheWarning)  # on a run that was left, which is meant
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    # Should the process be stuck where no signal reaches it, what was written before stays.
    faulthandler.dump_traceback_later(60 * args.minutes + 10, exit=True, file=2)
    session = Session(args, end - min(LAST_SECONDS, 6 * args.minutes))
    try:
        with ops.plain_blends(args.blends == "plain"):
            for name in args.models:
                named = (
                    SHORT_NAMES if args.configurations is None and name == "cogvideox-2b" else args.configurations or []
                )
                session.system(
                    name, [c for c, short in zip(CONFIGURATIONS, SHORT_NAMES, strict=True) if short in named]
                )
                free()
        session.save()
    finally:
        faulthandler.cancel_dump_traceback_later()
        torch.set_grad_enabled(True)
    print((args.out / "models.md").read_text())
    rows = session.document["rows"]
    return int(not rows or any(not row["correct"] for row in rows if not row.get("peer")))


if __name__ == "__main__":
    sys.exit(main())
