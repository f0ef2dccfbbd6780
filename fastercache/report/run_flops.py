"""The operations of a run, as a result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunFlops:
    """Floating-point operations of one run of a denoiser (2 for each multiply-accumulate), without and with the
    schedule."""

    uncached: int
    cached: int

    @property
    def ratio(self) -> float:
        """Uncached over cached: the speed-up if time were proportional to operations."""
        return self.uncached / self.cached
