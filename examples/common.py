"""What the examples share: their command line, and the video at the end."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastercache.report import media
from fastercache.report.summary import Summary


def options(words: Sequence[str] | None, description: str, **defaults: Any) -> argparse.Namespace:
    """The command line: a prompt, and an option for each default. `words` stands in for the shell's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("prompt")
    for name, value in {**defaults, "out": Path("video.mp4")}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser.parse_args(words)


def finish(frames: np.ndarray, summary: Summary, out: Path) -> None:
    """Save frames [frames, H, W, 3] in [0, 1], and say what was skipped."""
    media.save(out, media.to_bytes(frames))
    print(summary)
    print(f"wrote {out}")
