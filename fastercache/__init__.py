"""FasterCache for video diffusion transformers: `fastercache.compile(pipe)`."""

from fastercache import policies
from fastercache.api import compile, disabled, release, restore, run, summary, warmup
from fastercache.errors import (
    CacheError,
    CompileError,
    FasterCacheError,
    FasterCacheWarning,
    RunError,
    ScheduleError,
    UnsupportedModelError,
)
from fastercache.report import Summary
from fastercache.schedule import Schedule, Step

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "CompileError",
    "FasterCacheError",
    "FasterCacheWarning",
    "RunError",
    "Schedule",
    "ScheduleError",
    "Step",
    "Summary",
    "UnsupportedModelError",
    "compile",
    "disabled",
    "policies",
    "release",
    "restore",
    "run",
    "summary",
    "warmup",
]
