"""Runs that were left, several threads on one model, and states that a model must come out of again."""

from __future__ import annotations

import random
import threading
import warnings
from functools import partial

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from models import TWO_CALLS, arguments, call, cogvideox
from test_video_pipelines import wan_experts

import fastercache
from fastercache import CompileError, FasterCacheWarning, RunError, ScheduleError, policies
from fastercache.runtime import scopes
from fastercache.runtime.timesteps import Habits, Timesteps, place_of, read

STEPS = 8
TIMES = tuple(range(800, 0, -100))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def loop(model, stop=None, seed=0, times=TIMES, ready=None, first=0):
    """The predictions of a sampler's loop, ended after `stop` steps. `ready(times, i, rows)` gives the timestep as a
    sampler would."""
    outputs = []
    for i in range(len(times))[first:stop]:
        inputs = arguments(model, 4, seed)
        inputs["timestep"] = torch.full((4,), times[i]) if ready is None else ready(times, i, 4)
        inputs["hidden_states"] = inputs["hidden_states"] * (1 + 0.1 * i)
        outputs.append(model(**inputs)[0])
    return torch.stack(outputs)


def compiled(steps=STEPS):
    return fastercache.compile(cogvideox(), steps=steps, cfg="uncond-first")


def state(model):
    """What `compile` may change in a model: attributes of every module, and what stands for their forwards."""
    found = {}
    for name, module in model.named_modules():
        own = vars(module)
        found[name] = type(module), set(own), own.get("forward"), own.get("cache_context"), own.get("_old_forward")
    return found


# ---- runs that were left ---------------------------------------------------------------------------------------------

SAMPLERS = {
    "descending": (TIMES, None),
    "ascending": (TIMES[::-1], None),
    "floats": (TIMES, lambda times, i, rows: torch.full((rows,), times[i] / 1000, dtype=torch.bfloat16)),
    "elements of one table": (torch.tensor(TIMES), lambda times, i, rows: times[i].expand(rows)),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("calls", [2, 7])
def test_a_left_run_is_not_continued_by_the_next_video(sampler, calls):
    times, ready = SAMPLERS[sampler]
    fresh = loop(compiled(), times=times, ready=ready)
    model = compiled()
    loop(model, calls, seed=1, times=times, ready=ready)
    with pytest.warns(FasterCacheWarning, match=f"left after {calls} of 8 steps: the timestep went back"):
        assert torch.equal(loop(model, times=times, ready=ready), fresh)
    assert torch.equal(loop(model, times=times, ready=ready), fresh)


def test_a_run_left_after_its_first_step_is_known_once_the_loops_are():
    model = compiled()
    fresh = loop(model)
    loop(model, 1, seed=1)
    with pytest.warns(FasterCacheWarning, match="left after 1 of 8 steps: the timestep went back or began again"):
        assert torch.equal(loop(model), fresh)


@pytest.mark.parametrize("extra", [1, 2])
def test_a_loop_longer_than_a_run_does_not_shift_the_next(extra):
    fresh = loop(compiled())
    model = compiled()
    loop(model, seed=1, times=tuple(range(100 * (STEPS + extra), 0, -100)))
    with pytest.warns(
        FasterCacheWarning, match=rf"left after {extra} of 8 steps.*compile CogVideoX\w+ with the number of steps"
    ):
        assert torch.equal(loop(model), fresh)


def test_samplers_that_repeat_a_timestep_or_turn_are_not_interrupted():
    """Heun's second calls; timesteps that stay the same; and inversion, whose timesteps rise, before sampling."""
    heun = tuple(time for time in range(500, 0, -100) for _ in range(2))[1:-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FasterCacheWarning)
        for times in (heun, (500,) * STEPS):
            model = compiled()
            for _ in range(2):
                loop(model, times=times)
                assert fastercache.summary(model).steps_done == STEPS
    fresh = loop(compiled())
    model = compiled()
    loop(model, times=TIMES[::-1])
    with pytest.warns(FasterCacheWarning, match="left after 1 of 8 steps"):
        loop(model)
    with pytest.warns(FasterCacheWarning, match="left after 7 of 8 steps"):
        assert torch.equal(loop(model), fresh)
    assert torch.equal(loop(model), fresh)


def test_a_sampler_that_calls_twice_at_its_first_timestep_is_interrupted_once():
    model = compiled()
    loop(model)
    twice = tuple(time for time in (400, 300, 200, 100) for _ in range(2))
    with pytest.warns(FasterCacheWarning, match="began again"):
        loop(model, times=twice)
    with pytest.warns(FasterCacheWarning, match="left after 7 of 8 steps"):
        loop(model, times=twice)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FasterCacheWarning)
        loop(model, times=twice)


def test_two_calls_a_step_begin_anew_too():
    def sample(model, steps=STEPS, seed=0, odd=False):
        outputs = []
        for i in range(steps):
            latents = call(model, 1, seed)["hidden_states"] * (1 + i)
            shared = {"timestep": torch.full((1,), float(TIMES[i]), dtype=torch.float64), "hidden_states": latents}
            for text in (1, 2)[: 1 if odd and i == steps - 1 else 2]:
                outputs.append(model(**call(model, 1, seed + text) | shared)[0])
        return outputs

    def build():
        return fastercache.compile(TWO_CALLS["wan"](), steps=STEPS, cfg="cond-then-uncond")

    fresh = sample(build())
    for odd in (False, True):
        model = build()
        sample(model, 3, seed=5, odd=odd)
        with pytest.warns(FasterCacheWarning, match="the timestep went back"):
            again = sample(model)
        assert all(map(torch.equal, again, fresh))


def test_a_run_that_goes_on_after_a_long_pause_says_so(monkeypatch):
    model = compiled()
    loop(model, 3)
    now = scopes.time.monotonic()
    monkeypatch.setattr(scopes.time, "monotonic", lambda: now + 100.0)
    with pytest.warns(
        FasterCacheWarning, match=r"goes on at step 4 of 8, 100 s after its last call.*fastercache.release"
    ):
        loop(model, 1, times=TIMES[3:])


def test_a_scope_says_that_it_ends_a_left_run():
    model = compiled()
    fresh = loop(model)
    loop(model, 3, seed=1)
    with pytest.warns(FasterCacheWarning, match="left after 3 of 8 steps: a run in a scope begins"):  # noqa: SIM117
        with fastercache.run(model, steps=STEPS, cfg="uncond-first"):
            assert torch.equal(loop(model), fresh)


def test_timesteps_on_a_device_are_told_by_their_place_in_a_table():
    """There they are not read, as the host would wait."""

    assert read(torch.empty(4, device="meta")).value is None
    table, other = torch.arange(8), torch.arange(8)
    run = Timesteps(Habits())
    for i in range(4):
        now = place_of(table[i].expand(4))
        assert not run.goes_back(now, i, False)
        run.follow(now, i)
    for again, back in (
        (table[0], True),
        (table[4], False),
        (other[0], True),
        (other[5], False),
        (torch.tensor(0), False),
    ):
        assert run.goes_back(place_of(again.expand(4)), 4, False) is back


def test_the_short_way_of_following_timesteps_says_what_the_long_one_does():
    """`takes` looks at most calls less closely than `goes_back` and `follow`."""
    choice = random.Random(0)
    for _ in range(300):
        ways = ["value"] if choice.random() < 0.5 else []
        habits = [Habits({"value": -1}, set(ways)) for _ in range(2)]
        short, long = map(Timesteps, habits)
        for i in range(6):
            value = choice.choice((5.0, 4.0, 3.0, 2.0, float("nan")))
            between = choice.random() < 0.2
            now = choice.choice((read(value), read(torch.full((2,), value)), read(None)))
            taken = not long.goes_back(now, i, between)
            assert short.takes(now, i, between) is taken
            if not taken:
                break
            long.follow(now, i)
        for one in (short, long):
            one.finish(6)
        assert habits[0] == habits[1]


# ---- threads ---------------------------------------------------------------------------------------------------------


def in_thread(function):
    """What a function gives, or the error it raises, in another thread."""
    result = []

    def work():
        try:
            with torch.no_grad():
                result.append(function())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return result[0]


class Elsewhere:
    """A thread that lives as long as this, and does what it is given."""

    def __enter__(self):
        self.go, self.done, self.work = threading.Semaphore(0), threading.Semaphore(0), None
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.work = None
        self.go.release()
        self.thread.join()

    def _serve(self):
        while self.go.acquire() and self.work is not None:
            try:
                with torch.no_grad():
                    self.result = self.work()
            except Exception as error:
                self.result = error
            self.done.release()

    def __call__(self, work):
        self.work = work
        self.go.release()
        self.done.acquire()
        return self.result


def test_two_threads_do_not_share_a_run():
    model = compiled()
    fresh = loop(model)
    with Elsewhere() as elsewhere:
        elsewhere(partial(loop, model, 1))
        with pytest.raises(RunError, match="in a run of another thread, which has made 1 of 8 steps"):
            loop(model)
        assert torch.equal(torch.cat([fresh[:1], elsewhere(partial(loop, model, first=1))]), fresh)
        elsewhere(partial(loop, model, 1))
        assert isinstance(in_thread(partial(loop, model)), RunError)
        with pytest.raises(RunError, match="another thread"), fastercache.run(model, steps=STEPS, cfg="uncond-first"):
            pass
        fastercache.release(model)
        assert torch.equal(loop(model), fresh)


def test_a_run_survives_a_refused_thread():
    model = compiled()
    fresh = loop(model)
    seen = []

    def intrude(*_):
        if not seen:
            seen.append(in_thread(partial(loop, model)))

    handle = model.transformer_blocks[1].register_forward_pre_hook(intrude)
    assert torch.equal(loop(model), fresh) and isinstance(seen[0], RunError)
    handle.remove()


def test_a_run_left_by_a_thread_that_ended_is_given_up():
    model = compiled()
    fresh = loop(model)
    in_thread(partial(loop, model, 3, seed=1))
    with pytest.warns(FasterCacheWarning, match="left after 3 of 8 steps: its thread has ended"):
        assert torch.equal(loop(model), fresh)


def test_disabled_is_about_its_own_thread_only():
    """Runs of others are cached, even where an uncached call is made in the middle of one of their steps."""
    plain = loop(cogvideox())
    model = compiled()
    fresh = loop(model)
    assert not torch.equal(plain, fresh)
    with fastercache.disabled(model):
        assert torch.equal(loop(model), plain)
        assert torch.equal(in_thread(partial(loop, model)), fresh)
        with fastercache.disabled(model):
            pass
        assert torch.equal(loop(model), plain)
    uncached, lock = [], threading.Lock()

    def meanwhile(*_):
        if lock.acquire(blocking=False):  # not in the calls that it makes itself
            try:
                uncached.append(in_thread(without_cache))
            finally:
                lock.release()

    def without_cache():
        with fastercache.disabled(model):
            return loop(model)

    handle = model.transformer_blocks[1].register_forward_pre_hook(meanwhile)
    assert torch.equal(loop(model), fresh)
    handle.remove()
    assert uncached and all(torch.equal(one, plain) for one in uncached)


# ---- states that a model must come out of ----------------------------------------------------------------------------


def no_schedule(steps, guidance):
    return None


def interrupted(steps, guidance):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("policy", "error"),
    [
        (partial(policies.paper, start=0), ScheduleError),
        (partial(policies.paper, reuse_interval=0), ScheduleError),
        (no_schedule, ScheduleError),
        (interrupted, KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("options", [{}, {"backend": "eager", "regional": True}])
def test_a_compile_that_fails_leaves_nothing(policy, error, options):
    model = cogvideox()
    before = state(model)
    for _ in range(3):
        with pytest.raises(error):
            fastercache.compile(model, policy, steps=STEPS, cfg="uncond-first", **options)
        assert state(model) == before


def test_a_policy_that_gives_no_schedule_is_named():
    with pytest.raises(ScheduleError, match="policy no_schedule returned a NoneType for 120 steps; it must return a"):
        fastercache.compile(cogvideox(), no_schedule)


def test_an_own_cache_context_is_given_back():
    model = cogvideox()
    own = model.cache_context = model.cache_context
    fastercache.restore(fastercache.compile(model))
    assert vars(model)["cache_context"] is own


@pytest.mark.parametrize("backend", [None, "eager"])
def test_inference_mode_leaves_nothing_that_other_modes_cannot_use(backend):
    torch._dynamo.reset()
    model = fastercache.compile(cogvideox(), steps=STEPS, cfg="uncond-first", backend=backend)
    with torch.inference_mode():
        fresh = loop(model)
    torch.testing.assert_close(loop(model), fresh)
    with torch.inference_mode():
        first = loop(model, 4)
    outputs = [model(**arguments(model, 4) | {"timestep": torch.full((4,), time)})[0] for time in TIMES[4:]]
    assert len(first) + len(outputs) == fastercache.summary(model).steps_done == STEPS


def pipeline():
    pipe = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=cogvideox(torch.float32),
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn((2, 5, 12), generator=generator)
    return pipe(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:],
        generator=generator,
        num_inference_steps=STEPS,
        guidance_scale=6.0,
        height=80,
        width=48,
        num_frames=9,
        output_type="latent",
    ).frames


def parts_of(pipe):
    return {"pipe": pipe, "transformer": pipe.transformer, "sibling": CogVideoXPipeline.from_pipe(pipe)}


@pytest.mark.parametrize("compiled_first", ["pipe", "transformer", "sibling"])
@pytest.mark.parametrize("restored", ["pipe", "transformer", "sibling", "relative"])
def test_whatever_was_compiled_any_of_its_holders_restores_it(compiled_first, restored):
    pipe = pipeline()
    parts, plain = parts_of(pipe), sample(pipe)
    before, attributes = state(pipe.transformer), set(vars(pipe))
    options = {"steps": STEPS, "cfg": "uncond-first"} if compiled_first == "transformer" else {}
    fastercache.compile(parts[compiled_first], **options)
    parts["relative"] = type(pipe).from_pipe(pipe)  # of the class that the compiled pipeline has now
    fastercache.restore(parts[restored])
    assert state(pipe.transformer) == before and set(vars(pipe)) == attributes
    assert type(pipe) is CogVideoXPipeline is type(parts["sibling"])
    for one in ("pipe", "sibling", "relative"):
        assert torch.equal(sample(parts[one]), plain)
    fastercache.compile(pipe)
    assert not torch.equal(sample(pipe), plain)
    with pytest.raises(CompileError, match="compiled by fastercache already"):
        fastercache.compile(parts["relative"])


@pytest.mark.parametrize("restored", ["pipe", "old"])
def test_a_pipeline_whose_denoiser_was_replaced_is_restored(restored):
    pipe = pipeline()
    plain, old = sample(pipe), pipe.transformer
    before = state(old)
    fastercache.compile(pipe)
    pipe.transformer = cogvideox(torch.float32)
    with pytest.raises(CompileError, match="transformer was replaced after"):
        sample(pipe)
    with pytest.raises(CompileError, match=r"compiled by fastercache already; call fastercache\.restore"):
        fastercache.compile(pipe)
    fastercache.restore(pipe if restored == "pipe" else old)
    assert type(pipe) is CogVideoXPipeline and state(old) == before
    assert torch.equal(sample(pipe), plain)
    fastercache.compile(pipe)
    assert not torch.equal(sample(pipe), plain)


def test_one_of_two_experts_restored_alone():
    pipe = wan_experts(1)[0]
    cls = type(pipe)
    fastercache.compile(pipe)
    fastercache.restore(pipe.transformer)
    assert type(pipe) is not cls and fastercache.summary(pipe).steps == 0
    fastercache.restore(pipe)
    assert type(pipe) is cls


def test_a_restore_that_is_refused_restores_nothing():
    pipe = wan_experts(1)[0]
    fastercache.compile(pipe)
    before = state(pipe.transformer), state(pipe.transformer_2)
    with fastercache.run(pipe.transformer_2, steps=2, cfg="none"):
        with pytest.raises(RunError, match="restore the model after it has ended"):
            fastercache.restore(pipe)
        assert (state(pipe.transformer), state(pipe.transformer_2)) == before
        pipe.transformer_2(**call(pipe.transformer_2, 1))
    fastercache.restore(pipe)
