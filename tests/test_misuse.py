"""Any sequence of what users do to a model and its pipeline: it is either compiled and right, or exactly as it was.

FASTERCACHE_MISUSE_EXAMPLES=300 tries as many sequences, new ones each time; without it, few and always the same.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from models import arguments, cogvideox
from simulator import Simulator

import fastercache
from fastercache import CompileError, RunError, ScheduleError, policies

EXAMPLES = os.environ.get("FASTERCACHE_MISUSE_EXAMPLES")
STEPS = 5
ORDER = "uncond-first"


class Boom(Exception):
    pass


def late(steps, guidance):
    """A policy that serves only long runs, as those that `compile` looks at."""
    if steps < 100:
        raise Boom
    return policies.paper(steps, guidance)


def nothing(steps, guidance):
    return None


POLICIES = {
    "paper": partial(policies.paper, start=2),
    "dynamic": policies.dynamic_only,
    "none": policies.none,
    "late": late,
}
BAD_POLICIES = {
    partial(policies.paper, start=0): ScheduleError,
    nothing: ScheduleError,
    late.__get__(10): ScheduleError,
}


class Pipeline:
    """What fastercache asks of one: components, the state of guidance, and a call that samples."""

    do_classifier_free_guidance = True

    def __init__(self, transformer):
        self.transformer = transformer

    @property
    def components(self):
        return {"transformer": self.transformer}

    @property
    def num_timesteps(self):
        return self._num_timesteps

    def __call__(self, seed):
        self._num_timesteps = STEPS
        return sample(lambda inputs: self.transformer(**inputs)[0], self.transformer, seed)


def build(number):
    return cogvideox(seed=number, layers=1)


def sample(predict, model, seed, stop=STEPS):
    """A closed loop, whose timesteps fall; the predictions of its steps."""
    inputs, outputs = arguments(model, 2, seed), []
    for i in range(stop):
        outputs.append(predict(inputs | {"timestep": torch.full((2,), 900 - 100 * i)}))
        inputs = inputs | {"hidden_states": inputs["hidden_states"] - 0.1 * outputs[-1]}
    return torch.stack(outputs)


@cache
def expected(number, policy, seed):
    """By the simulator; by the untouched model for `None`."""
    model = build(number)
    if policy is None:
        return sample(lambda inputs: model(**inputs)[0], model, seed)
    return sample(Simulator(model, POLICIES[policy](STEPS, True), ORDER), model, seed)


def state(model):
    """Of every module: its class, what it has, and what stands for its methods."""
    found = {}
    for name, module in model.named_modules():
        own = vars(module)
        found[name] = type(module), set(own), own.get("forward"), own.get("cache_context")
    return found


def elsewhere(function):
    """In another thread, which then ends."""
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
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


@contextmanager
def failing(model, call):
    """The model raises in that call of it."""
    count = 0

    def hook(*_):
        nonlocal count
        count += 1
        if count == call:
            raise Boom

    handle = model.transformer_blocks[0].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Compiled:
    """What a model should be: its policy, whether it has steps=, whether this thread has left a run of it, and a run
    was finished."""

    policy: str
    steps: bool
    left: bool = False
    finished: bool = False


MODELS = st.integers(0, 1)
SEEDS = st.integers(0, 1)
THREADS = st.sampled_from(["here", "there"])
MODES = st.sampled_from([torch.no_grad, torch.inference_mode])


class Misuse(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.models = [build(0), build(1)]
        self.before = [state(model) for model in self.models]
        self.pipe = Pipeline(self.models[0])
        self.compiled = [None, None]
        self.attached = None

    # ---- what is to come of a loop ----

    def check_loop(self, number, seed, run, mode, thread):
        """`run()` makes a whole loop of the model, outside any scope."""
        now = self.compiled[number]
        act = partial(self.in_mode, mode, run)
        go = act if thread == "here" else partial(elsewhere, act)
        if now is None or not now.steps:
            assert torch.equal(go(), expected(number, None, seed))
        elif thread == "there" and now.left:
            with pytest.raises(RunError, match="in a run of another thread, which has made"):
                go()
        elif now.policy == "late":
            with pytest.raises(Boom):
                go()
        else:
            torch.testing.assert_close(go(), expected(number, now.policy, seed), rtol=1e-9, atol=1e-10)
            now.left, now.finished = False, True

    @staticmethod
    def in_mode(mode, run):
        with mode():
            output = run()
        return output.clone()

    def loop(self, number, seed, stop=STEPS):
        model = self.models[number]
        return sample(lambda inputs: model(**inputs)[0], model, seed, stop)

    # ---- compile, restore, replace ----

    @rule(number=MODELS, policy=st.sampled_from(list(POLICIES)), steps=st.booleans())
    def compile(self, number, policy, steps):
        options = {"steps": STEPS, "cfg": ORDER} if steps else {}
        if self.compiled[number] is None:
            fastercache.compile(self.models[number], POLICIES[policy], **options)
            self.compiled[number] = Compiled(policy, steps)
        else:
            with pytest.raises(CompileError, match="already"):
                fastercache.compile(self.models[number], POLICIES[policy], **options)

    @rule(policy=st.sampled_from(list(POLICIES)))
    def compile_pipeline(self, policy):
        number = self.models.index(self.pipe.transformer)
        if self.attached is None and self.compiled[number] is None:
            fastercache.compile(self.pipe, POLICIES[policy])
            self.compiled[number], self.attached = Compiled(policy, False), number
        else:
            with pytest.raises(CompileError, match="already"):
                fastercache.compile(self.pipe, POLICIES[policy])

    @rule(policy=st.sampled_from(list(BAD_POLICIES)), which=st.sampled_from(["pipe", 0, 1]))
    def compile_badly(self, policy, which):
        if which == "pipe":
            idle, thing = (
                self.attached is None and self.compiled[self.models.index(self.pipe.transformer)] is None,
                self.pipe,
            )
        else:
            idle, thing = self.compiled[which] is None, self.models[which]
        wrong = BAD_POLICIES[policy]
        with pytest.raises(wrong if idle else (CompileError, wrong)):  # a policy is looked at before the model
            fastercache.compile(thing, policy)

    @rule(which=st.sampled_from(["pipe", 0, 1]))
    def restore(self, which):
        numbers, thing = [which], None
        if which == "pipe":
            numbers, thing = {self.models.index(self.pipe.transformer), self.attached} - {None}, self.pipe
        else:
            thing = self.models[which]
        numbers = [number for number in numbers if self.compiled[number] is not None]
        if not numbers:
            with pytest.raises(CompileError, match="not compiled"):
                fastercache.restore(thing)
            return
        assert fastercache.restore(thing) is thing
        for number in numbers:
            self.compiled[number] = None
            self.attached = None if self.attached == number else self.attached

    @rule(number=MODELS)
    def replace(self, number):
        self.pipe.transformer = self.models[number]

    @rule(number=MODELS)
    def release(self, number):
        if self.compiled[number] is not None:
            fastercache.release(self.models[number])
            self.compiled[number].left = False

    # ---- runs ----

    @rule(number=MODELS, seed=SEEDS, mode=MODES, thread=THREADS)
    def run_loop(self, number, seed, mode, thread):
        self.check_loop(number, seed, partial(self.loop, number, seed), mode, thread)

    @rule(number=MODELS, seed=SEEDS, stop=st.integers(1, STEPS - 1), mode=MODES, thread=THREADS)
    def leave_loop(self, number, seed, stop, mode, thread):
        now = self.compiled[number]
        if now is not None and now.steps and (now.policy == "late" or (thread == "there" and now.left)):
            return
        # Left at its first step, before any was finished, a run cannot be told from the next
        # (`fastercache.runtime.timesteps`).
        if now is not None and not now.finished:
            stop = max(stop, 2)
        act = partial(self.in_mode, mode, partial(self.loop, number, seed, stop))
        output = act() if thread == "here" else elsewhere(act)
        if now is None or not now.steps:
            assert torch.equal(output, expected(number, None, seed)[:stop])
        else:
            torch.testing.assert_close(output, expected(number, now.policy, seed)[:stop], rtol=1e-9, atol=1e-10)
            now.left = thread == "here"

    @rule(number=MODELS, seed=SEEDS, call=st.integers(1, STEPS - 1), scope=st.booleans())
    def fail_in_a_loop(self, number, seed, call, scope):
        now = self.compiled[number]
        if scope and now is None:
            return
        around = fastercache.run(self.models[number], steps=STEPS, cfg=ORDER) if scope else nullcontext()
        with pytest.raises(Boom), torch.no_grad(), failing(self.models[number], call), around:
            self.loop(number, seed)
        if now is not None and (scope or now.steps):
            now.left = False

    @rule(number=MODELS, seed=SEEDS, mode=MODES, stop=st.integers(0, STEPS))
    def run_in_a_scope(self, number, seed, mode, stop):
        model, now = self.models[number], self.compiled[number]
        if now is None:
            with pytest.raises(CompileError, match="not compiled"), fastercache.run(model, steps=STEPS, cfg=ORDER):
                pass
            return
        now.left = False
        if now.policy == "late":
            with pytest.raises(Boom), mode(), fastercache.run(model, steps=STEPS, cfg=ORDER):
                self.loop(number, seed)
            return
        with mode(), fastercache.run(model, steps=STEPS, cfg=ORDER):
            with pytest.raises(RunError, match="under way in this thread"), fastercache.run(model, steps=2, cfg="none"):
                pass
            with pytest.raises(RunError, match="a run is under way"):
                fastercache.restore(model)
            output = self.loop(number, seed, max(stop, 1))
            with pytest.raises(RunError, match="in a run of another thread"):
                elsewhere(partial(self.loop, number, seed, 1))
        torch.testing.assert_close(
            output.clone(), expected(number, now.policy, seed)[: max(stop, 1)], rtol=1e-9, atol=1e-10
        )

    @rule(seed=SEEDS, mode=MODES)
    def run_the_pipeline(self, seed, mode):
        number = self.models.index(self.pipe.transformer)
        if self.attached is None:
            self.check_loop(number, seed, partial(self.pipe, seed), mode, "here")
        elif self.attached != number:
            with pytest.raises(CompileError, match="was replaced after"):
                self.pipe(seed)
        elif self.compiled[number].policy == "late":
            with pytest.raises(Boom):
                self.in_mode(mode, partial(self.pipe, seed))
        else:
            output = self.in_mode(mode, partial(self.pipe, seed))
            torch.testing.assert_close(
                output, expected(number, self.compiled[number].policy, seed), rtol=1e-9, atol=1e-10
            )

    @rule(number=MODELS, seed=SEEDS, mode=MODES)
    def run_disabled_beside_another_thread(self, number, seed, mode):
        model = self.models[number]
        if self.compiled[number] is None:
            with pytest.raises(CompileError, match="not compiled"), fastercache.disabled(model):
                pass
            return
        with fastercache.disabled(model):
            plain = self.in_mode(mode, partial(self.loop, number, seed))
            self.check_loop(number, seed, partial(self.loop, number, seed), mode, "there")
        assert torch.equal(plain, expected(number, None, seed))

    # ---- at all times ----

    @invariant()
    def what_is_not_compiled_is_as_it_was(self):
        if not hasattr(self, "models"):
            return
        for number, model in enumerate(self.models):
            if self.compiled[number] is None:
                assert state(model) == self.before[number]
        assert (type(self.pipe) is Pipeline) == (self.attached is None)

    def teardown(self):
        if not hasattr(self, "models"):
            return
        for target in (self.pipe, *self.models):
            try:
                fastercache.restore(target)
            except CompileError as error:
                assert "not compiled" in str(error)
        assert [state(model) for model in self.models] == self.before and type(self.pipe) is Pipeline
        with torch.no_grad():
            for number in range(2):
                assert torch.equal(self.loop(number, 0), expected(number, None, 0))


Misuse.TestCase.settings = settings(
    max_examples=int(EXAMPLES or 30),
    stateful_step_count=15,
    deadline=None,
    derandomize=EXAMPLES is None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")
class TestMisuse(Misuse.TestCase):
    pass
