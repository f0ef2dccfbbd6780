"""The plan: every blend reads exactly the results that the method names, nothing is kept that no step reads, and nested
sites add up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastercache import Schedule, ScheduleError, Step, policies
from fastercache.schedule.plan import make_plan
from fastercache.schedule.sites import ATTENTION_KINDS, SiteNode
from fastercache.schedule.step import Prediction
from fastercache.triton_kernels.coefficients import Coefficient


def tree(layers=3):
    """A stack of blocks with an attention and an MLP each."""
    sites = [SiteNode("", "stack", 0)]
    for layer in range(layers):
        block = len(sites)
        sites += [
            SiteNode(f"blocks.{layer}", "block", layer, 0),
            SiteNode(f"blocks.{layer}.attn", "joint", layer, block),
            SiteNode(f"blocks.{layer}.mlp", "mlp", layer, block),
        ]
    return sites


SELECTORS = ("attention", "mlp", "block", "stack", "block[1:]", "joint[1:2]", "mlp[:2]")


def named(selector, site):
    """Written again, so that the plan is not held against itself."""
    kind, _, layers = selector.partition("[")
    first, _, stop = layers.rstrip("]").partition(":")
    kinds = ATTENTION_KINDS if kind == "attention" else (kind,)
    return site.kind in kinds and int(first or 0) <= site.layer < int(stop or 99)


@st.composite
def schedules(draw):
    """Schedules over nested sites, many of them invalid: a plan must refuse those and keep the others right."""
    steps = [Step()]
    for _ in range(draw(st.integers(2, 8))):
        branches = draw(st.sampled_from(["both", "both", "cond", "none"]))
        reuse = draw(st.lists(st.sampled_from(SELECTORS), max_size=2, unique=True)) if branches != "none" else []
        taps = tuple(draw(st.lists(st.sampled_from([1.5, -0.5, 0.25]), min_size=1, max_size=2))) if reuse else ()
        steps.append(Step(branches, tuple(reuse), taps))
    return steps


@settings(deadline=None, max_examples=400)
@given(steps=schedules(), guided=st.booleans())
def test_a_plan_is_right_or_refused(steps, guided):
    """Play the plan on rings of labels: each tap must find the result of the step it stands for, of its own branch."""
    sites = tree()
    try:
        schedule = Schedule(tuple(steps))
        plan = make_plan(schedule, guided, sites)
    except ScheduleError:
        return
    rings = {(site, branch): {} for site in range(len(sites)) for branch in plan.branches}
    computed = {key: [] for key in rings}
    for number, (step, planned) in enumerate(zip(plan.schedule.steps, plan.steps, strict=True)):
        ran = (
            ()
            if step.branches == "none"
            else ("cond",)
            if step.branches == "cond" or not guided
            else ("cond", "uncond")
        )
        assert planned.branches == ran and (planned.phase is None) == (not ran)
        reused = [any(named(selector, site) for selector in step.reuse) for site in sites]
        for index, site in enumerate(sites):
            outer = [site.parent, sites[site.parent].parent] if site.parent is not None else []
            inside = any(reused[parent] for parent in outer if parent is not None)
            expected = "idle" if inside or not ran else "blend" if reused[index] else "compute"
            assert plan.action(index, number) == expected
            cadence = plan.cadences[plan.cadence_of[index]]
            mode = plan.phases[planned.phase].modes[plan.cadence_of[index]] if ran else None
            last = plan.table[number][cadence.coefficients[0]] if cadence.coefficients else None
            for branch in ran:
                ring = rings[index, branch]
                if expected == "blend":
                    assert int(last[Coefficient.TAPS]) == len(step.taps)
                    for tap in range(len(step.taps)):
                        slot = int(last[Coefficient.READ_SLOT + tap])
                        assert ring[slot] == (branch, computed[index, branch][-1 - tap]) and 0 <= slot < cadence.slots
                elif expected == "compute":
                    computed[index, branch].append(number)
                    if branch in mode.push:
                        assert branch in cadence.branches
                        ring[int(last[Coefficient.WRITE_SLOT])] = (branch, number)


@settings(deadline=None)
@given(
    steps=st.integers(1, 60),
    interval=st.integers(1, 6),
    cfg_interval=st.one_of(st.none(), st.integers(1, 9)),
    guided=st.booleans(),
)
def test_the_papers_schedule_stores_what_it_reads_in_two_slots(steps, interval, cfg_interval, guided):
    plan = make_plan(policies.paper(steps, guided, reuse_interval=interval, cfg_interval=cfg_interval), guided, tree())
    assert len(plan.phases) <= 4
    for index, site in enumerate(plan.sites):
        cadence = plan.cadences[plan.cadence_of[index]]
        blends = any(plan.action(index, step) == "blend" for step in range(steps))
        assert cadence.slots == (2 if blends else 0) and (site.kind == "joint" or not blends)


def cadence_of(plan, kind):
    index = next(i for i, site in enumerate(plan.sites) if site.kind == kind)
    return plan.cadences[plan.cadence_of[index]]


def test_the_paper_schedule_caches_the_conditional_branch_alone():
    plan = make_plan(policies.paper(50), True, tree())
    assert (cadence_of(plan, "joint").slots, cadence_of(plan, "joint").branches) == (2, ("cond",))
    assert cadence_of(plan, "mlp").branches == () and len(plan.phases) == 3 and plan.maps == 2 and plan.predictions == 0


def test_dynamic_reuse_alone_caches_both():
    assert cadence_of(make_plan(policies.dynamic_only(50), True, tree()), "joint").branches == ("cond", "uncond")
    assert cadence_of(make_plan(policies.dynamic_only(50), False, tree()), "joint").branches == ("cond",)


def test_the_difference_is_split_only_where_a_later_step_needs_it():
    plan = make_plan(policies.paper(30), True, tree())
    assert [number for number, step in enumerate(plan.steps, 1) if step.split] == [11, 16, 21, 26]
    steps = (Step(), Step(), Step("none"), Step("cond"), Step(), Step("cond", previous=0.5), Step())
    plan = make_plan(Schedule(steps), True, tree())
    assert [number for number, step in enumerate(plan.steps, 1) if step.split] == [2, 5] and plan.maps == 3


def test_two_differences_are_split_where_a_step_reads_the_one_before():
    plan = make_plan(Schedule((Step(), Step(), Step("cond", previous=0.5))), True, tree())
    assert [step.split for step in plan.steps] == [True, True, False]


def test_predictions_and_latents_are_kept_as_long_as_the_schedule_reads_them():
    steps = (
        Step(),
        Step(),
        Step("none", prediction=Prediction((2.0, -1.0), 0.25, -0.25)),
        Step(prediction=Prediction((0.5,), fresh=0.5)),
    )
    plan = make_plan(Schedule(steps), True, tree())
    assert (plan.predictions, plan.keeps_latents) == (2, True)
    last = plan.table[2][-1]
    assert last[Coefficient.OF_TAP : Coefficient.OF_TAP + 2] == (2.0, -1.0)
    assert (last[Coefficient.NOW], last[Coefficient.NEWEST]) == (0.25, -0.25)
    written = [plan.table[step][-1][Coefficient.WRITE_SLOT] for step in (0, 1)]
    assert list(last[Coefficient.READ_SLOT : Coefficient.READ_SLOT + 2]) == written[::-1]
    assert plan.table[3][-1][Coefficient.FRESH] == 0.5 and [step.sum_prediction for step in plan.steps] == [
        False,
        False,
        True,
        True,
    ]
    assert make_plan(policies.paper(20), True, tree()).predictions == 0


def test_sites_may_have_coefficients_of_their_own_without_another_phase():
    own = Step("both", ("attention",), (1.0,), own_taps=(("joint[1:2]", (1.5, -0.5)), ("joint[2:]@uncond", (0.75,))))
    plan = make_plan(Schedule((Step(), Step(), own)), True, tree())
    taps = {}
    for index, site in enumerate(plan.sites):
        if site.kind == "joint":
            cadence = plan.cadences[plan.cadence_of[index]]
            taps[site.layer] = [plan.table[2][i][:2] for i in cadence.coefficients]
    assert taps == {0: [(1.0, 0.0)], 1: [(1.5, -0.5)], 2: [(1.0, 0.0), (0.75, 0.0)]}
    assert len(plan.phases) == 2


BLOCK = Step("both", ("block",), (1.0,))
"""A step at which attentions idle, though no selector of theirs says so."""
BLOCK_THEN_ATTENTION = (Step(), BLOCK, Step("both", ("attention",), (1.5, -0.5)))
FULL_COND_FULL = (Step(), Step("cond"), Step())


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            (Step(), Step("both", ("attention", "joint[1:]"), (1.0,))),
            "'attention' and 'joint.1:.' both name the joint site of layer 1",
        ),
        (
            (Step(), Step("both", ("attention", "block"), (1.0,))),
            "step 2 reuses the joint of layer 0 inside the block of layer 0",
        ),
        ((Step(), Step("both", ("mlp[2:]", "stack"), (1.0,))), "step 2 reuses the mlp of layer 2 inside the stack"),
        (
            BLOCK_THEN_ATTENTION,
            "step 3 blends 2 results of the joint of layer 0 .* only 1 .* let 2 steps compute it first",
        ),
        (
            (*FULL_COND_FULL, BLOCK, BLOCK, Step("both", ("attention",), (3.0, -3.0, 1.0))),
            "step 6 blends 3 results of the joint of layer 0 in the unconditional branch, but only 2 .* let 3 steps",
        ),
        (
            (*FULL_COND_FULL, BLOCK, Step("both", ("attention",), (1.5, -0.5))),
            "step 5 runs both branches and reuses the joint of layer 0, whose newest results are not of the same steps",
        ),
        (
            (Step(), Step("both", ("spatial",), (1.0,))),
            "reuses 'spatial', but this model has no such site; it has stack, block .layers 0 to 2",
        ),
        ((Step(), Step("both", ("block[3:]",), (1.0,))), "reuses 'block.3:.', but this model has no such site"),
    ],
)
def test_what_a_model_cannot_do_names_the_site_the_step_and_the_remedy(steps, message):
    with pytest.raises(ScheduleError, match=message):
        make_plan(Schedule(steps), True, tree())


def test_a_site_may_be_named_by_another_selector_at_another_step():
    steps = (Step(), Step(), Step("both", ("attention",), (1.0,)), Step("both", ("joint[1:]",), (1.5, -0.5)))
    plan = make_plan(Schedule(steps), True, tree())
    actions = {
        site.layer: [plan.action(i, step) for step in range(4)]
        for i, site in enumerate(plan.sites)
        if site.kind == "joint"
    }
    assert actions == {
        0: ["compute", "compute", "blend", "compute"],
        1: ["compute", "compute", "blend", "blend"],
        2: ["compute", "compute", "blend", "blend"],
    }
