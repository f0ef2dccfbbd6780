"""FasterCache for video diffusion transformers: `fastercache.compile(pipe)`."""

from fastercache.api import compile, disabled, release, restore, run, summary, warmup
from fastercache.cache.formats import register as register_cache_format
from fastercache.cache.ring import CacheFormat, Ring, RingSpec
from fastercache.calibration.calibrate import calibrate
from fastercache.errors import (
    CacheError,
    CalibrationError,
    CompileError,
    FasterCacheError,
    FasterCacheWarning,
    RunError,
    ScheduleError,
    UnsupportedModelError,
)
from fastercache.host.processes import parallelize
from fastercache.models.family import Family
from fastercache.models.registry import register as register_family
from fastercache.models.site import Part, Site
from fastercache.report.summary import Summary
from fastercache.schedule import policies
from fastercache.schedule.measured import Measured
from fastercache.schedule.policies import register as register_policy
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.signature import Signature
from fastercache.schedule.step import Prediction, Step

__version__ = "0.1.0"

__all__ = [
    "CacheError",
    "CacheFormat",
    "CalibrationError",
    "CompileError",
    "Family",
    "FasterCacheError",
    "FasterCacheWarning",
    "Measured",
    "Part",
    "Prediction",
    "Ring",
    "RingSpec",
    "RunError",
    "Schedule",
    "ScheduleError",
    "Signature",
    "Site",
    "Step",
    "Summary",
    "UnsupportedModelError",
    "calibrate",
    "compile",
    "disabled",
    "parallelize",
    "policies",
    "register_cache_format",
    "register_family",
    "register_policy",
    "release",
    "restore",
    "run",
    "summary",
    "warmup",
]
