"""What can go wrong, by name. Every message says what was found, what was expected and what to do."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

LIBRARIES = ("fastercache", "torch", "diffusers", "accelerate", "transformers", "contextlib", "functools")
"""Packages whose frames lie between a user's line and a warning about it."""


class FasterCacheError(Exception):
    """Base of all errors that this package raises on purpose."""


class ScheduleError(FasterCacheError, ValueError):
    """A schedule that cannot be run: it contradicts itself, the model or the run."""


class UnsupportedModelError(FasterCacheError, TypeError):
    """A model or pipeline whose family is not known, or whose structure is not the one its family expects."""


class CompileError(FasterCacheError, RuntimeError):
    """`compile` or `restore` called on an object in the wrong state, such as one that is compiled already."""


class RunError(FasterCacheError, RuntimeError):
    """A call that does not fit the run it belongs to: another shape, one step too many, a run inside a run."""


class CacheError(FasterCacheError, ValueError):
    """Caches that cannot be as they were asked for: over the limit, or in a format that cannot hold them."""


class CalibrationError(FasterCacheError):
    """A pipeline, prompts or a target that no schedule can be fitted to."""


class FasterCacheWarning(UserWarning):
    """Nothing is wrong with the video, but something is not as a user would expect: nothing was skipped, or nothing is
    gained."""


def warn(message: str) -> None:
    """A `FasterCacheWarning` that points at the user's line: the innermost frame that is no library's."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FasterCacheWarning, stacklevel=level if frame is not None else 2)
