"""One video over several processes: the same result as one process, with less communication, and errors on all."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from pathlib import Path

import parallel_jobs as jobs
import pytest

ROOT = Path(__file__).parent.parent
LONG = "FASTERCACHE_ALL_TARGETS" in os.environ
"""Set by `python -m bench.test_all`: every model, and four processes."""

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def processes():
    """Starts processes quickly: they are forked from one that has imported everything and done nothing."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *([before] if before else [])])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parallel_jobs"])
    yield context
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def together(processes, tmp_path):
    """Does a job in `size` processes; gives for each rank how it ended ("done" or the name of an error), what it
    returned or said, and the seconds."""

    def run(job, *arguments, size=2, seconds=120):
        answers = processes.Queue()
        started = [
            processes.Process(
                target=jobs.work, args=(rank, size, str(tmp_path / "meeting"), job, arguments, answers), daemon=True
            )
            for rank in range(size)
        ]
        for process in started:
            process.start()
        found = {}
        limit = time.monotonic() + seconds
        try:
            while len(found) < size:
                rank, *answer = answers.get(timeout=max(0.1, limit - time.monotonic()))
                found[rank] = tuple(answer)
        except queue.Empty:
            pytest.fail(f"after {seconds} s only {found} had answered")
        finally:
            for process in started:
                process.join(5)
                process.kill()
        return [found[rank] for rank in range(size)]

    return run


ONE_OF_EACH_LAYOUT = ["cogvideox", "wan", "latte"]
OTHERS = sorted(set(jobs.LAYOUTS) - set(ONE_OF_EACH_LAYOUT))
SCHEDULES = {"paper": 12, jobs.HAND_MADE.name: len(jobs.HAND_MADE)}


def check_same_as_alone(answers, name):
    """A cached run differs from that of one process by rounding, as an uncached one does; each process keeps its
    part."""
    rounding = 1e-13 if jobs.dtype_of(name).itemsize == 8 else 1e-5
    for state, found, _ in answers:
        assert state == "done", found
        assert found["uncached"] < rounding and found["restored"] < rounding
        for schedule in SCHEDULES:
            difference, divided, alone = found[schedule]
            assert difference < 100 * rounding, (name, schedule)
            kept, whole = divided["share"]["kept"], divided["share"]["kept"].copy()
            shards = whole.pop("shards")
            assert divided["cache_bytes"] == divided["cache_bytes_planned"] == sum(kept.values())
            assert alone["cache_bytes"] == len(answers) * shards + sum(whole.values())
            assert shards > 0 and (whole["maps"] > 0) == (jobs.LAYOUTS[name] != "none")
            assert divided["sites"] == alone["sites"]
            share = divided["share"]
            assert share["added_by_caching"] == 0 and share["saved_by_reuse"] > 0
            assert (share["saved_by_calls_not_made"] > 0) == ("then" in jobs.LAYOUTS[name] or schedule != "paper")


@pytest.mark.parametrize("name", ONE_OF_EACH_LAYOUT + OTHERS)
def test_two_processes_give_what_one_gives(together, name):
    check_same_as_alone(together(jobs.same_as_alone, name, SCHEDULES), name)


def test_a_reused_site_exchanges_nothing_and_a_skipped_step_says_nothing(together):
    """Two for each of two attentions and one for the output; with all of them reused the output alone, as with the
    stack."""
    for state, (counts, share), _ in together(jobs.collectives_by_step, "cogvideox"):
        assert state == "done"
        begun = counts[0] - 5
        assert counts == [5 + begun, 5, 5, 1, 0, 5, 3, 1, 0] and begun > 0
        assert share["collectives"] == sum(counts) - begun and share["added_by_caching"] == 0
        assert (share["saved_by_reuse"], share["saved_by_calls_not_made"]) == (10, 10)
