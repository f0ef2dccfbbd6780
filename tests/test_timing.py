"""The benchmark's clock, on a GPU that is played here."""

import pytest
import torch

from bench import timing


class Event:
    """Records `now`; has passed where the sleep before it was shorter than what the host took."""

    asleep_for, host_takes = 0, 0

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def query(self):
        return Event.asleep_for < Event.host_takes

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 3.0


@pytest.fixture
def gpu(monkeypatch):
    slept = []

    def sleep(cycles):
        slept.append(cycles)
        Event.asleep_for = cycles

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    return slept


def test_a_round_that_the_host_queued_too_late_is_queued_again_behind_a_longer_sleep(gpu):
    Event.host_takes = 3 * timing.SLEEP_CYCLES
    assert timing.round_us([lambda: None] * 3, "cuda") == 1e3
    assert gpu == [timing.SLEEP_CYCLES, 4 * timing.SLEEP_CYCLES]


def test_a_host_that_is_never_ahead_is_not_timed(gpu):
    Event.host_takes = 2 * timing.LONGEST_SLEEP
    with pytest.raises(RuntimeError, match="what would be timed is the host"):
        timing.round_us([lambda: None], "cuda")
