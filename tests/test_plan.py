"""The plan: every blend reads exactly the outputs that the method names, and nothing is kept that no step reads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastercache import Schedule, ScheduleError, Step, policies
from fastercache.plan import group_of, make_plan
from fastercache.triton_kernels.row import Row


@settings(deadline=None)
@given(steps=st.integers(1, 60), interval=st.integers(1, 6), cfg_interval=st.one_of(st.none(), st.integers(1, 9)), guidance=st.booleans())
def test_slots_hold_the_newest_computed_outputs(steps, interval, cfg_interval, guidance):
    """Play the plan on rings of labels: each tap must find the output of the step it stands for, of its own branch."""
    plan = make_plan(policies.paper(steps, guidance, reuse_interval=interval, cfg_interval=cfg_interval), guidance)
    for number, group in enumerate(plan.groups):
        rings = {branch: [None] * group.slots for branch in group.branches}
        computed = []
        for index, step in enumerate(plan.steps):
            planned = step.groups[number]
            if planned.blend:
                for tap in range(int(planned.row[Row.TAPS])):
                    slot = int(planned.row[Row.READ_SLOT + tap])
                    for branch in step.branches:
                        assert rings[branch][slot] == (branch, computed[-1 - tap])
            else:
                computed.append(index)
                for branch in planned.push:
                    assert branch in step.branches
                    rings[branch][int(planned.row[Row.WRITE_SLOT])] = (branch, index)


def test_the_paper_schedule_caches_the_conditional_branch_alone():
    plan = make_plan(policies.paper(50), True)
    assert [(group.slots, group.branches) for group in plan.groups] == [(2, ("cond",))]
    assert len(plan.phases) == 3


def test_dynamic_reuse_alone_caches_both():
    assert make_plan(policies.dynamic_only(50), True).groups[0].branches == ("cond", "uncond")
    assert make_plan(policies.dynamic_only(50), False).groups[0].branches == ("cond",)


def test_the_difference_is_split_only_before_a_step_that_needs_it():
    plan = make_plan(policies.paper(30), True)
    numbers = [number for number, step in enumerate(plan.steps, 1) if step.split]
    assert numbers == [11, 16, 21, 26]


def test_a_site_named_twice_is_an_error():
    blend = Step("both", ("attention", "spatial"), (1.0,))
    plan = make_plan(Schedule((Step(), blend)), True)
    with pytest.raises(ScheduleError, match="'attention' and 'spatial' both name the spatial site of layer 0"):
        group_of(plan.groups, "spatial", 0)
    assert group_of(plan.groups, "temporal", 0) == 0
