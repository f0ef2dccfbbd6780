"""One video over several processes: the same result as one process, with less communication, and errors on all."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import queue
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import parallel_jobs as jobs
import pytest
from models import wan
from typer.testing import CliRunner

import fastercache
from bench import parallel_cost
from fastercache import CompileError, cli, policies
from fastercache.report.summary import Kept, Share, combined_share
from fastercache.schedule.plan import make_plan

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
    meetings = itertools.count()

    def run(job, *arguments, size=2, seconds=60, answering=None):
        answers, meeting = processes.Queue(), tmp_path / str(next(meetings))
        started = [
            processes.Process(target=jobs.work, args=(rank, size, str(meeting), job, arguments, answers), daemon=True)
            for rank in range(size)
        ]
        for process in started:
            process.start()
        found, answering = {}, answering or range(size)
        limit = time.monotonic() + seconds
        try:
            while len(found) < len(answering):
                rank, *answer = answers.get(timeout=max(0.1, limit - time.monotonic()))
                found[rank] = tuple(answer)
        except queue.Empty:
            pytest.fail(f"after {seconds} s only {found} had answered")
        finally:
            for process in started:
                process.join(5)
                process.kill()
        return [found[rank] for rank in answering]

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


@pytest.mark.parametrize(("name", "frames"), [("latte", 3), ("stdit3", 5)])
def test_frames_and_patches_that_do_not_divide_are_filled_up(together, name, frames):
    """Latents of 6 x 6 are 9 patches a frame."""
    for state, (difference, kept), _ in together(jobs.filled_up, name, frames):
        assert state == "done" and difference < (1e-4 if name == "stdit3" else 1e-12)
        assert kept["shards"] > 0 and kept["text"] == 0


def test_collectives_of_another_model_are_not_taken_for_added_ones(together):
    """But those that come between a model's calls, or after its last, are."""
    for state, shares, _ in together(jobs.two_experts):
        assert state == "done", shares
        assert [share["collectives"] for share in shares[:2]] == [6 * 9 - shares[0]["saved_by_reuse"]] * 2
        assert [share["added_by_caching"] for share in shares] == [0, 0, 2]


def test_two_experts_of_a_run_are_summed_up_together():
    one = Share(2, 0, 10, 3, 2, 0, Kept(100, 5, 7))
    both = combined_share([one, replace(one, collectives=4, kept=Kept(200, 1))])
    assert both == Share(2, 0, 14, 6, 4, 0, Kept(200, 1)) and combined_share([]) is None


# ---- what is agreed on -----------------------------------------------------------------------------------------------

SAME_NAME = tuple(replace(policy(12, True), name="mine") for policy in (policies.paper, policies.plain))


@pytest.mark.parametrize(
    ("each", "error"),
    [
        (({}, {"schedule": "plain"}), "schedule is 'paper' on process 0 and 'plain' on process 1"),
        (({"schedule": SAME_NAME[0]}, {"schedule": SAME_NAME[1]}), "content of the schedule.*first at step"),
        (({}, {"steps": 13}), "number of steps is 12 on process 0 and 13 on process 1"),
        (({}, {"cache_format": "int8"}), "cache_format is None on process 0 and 'int8' on process 1"),
        (({}, {"seed": 2}), "latents of process 1 are not those of process 0"),
    ],
)
def test_processes_that_would_run_something_else_all_raise(together, each, error):
    for state, said, seconds in together(jobs.wan_with_options, each):
        assert state == "ScheduleError" and re.search(error, said), said
        assert seconds < 30


def test_what_keeps_one_process_from_beginning_is_raised_by_all(together):
    each = {}, {"schedule": policies.paper(9, True)}
    (first, told, _), (second, own, _) = together(jobs.wan_with_options, each)
    assert (first, second) == ("OtherProcessError", "ScheduleError")
    assert (
        "has 9 steps, but this run has 12" in own and f"process 1 of 2 could not begin the run: {second}: {own}" == told
    )


def test_the_least_memory_decides_the_format_for_all(together):
    """Only the second process has too little for the model's dtype."""
    plenty = {"memory": 10**9}
    (_, found, _), _ = together(jobs.wan_with_options, (plenty, plenty))
    assert found["cache_format"] == "model"
    answers = together(jobs.wan_with_options, (plenty, {"memory": found["cache_bytes"] - 1}))
    assert [found["cache_format"] for _, found, _ in answers] == ["int8", "int8"]
    assert ["on process 1, which has the least" in str(found["notes"]) for _, found, _ in answers] == [True, False]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "arguments", "error", "message"),
    [
        (jobs.of_another_size, ("cogvideox", 2, 3, 2, 6, 6), "RunError", "27 video tokens do not divide among 2"),
        (jobs.of_another_size, ("latte", 2, 2, 2, 8, 8), "RunError", "1 for each of 2 processes, and Latte.* needs 2"),
        (jobs.divided, ("mochi", "ulysses", 3), "UnsupportedModelError", "3 attention heads .* do not divide among 2"),
        (jobs.divided, ("allegro",), "UnsupportedModelError", "no plan by which a call of AllegroTransformer3DModel"),
        (jobs.divided, ("wan", "ring"), "CompileError", "'ring' needs attention kernels.*use 'ulysses'"),
        (jobs.divided, ("mochi", "ring"), "UnsupportedModelError", "diffusers has no plan for MochiTransformer3DModel"),
        (jobs.divided, ("wan", "tokens"), "CompileError", "kind 'tokens'; choose 'ulysses' or 'ring'"),
        (jobs.divided_again, (), "CompileError", "divided between processes already"),
        (jobs.compiled_then_divided, (), "CompileError", "compiled by fastercache already; divide it"),
        (
            jobs.compiled,
            ("wan", False),
            "CompileError",
            "cannot be traced in a graph of the whole model; pass regional",
        ),
        (jobs.divided_by_diffusers, (True,), "UnsupportedModelError", "a plan that fastercache does not know"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_every_process(together, job, arguments, error, message):
    for state, said, seconds in together(job, *arguments):
        assert state == error and re.search(message, said), (state, said)
        assert seconds < 30


def test_wan_may_be_divided_by_diffusers_own_method(together):
    """Its plan for the class splits arguments of the model, too; a run sees them whole, and `restore` puts that
    back."""
    for state, found, _ in together(jobs.divided_by_diffusers, False):
        assert state == "done", found
        assert found["difference"] < 1e-13 and found["share"]["saved_by_reuse"] > 0


def test_without_a_launcher_it_says_how_to_start(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CompileError, match=r"RANK, WORLD_SIZE.*torchrun --nproc-per-node 2"):
        fastercache.parallelize(wan())
    result = CliRunner().invoke(cli.app, ["sample", "shapes", "--prompt", "x", "--context-parallel", "ulysses"])
    assert result.exit_code == 2 and "torchrun --nproc-per-node 2" in result.stderr


def test_one_process_alone_has_nobody_to_divide_with(together):
    ((state, said, _),) = together(jobs.divided, "wan", size=1)
    assert state == "CompileError" and "start at least two" in said


# ---- the command line ------------------------------------------------------------------------------------------------

SAMPLE = ["sample", "shapes", "--prompt", "a red circle moving right", "--steps", "6"]


def test_the_command_writes_the_video_of_one_process_once(together, tmp_path):
    expected = tmp_path / "alone.gif"
    assert CliRunner().invoke(cli.app, [*SAMPLE, "--out", str(expected)]).exit_code == 0
    arguments = [*SAMPLE, "--context-parallel", "ulysses"]
    (first, (code, out, _), _), (second, (other, silence, _), _) = together(jobs.command, arguments, str(tmp_path))
    assert (first, code, second, other) == ("done", 0, "done", 0)
    made, saved = map(int, re.search(r"collectives: (\d+) made, (\d+) saved by reuse and 0 by", out).groups())
    assert made + saved == 6 * 9 and saved > 0 and silence == ""
    assert (tmp_path / "0.gif").read_bytes() == expected.read_bytes() and not (tmp_path / "1.gif").exists()


def test_the_command_says_on_every_process_what_is_wrong(together, tmp_path):
    for state, (code, _, error), _ in together(jobs.command, [*SAMPLE, "--context-parallel", "ring"], str(tmp_path)):
        assert (state, code) == ("done", 2) and "'ring' is its own; use 'ulysses'" in error


# ---- processes that end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["raises", "killed"])
def test_a_process_that_ends_ends_the_others(together, how):
    """Without a launcher, which would kill them at once: a collective with one that is gone fails."""
    answers = together(jobs.lost, how, answering=(0, 1) if how == "raises" else (0,), seconds=30)
    assert answers[0][0] == "RuntimeError" and answers[0][2] < 30, answers
    if how == "raises":
        assert answers[1][:2] == ("ValueError", "something of this process alone")


# ---- on paper --------------------------------------------------------------------------------------------------------


def test_the_cost_model_is_the_one_that_is_printed():
    text = (ROOT / "docs/parallel.md").read_text()
    tables = parallel_cost.tables()
    assert len(tables) == 2 and all(part in text for part in (*tables.values(), parallel_cost.assumptions()))


def test_the_cost_model_counts_a_cached_step_as_the_plan_has_it():
    """With free memory and links a schedule gains what it saves in operations, and several GPUs their number."""
    free = parallel_cost.Machine(memory=1e30, inside=1e30, between=1e30, latency=0)
    case = parallel_cost.wan()
    uncached, cached = (
        make_plan(policy(50, True), True, case.system.tree) for policy in (policies.none, policies.paper)
    )
    alone = parallel_cost.seconds(case, uncached, 1, free)[0]
    ratio = case.system.uncached_macs(cached) / case.system.cached_macs(cached)
    assert alone / parallel_cost.seconds(case, cached, 1, free)[0] == pytest.approx(ratio)
    assert alone / parallel_cost.seconds(case, uncached, 8, free)[0] == pytest.approx(8)
    assert alone == pytest.approx(2 * 2 * case.system.macs / (free.flops * free.efficiency))


# ---- longer: `make test-all` -----------------------------------------------------------------------------------------

long = pytest.mark.skipif(not LONG, reason="python -m bench.test_all")


@long
@pytest.mark.parametrize("name", ONE_OF_EACH_LAYOUT + OTHERS)
def test_four_processes_give_what_one_gives(together, name):
    check_same_as_alone(together(jobs.same_as_alone, name, SCHEDULES, size=4), name)


@long
@pytest.mark.parametrize("name", ["cogvideox", "wan", "stdit3"])
def test_compiled_blocks_give_the_same(together, name):
    for state, found, _ in together(jobs.compiled, name, True, seconds=300):
        assert state == "done" and found["difference"] < 1e-5 and "graphs by aot_eager" in found["compiled"], found


@long
def test_an_embedded_pipeline_with_the_schedule_it_carries(together):
    for state, (divided, plain, summary), _ in together(jobs.carried, seconds=300):
        assert state == "done"
        assert divided <= 10 * plain < 1e-3
        share = summary["share"]
        assert summary["schedule"].startswith("calibrated-") and share["processes"] == 2 and share["collectives"] > 0
        assert share["saved_by_calls_not_made"] > share["collectives"] and share["added_by_caching"] == 0


@long
@pytest.mark.parametrize("name", ["cogvideox", "wan"])
@pytest.mark.parametrize("cache_format", ["int8", "int8-int4"])
def test_a_format_loses_as_much_on_two_processes(together, name, cache_format):
    for state, (alone, divided), _ in together(jobs.in_less_than_lossless, name, cache_format):
        assert state == "done" and 0 < divided < 1.5 * alone


@long
@pytest.mark.parametrize("name", ["cogvideox", "wan"])
def test_in_bfloat16_caching_adds_no_difference_to_that_of_dividing(together, name):
    for state, (uncached, scheduled), _ in together(jobs.in_bfloat16, name):
        assert state == "done" and scheduled <= 3 * uncached


@long
def test_a_branch_for_each_group_of_processes_is_refused_where_one_would_wait(together):
    for state, said, _ in together(jobs.branches_apart, "paper", size=4):
        assert state == "ScheduleError" and "one group would have nothing to do" in said
    assert [answer[0] for answer in together(jobs.branches_apart, "dynamic-only", size=4)] == ["done"] * 4


@long
@pytest.mark.parametrize("how", ["raises", "killed"])
def test_a_launched_job_ends_with_the_error_of_a_process(how):
    """Within 30 s of the error: the job's time less that to the fifth step, which a job that ends well needs, too."""
    source = f"import parallel_jobs; parallel_jobs.launched({how!r})"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run(
        [*command, "-c", source],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    ended = time.time()
    failed = float(re.search(r"process 1 ends at ([\d.]+)", run.stdout)[1])
    assert run.returncode != 0 and ended - failed < 30, run.stderr
    assert ("something of this process alone" if how == "raises" else "SIGKILL") in run.stderr


@long
def test_arguments_that_diffusers_splits_outside_of_the_model_reach_a_run_whole(together):
    for state, found, _ in together(jobs.a_time_for_each_token):
        assert state == "done", found
        assert found[0] < 1e-12 and found[1] == found[2]


@long
def test_operations_are_those_of_all_processes(together):
    for state, (alone, divided), _ in together(jobs.flops, "wan"):
        assert state == "done" and divided == alone
