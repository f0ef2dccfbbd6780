"""What can go wrong, by name. Every message says what was found, what was expected and what to do."""

from __future__ import annotations


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


class FasterCacheWarning(UserWarning):
    """Nothing is wrong with the video, but something is not as a user would expect: nothing was skipped, or nothing is gained."""
