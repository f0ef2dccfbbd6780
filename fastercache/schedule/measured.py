"""What a calibrated schedule was measured to do, as plain data that travels with it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fastercache.errors import ScheduleError
from fastercache.schedule.document import checked_count, checked_list, checked_number, only_known


@dataclass(frozen=True)
class Measured:
    """Of one schedule, on prompts and seeds that nothing was fitted to or chosen on. Checked on construction, by
    `ScheduleError`.

    speedup: the denoiser's milliseconds of an uncached run over those of the schedule's, as the sum of the measured
        costs of its steps.
    flops_ratio: the same of floating-point operations.
    psnr: of decoded clips against uncached ones of the same seed, in dB, the mean over pairs.
    psnr_interval: the 95 % confidence interval of that mean, `None` where there are too few pairs for one.
    psnr_least: the smallest of any pair.
    pairs: the number of pairs.
    calibration: the time that calibration took, as a multiple of that of one uncached generation.
    seconds: the same in seconds.
    """

    speedup: float
    flops_ratio: float
    psnr: float
    psnr_interval: tuple[float, float] | None
    psnr_least: float
    pairs: int
    calibration: float
    seconds: float

    def __post_init__(self) -> None:
        for name, least in (("speedup", 0), ("flops_ratio", 0), ("calibration", 0), ("seconds", 0)):
            checked_number(getattr(self, name), f"measured: {name}", least)
        for name in ("psnr", "psnr_least"):
            checked_number(getattr(self, name), f"measured: {name}")
        checked_count(self.pairs, "measured: pairs")
        if self.psnr_interval is not None:
            interval = checked_list(self.psnr_interval, "measured: psnr_interval")
            for end in interval:
                checked_number(end, "measured: psnr_interval")
            if len(interval) != 2 or interval[0] > interval[1]:
                raise ScheduleError(f"measured: psnr_interval is {list(interval)}; it must be [lower end, upper end]")
            object.__setattr__(self, "psnr_interval", interval)

    def __str__(self) -> str:
        interval = ""
        if self.psnr_interval is not None:
            interval = " [{:.1f}, {:.1f}]".format(*self.psnr_interval)
        return (
            f"{self.speedup:.2f}x faster in the denoiser ({self.flops_ratio:.2f}x fewer FLOPs), PSNR {self.psnr:.1f} "
            f"dB{interval}, at least {self.psnr_least:.1f}, on {self.pairs} held-out pairs; calibrated in "
            f"{self.seconds:.0f} s, {self.calibration:.0f} generations"
        )

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Measured:
        """Of a JSON object; `ScheduleError`, which begins with `where`, says what is missing, unknown or wrong."""
        if not isinstance(values, dict):
            raise ScheduleError(f"{where}: 'measured' is {values!r}, not an object")
        known = cls.__dataclass_fields__
        only_known(values, known, f"{where}, measured,")
        missing = [name for name in known if name not in values]
        if missing:
            raise ScheduleError(f"{where}: 'measured' lacks {missing[0]!r}")
        try:
            return cls(**values)
        except ScheduleError as error:
            raise ScheduleError(f"{where}, {error}") from error
