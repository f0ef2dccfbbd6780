"""What a change costs or saves the host: this checkout against another revision, `python -m bench.steps --against REV`.

Both are measured in turns on one machine, each in a process of its own (`bench.steps_worker`), so that what slows the
machine down slows both: the engine's microseconds a step, the dispatch of the ops, the seconds of compiling a small
model's phases, the seconds of a clip of "shapes". REV is checked out in a temporary folder and built as this checkout
is, or given its libraries where their sources are the same. The machine should be idle; the load at the start is in
the report.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from bench import report
from fastercache.host import environment, steady

KINDS = ("engine", "dispatch", "compile", "shapes")
FRESH = ("compile",)
"""Kinds that need a new process, with an empty cache of the compiler, at every turn."""
MOST_RATIO, MOST_ENGINE_US = 1.05, 50.0
"""The bars: the median of this checkout over that of the other, for each figure; the engine's microseconds a step."""
BUILT_FROM = ("csrc", "setup.py")
FULL = {"rounds": 9, "run_steps": 50, "runs": 30, "calls": 300, "layers": 6, "steps": 20, "backend": "inductor"}
QUICK = {"rounds": 2, "run_steps": 8, "runs": 3, "calls": 20, "layers": 2, "steps": 3, "backend": "eager"}

Figures = dict[str, list[float]]


# ---- the other revision ----------------------------------------------------------------------------------------------


def git(*arguments: str, root: Path = report.ROOT) -> str:
    run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"git {' '.join(arguments)} failed: {run.stderr.strip()}")
    return run.stdout.strip()


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """The revision's files in a temporary folder, with its libraries built; this checkout stays as it is."""
    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "other"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            build(tree)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def build(tree: Path) -> None:
    """Give a checkout its libraries: this one's where they are made of the same sources, else built by its own
    setup.py.

    FASTERCACHE_BUILD means what it does there; this checkout's libraries must be built already.
    """
    if os.environ.get("FASTERCACHE_BUILD") == "0":
        return
    if same_sources(report.ROOT, tree):
        for library in sorted((report.ROOT / "fastercache").glob("*.so")):
            shutil.copy2(library, tree / "fastercache")
        return
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"the libraries of {tree} could not be built:\n{run.stderr}")


def same_sources(one: Path, other: Path) -> bool:
    """Whether two checkouts build their libraries of the same files."""

    def files(tree: Path) -> list[Path]:
        found = [path for name in BUILT_FROM for path in (tree / name, *(tree / name).rglob("*"))]
        return sorted(path.relative_to(tree) for path in found if path.is_file())

    names = files(one)
    return names == files(other) and all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


# ---- turns -----------------------------------------------------------------------------------------------------------


class Process:
    """A worker in a checkout."""

    def __init__(self, tree: Path, settings: Mapping[str, Any], cache: str):
        # By way of `runpy`, so that the checkout and not the worker's own folder is where modules are looked for.
        start = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
        self.tree = tree
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, str(Path(__file__).with_name("steps_worker.py"))],
            cwd=tree,
            env=os.environ | steady.ENVIRONMENT | {"PYTHONPATH": str(tree), "TORCHINDUCTOR_CACHE_DIR": cache},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.about = self.ask(settings)
        if Path(self.about["package"]) != tree / "fastercache":
            raise SystemExit(f"{tree} was to be measured, but Python found {self.about['package']}")

    def ask(self, question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and said why
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise SystemExit(f"measuring {question!r} in {self.tree} failed:\n{self.errors.read()}")
        return json.loads(answer)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


def measure(
    trees: Mapping[str, Path], kinds: Sequence[str], settings: Mapping[str, Any], rounds: int
) -> tuple[dict[str, Figures], dict[str, dict[str, str]]]:
    """Figures of each checkout, one for each round, and what serves its ops. The checkouts take turns, and who begins
    changes."""
    found: dict[str, Figures] = {name: {} for name in trees}
    with ExitStack() as stack:

        def process(tree: Path, on: ExitStack) -> Process:
            cache = on.enter_context(tempfile.TemporaryDirectory())
            return on.enter_context(Process(tree, settings, cache))

        lasting = {name: process(tree, stack) for name, tree in trees.items()}
        served = {name: one.about["ops"] for name, one in lasting.items()}
        check_served(served)
        for kind in kinds:
            if kind not in FRESH:
                for one in lasting.values():  # what a first call costs is no part of any figure
                    one.ask(kind)
            for number in range(rounds):
                for name in list(trees)[:: -1 if number % 2 else 1]:
                    if kind in FRESH:
                        with ExitStack() as own:
                            figures = process(trees[name], own).ask(kind)
                    else:
                        figures = lasting[name].ask(kind)
                    for figure, value in figures.items():
                        found[name].setdefault(figure, []).append(value)
                print(f"{kind}, round {number + 1} of {rounds}", flush=True)
    return found, served


def check_served(served: Mapping[str, Mapping[str, str]]) -> None:
    """A library against a fallback would be measured otherwise."""
    (one, ops), (other, others) = served.items()
    for op in ops.keys() & others.keys():
        if ops[op] != others[op]:
            raise SystemExit(
                f"{op} is served by {ops[op]} in {one} and by {others[op]} in {other}; build both (pip install "
                "--no-build-isolation -e .), or neither with FASTERCACHE_BUILD=0 and no library in fastercache/"
            )


# ---- the report ------------------------------------------------------------------------------------------------------


def compared(found: Mapping[str, Figures]) -> list[dict[str, Any]]:
    """A row for each figure: medians of both, their ratio, and the least and the largest ratio of a single round."""
    rows = []
    old, new = found["old"], found["new"]
    for figure in [*old, *(name for name in new if name not in old)]:
        row: dict[str, Any] = {"figure": figure, "old": None, "new": None, "ratio": None, "ratios": None}
        for name in ("old", "new"):
            if figure in found[name]:
                row[name] = statistics.median(found[name][figure])
        if row["old"] is not None and row["new"] is not None:
            ratios = [b / a for a, b in zip(old[figure], new[figure], strict=True)]
            row["ratio"] = row["new"] / row["old"]
            row["ratios"] = [min(ratios), max(ratios)]
        rows.append(row)
    return rows


def bars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The worst ratio, and the engine's microseconds; a figure that one of both does not have decides nothing."""
    found = []
    ratios = {row["figure"]: row["ratio"] for row in rows if row["ratio"] is not None}
    if ratios:
        worst = max(ratios, key=ratios.__getitem__)
        what = f"median of new over old, at most {MOST_RATIO:g} (worst: {worst})"
        found.append({"bar": what, "measured": ratios[worst], "holds": ratios[worst] <= MOST_RATIO})
    engine = [row["new"] for row in rows if row["figure"].startswith("engine") and row["new"] is not None]
    if engine:
        what = f"the engine's microseconds a step, at most {MOST_ENGINE_US:g}"
        found.append({"bar": what, "measured": max(engine), "holds": max(engine) <= MOST_ENGINE_US})
    return found


def body_of(
    rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> list[str]:
    def number(value: float | None) -> str | None:
        return None if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"

    quick = ["A trial with few repeats and small models: no figure here says anything."] if about["quick"] else []
    return [
        *quick,
        f"Old is `{about['old_commit']}`, new is `{about['new_commit']}`, measured in turns, {about['rounds']} "
        f"rounds, {about['threads']} torch threads on the CPU. Each figure is the median over the rounds; `rounds` "
        "are the least and the largest ratio of one round. `engine`: the host's work of a step around a model that "
        f"does nothing, runs of {about['run_steps']} steps; `eager step`: all of a step of CogVideoX with narrow "
        f"blocks; `compiling`: `fastercache.warmup` of CogVideoX with {about['layers']} narrow blocks by regions, "
        f"backend {about['backend']}, with an empty cache of the compiler; `shapes`: a clip of {about['steps']} "
        f"steps. The load average was {about['load_average_before']} at the start.",
        report.table(
            ("figure", "old", "new", "new / old", "rounds"),
            [
                (
                    row["figure"],
                    number(row["old"]),
                    number(row["new"]),
                    None if row["ratio"] is None else f"{row['ratio']:.3f}",
                    None if row["ratios"] is None else report.between(row["ratios"], ".3f"),
                )
                for row in rows
            ],
        ),
        report.table(
            ("bar", "measured", "verdict"),
            [(row["bar"], f"{row['measured']:.3f}", "holds" if row["holds"] else "does not hold") for row in verdicts],
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--against", required=True, metavar="REV", help="the revision that this checkout is compared with"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to measure (default: everything)"
    )
    parser.add_argument("--quick", action="store_true", help="few repeats and small models, to try it out")
    parser.add_argument("--rounds", type=int, default=None, help=f"turns of each (default {FULL['rounds']})")
    parser.add_argument(
        "--threads", type=int, default=None, help="torch threads (default: one for each core that is free)"
    )
    parser.add_argument(
        "--out", type=Path, default=report.RESULTS / "steps.json", help="JSON file; the Markdown table goes next to it"
    )
    args = parser.parse_args(arguments)
    chosen = QUICK if args.quick else FULL
    rounds = chosen["rounds"] if args.rounds is None else args.rounds
    if rounds < 1:
        parser.error(f"--rounds {rounds}: give at least 1")
    new_commit, load = report.commit(), environment.machine()["load_average"]
    if args.threads is None:
        print(steady.choose_threads(), flush=True)
        args.threads = torch.get_num_threads()
    settings = chosen | {"threads": args.threads, "rounds": rounds}
    with checkout(args.against) as tree:
        old_commit = git("rev-parse", "HEAD", root=tree)
        found, served = measure({"old": tree.resolve(), "new": report.ROOT.resolve()}, args.kinds, settings, rounds)
    rows = compared(found)
    verdicts = bars(rows)
    about = settings | {
        "quick": args.quick,
        "old_commit": old_commit,
        "new_commit": new_commit,
        "load_average_before": load,
    }
    data = {"settings": about, "served": served, "rows": rows, "rounds": found, "bars": verdicts}
    title = "Steps: the old and the new host" + (" (a trial)" if args.quick else "")
    report.write(args.out, title, "python -m bench.steps", data, body_of(rows, verdicts, about))


if __name__ == "__main__":
    main()
