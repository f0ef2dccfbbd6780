"""Builds, tests and measures the ops on a GPU in one command, in under 9 minutes: `python -m bench.gpu --out DIR`.

1. build: installs the package in place, with its extensions (DIR/build.log).
2. test, graphs: the op tests and those of CUDA graphs on the GPU, at once (DIR/test.log, DIR/graphs.log).
3. measure: every op against a copy, eager PyTorch and Inductor's code, and the cost of dispatch (DIR/measure.log,
`bench.gpu_measure`). 4. sanitize: compute-sanitizer's memcheck, racecheck and initcheck over a small op test
(DIR/memcheck.log, ...).

DIR/kernels.json and DIR/kernels.md hold the outcome. A row whose median is over 10 % slower than the committed one of
the same device (bench/results/kernels.json) is printed. A step that fails is reported, and those after it run all the
same; the exit status is then 1.

`--device cpu --scale 0.05` rehearses the measurements on a machine without a GPU: small, and through the same code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "bench" / "results" / "kernels.json"
STEPS = ("build", "test", "measure", "sanitize")
MINUTES = {"build": 3.0, "test": 2.5, "sanitize": 2.0}
"""The most a step may take. Measuring gets what the others leave; `sanitize` is kept its share."""
TOOLS = ("memcheck", "racecheck", "initcheck")
OPTIONS = ("--error-exitcode", "9", "--print-limit", "20")
SLOWER = 1.10
GPU_TEST = "tests/ops/test_gpu.py"
GPU_TESTS = {"test": GPU_TEST, "graphs": "tests/test_cuda_graphs.py"}
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1"}

Step = dict[str, Any]


def run(name: str, command: Sequence[str], out: Path, minutes: float, **environment: str) -> Step:
    """Runs a command with its output in a log; a command that runs too long is ended and counts as failed."""
    return finish(start(name, command, out, **environment), minutes)


def start(name: str, command: Sequence[str], out: Path, **environment: str) -> Step:
    log = out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT | environment,
            start_new_session=True,
        )
    return {"step": name, "process": process, "log": log, "start": time.monotonic()}


def finish(step: Step, minutes: float) -> Step:
    try:
        code = step["process"].wait(timeout=max(1.0, 60 * minutes))
        outcome = "passed" if code == 0 else f"failed with {code}"
    except subprocess.TimeoutExpired:
        os.killpg(step["process"].pid, signal.SIGKILL)  # the compilers it started, too
        step["process"].wait()
        outcome = f"ended after {minutes:.1f} minutes"
    lines = [line for line in step["log"].read_text(errors="replace").splitlines() if line.strip()]
    seconds = round(time.monotonic() - step["start"], 1)
    return {"step": step["step"], "outcome": outcome, "seconds": seconds, "last": lines[-1][:160] if lines else ""}


def build(out: Path, minutes: float) -> Step:
    # In place and without a download: the machine's own torch is what is built against.
    install = ["install", "--no-index", "--no-deps", "--no-build-isolation", "--verbose", "--editable", "."]
    step = run("build", [sys.executable, "-m", "pip", *install], out, minutes)
    left_out = [
        line.strip() for line in (out / "build.log").read_text(errors="replace").splitlines() if " not built (" in line
    ]
    return step | ({"last": " ".join(left_out)} if left_out else {})


def test(out: Path, minutes: float) -> list[Step]:
    """At once: compiling the graphs keeps the host busy, and the ops the GPU."""
    begun = [
        start(name, [sys.executable, "-m", "pytest", path, "--durations=5"], out) for name, path in GPU_TESTS.items()
    ]
    end = time.monotonic() + 60 * minutes
    steps = [finish(step, (end - time.monotonic()) / 60) for step in begun]
    for step in steps:
        if (
            step["outcome"] == "passed" and " passed" not in step["last"]
        ):  # all skipped, which pytest does not call a failure
            step["outcome"] = "failed: no test ran"
    return steps


def sanitize(out: Path, minutes: float) -> list[Step]:
    """The three tools at once. Without torch's caching allocator each tensor has an allocation of its own, whose bounds
    the tools know."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return [
            {"step": name, "outcome": "not run: compute-sanitizer is not installed", "seconds": 0, "last": ""}
            for name in TOOLS
        ]
    test = [sys.executable, "-m", "pytest", GPU_TEST, "-k", "every_op_once", "-p", "no:cacheprovider"]
    begun = [
        start(name, [tool, "--tool", name, *OPTIONS, *test], out, PYTORCH_NO_CUDA_MEMORY_CACHING="1") for name in TOOLS
    ]
    end = time.monotonic() + 60 * minutes
    return [finish(step, (end - time.monotonic()) / 60) for step in begun]


def regressions(document: dict[str, Any], committed: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Rows slower than the committed ones of the same device and scale."""
    if committed is None or any(committed[key] != document[key] for key in ("device", "scale")):
        return []
    before = {(row["op"], row["case"]): row["p50_us"] for row in committed["rows"]}
    found = []
    for row in document["rows"]:
        old, new = before.get((row["op"], row["case"])), row["p50_us"]
        if old and (new is None or new > SLOWER * old):
            found.append({"op": row["op"], "case": row["case"], "committed_us": old, "p50_us": new})
    return found


def summary(document: dict[str, Any]) -> list[str]:
    """The paragraphs and tables of kernels.md."""
    from bench import dispatch, op_rows, report  # only now: the package that they import may just have been built

    copy = document["copy_gbps"]
    parts = [
        f"{document['device']}; a device copy moves {copy:.0f} GB/s, counting bytes read and written."
        if copy
        else document["device"],
        "Served by: " + ", ".join(f"{op} {served[document['kind']]}" for op, served in document["ops"].items()) + ".",
        "`of copy` is the time of a copy of the same bytes over ours; `vs` the time of the best plain form over ours. "
        "Times are means of a round over rotating tensors, larger together than twice the last level of cache; their "
        "percentiles are over rounds.",
        op_rows.table(document["rows"]),
        dispatch.dispatch_table(document["dispatch"]),
    ]
    if document["bars"]:
        parts.append(op_rows.bar_table(document["bars"]))
    steps = [(step["step"], step["outcome"], step["seconds"], step["last"]) for step in document["steps"]]
    parts.append(report.table(("step", "outcome", "seconds", "last line"), steps))
    lines = [*document["notes"]]
    lines += [f"Not measured, for want of time: {row['op']}, {row['case']}." for row in document["not_measured"]]
    lines += [
        f"REGRESSION: {row['op']}, {row['case']}: {row['p50_us'] or 'wrong'} us, committed {row['committed_us']:.1f} "
        "us."
        for row in document["regressions"]
    ]
    return [*parts, *lines]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for kernels.json, kernels.md and the logs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tokens and frames to measure with")
    parser.add_argument("--minutes", type=float, default=8.8, help="for everything")
    parser.add_argument("--seconds", type=float, default=0.8, help="time for a case, without its check and compilation")
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, default=None, help="default: all on a GPU, `measure` on a CPU"
    )
    parser.add_argument("--commit", default=None, help="the commit measured, where git cannot tell")
    parser.add_argument(
        "--no-inductor", action="store_true", help="leave out Inductor's code, which a CPU takes minutes to compile"
    )
    args = parser.parse_args(arguments)
    chosen = args.steps or (STEPS if args.device == "cuda" else ("measure",))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes

    def left() -> float:
        return (end - time.monotonic()) / 60

    steps: list[Step] = []

    def done(*finished: Step) -> None:
        for step in finished:
            steps.append(step)
            print(f"{step['step']}: {step['outcome']} in {step['seconds']} s. {step['last']}", flush=True)

    if "build" in chosen:
        done(build(out, min(MINUTES["build"], left())))
    if "test" in chosen:
        done(*test(out, min(MINUTES["test"], left())))
    if "measure" in chosen:
        minutes = left() - (MINUTES["sanitize"] if "sanitize" in chosen else 0)
        command = [
            sys.executable,
            "-m",
            "bench.gpu_measure",
            "--out",
            str(out),
            "--device",
            args.device,
            "--scale",
            str(args.scale),
        ]
        command += [
            "--seconds",
            str(args.seconds),
            "--minutes",
            str(minutes - 0.4),
        ]  # the case that then runs needs time to end
        command += [f"--commit={args.commit}"] if args.commit else []
        command += ["--no-inductor"] if args.no_inductor else []
        (out / "kernels.json").unlink(missing_ok=True)
        done(run("measure", command, out, minutes))
    if "sanitize" in chosen:
        done(*sanitize(out, min(MINUTES["sanitize"], left())))

    path = out / "kernels.json"
    if path.exists():
        document = json.loads(path.read_text())
        document["steps"] = steps
        document["regressions"] = regressions(
            document, json.loads(COMMITTED.read_text()) if COMMITTED.exists() else None
        )
        from bench import report

        report.write_whole(path, (report.pretty(document) + "\n").encode())
        text = "\n\n".join(
            ["# Kernels on a GPU" if args.device == "cuda" else "# Kernels, rehearsed on a CPU", *summary(document)]
        )
        report.write_whole(path.with_suffix(".md"), (text + "\n").encode())
        print(text)
    wrong = not path.exists() or not all(row["correct"] for row in document["rows"])
    return int(wrong or any(step["outcome"] != "passed" for step in steps))


if __name__ == "__main__":
    sys.exit(main())
