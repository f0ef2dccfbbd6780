"""What every report shares: the machine and versions it was made with, Markdown tables, and the two files it is written
to."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastercache import ops
from fastercache.host import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def provenance() -> dict[str, Any]:
    """Machine, versions, commit and date (UTC), as plain data. The machine's load is there because a busy machine
    spoils timings."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "ops": ops.implementations(),
    }


def commit() -> str:
    """The checked-out commit, with "-dirty" where tracked files differ from it; "unknown" where there is none."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. Cells are shown with `str`; `None` is an empty cell, and a bar or a line break cannot end one
    early."""

    def line(cells: Sequence[object]) -> str:
        if len(cells) != len(header):
            raise ValueError(f"a row of {len(cells)} cells under {len(header)} headings: {list(cells)}")
        texts = ("" if cell is None else str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def between(interval: Sequence[float], spec: str = ".2f") -> str:
    """An interval as text, each end formatted with `spec`."""
    low, high = interval
    return f"[{low:{spec}}, {high:{spec}}]"


def write(
    out: Path,
    title: str,
    command: str,
    data: Mapping[str, Any],
    body: Sequence[str],
    commit_measured: str | None = None,
    quiet: bool = False,
) -> None:
    """Write `data` with the environment to `out` (JSON), and the paragraphs and tables of `body` next to it as
    Markdown; print those.

    commit_measured: where git cannot tell. quiet: do not print.
    Each file appears whole or not at all. JSON has no infinities, so a number that is not finite becomes null.
    """
    facts = provenance()
    facts["commit"] = commit_measured or facts["commit"]
    machine, versions = facts["machine"], facts["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    footer = (
        f"Made by `{command}` on {facts['date']} at commit `{facts['commit']}`; {machine['cpu']}, {machine['cores']} "
        f"cores{gpu}; {known}."
    )
    text = "\n\n".join([f"# {title}", *body, footer]) + "\n"
    document = {"title": title, "command": command, **facts, **data}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, (pretty(_plain(document)) + "\n").encode())
    write_whole(out.with_suffix(".md"), text.encode())
    if not quiet:
        print(text)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that an interruption leaves the old one or the new one."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def pretty(value: Any, indent: str = "") -> str:
    """JSON in which whatever fits on a line takes one."""
    line = json.dumps(value, allow_nan=False)
    if len(indent) + len(line) <= 140 or not isinstance(value, dict | list):
        return line
    inner = indent + " "
    named = isinstance(value, dict)
    items = [f"{json.dumps(key)}: {pretty(value[key], inner)}" if named else pretty(key, inner) for key in value]
    return (
        ("{}" if named else "[]")[0]
        + "\n"
        + ",\n".join(inner + item for item in items)
        + "\n"
        + indent
        + ("}" if named else "]")
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
