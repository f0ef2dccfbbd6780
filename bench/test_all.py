"""Every test, the long ones too, and the result as a page: `make test-all`, or `python -m bench.test_all`.

Long are the random sequences of use in tests/test_misuse.py, of which an environment variable below says how many there
are, drawn anew each time, and the cases that tests/longer.py marks. In tests/test_parallel.py it is four processes,
compiled blocks and jobs of torchrun.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from bench import report

LONG = {"FASTERCACHE_MISUSE_EXAMPLES": "300", "FASTERCACHE_ALL_TARGETS": "1", "FASTERCACHE_LONG": "1"}
"""What makes the tests longer than `make test` has them."""
MOST = 12
"""Tests and files that are named as the slowest."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=report.RESULTS / "test_all.json", help="JSON; the page lies beside it"
    )
    parser.add_argument("tests", nargs="*", default=[], help="files, for less than all")
    args = parser.parse_args()
    start, commit = time.perf_counter(), report.commit()
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "--durations=0", *args.tests]
    run = subprocess.run(
        command, cwd=report.ROOT, env=os.environ | LONG | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    minutes = (time.perf_counter() - start) / 60
    lines = run.stdout.strip().splitlines()
    took = [match for line in lines if (match := re.match(r"([\d.]+)s (call|setup|teardown) +(\S+)", line.strip()))]
    print("\n".join(line for line in lines if not re.match(r"[\d.]+s (call|setup|teardown)", line.strip()))[-8000:])
    # pytest closes with its counts, such as "5 passed, 2 skipped in 3.10s".
    counts = lines[-1].strip("= ") if lines else "nothing ran"
    files: dict[str, float] = {}
    for match in took:
        file = match[3].partition("::")[0]
        files[file] = files.get(file, 0.0) + float(match[1])
    slowest = [f"{match[1]} s: {match[3]} ({match[2]})" for match in took[:MOST]]
    slow_files = [f"{files[file]:.0f} s: {file}" for file in sorted(files, key=files.__getitem__, reverse=True)[:MOST]]
    settings = ", ".join(f"{name}={value}" for name, value in LONG.items())
    report.write(
        args.out,
        "All tests, the long ones too",
        "python -m bench.test_all",
        {
            "counts": counts,
            "minutes": round(minutes, 1),
            "exit_status": run.returncode,
            "slowest": slowest,
            "slowest_files": slow_files,
            "settings": LONG,
        },
        [
            f"{counts}; {minutes:.1f} minutes, exit status {run.returncode}, with {settings}.",
            "Slowest tests:\n\n" + "\n".join(f"- {one}" for one in slowest),
            "Slowest files:\n\n" + "\n".join(f"- {one}" for one in slow_files),
        ],
        commit_measured=commit,
    )
    raise SystemExit(run.returncode)


if __name__ == "__main__":
    main()
