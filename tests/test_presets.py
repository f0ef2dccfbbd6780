"""The presets: every counter of the authors' scripts, and what the schedules save at the published sizes."""

from __future__ import annotations

import pytest

from fastercache import Schedule, policies
from fastercache.report.published import SYSTEMS
from fastercache.schedule.plan import make_plan
from fastercache.schedule.presets import RELEASED
from fastercache.schedule.sites import SiteNode

# What each script tests on its counter: (calls, first counter, reuse attention, run the conditional branch alone, w,
# the factor of the stored low-frequency difference, that of the high-frequency one). From the scripts of
# github.com/Vchitect/FasterCache.
SCRIPTS = {
    "open-sora-1.2": (
        30,
        1,
        lambda c: c > 7 and c % 2 == 0,
        lambda c: c % 5 != 0 and c > 11,
        lambda c: (c - 7) / 20.0 * 0.9,
        lambda c: 1.15 if c <= 25 else 1,
        lambda c: 1.15 if c >= 20 else 1,
    ),
    "latte": (
        50,
        1,
        lambda c: c >= 16 and c % 2 == 0,
        lambda c: c >= 18 and c % 5 != 0,
        lambda c: 0.5,
        lambda c: 1.1 if c < 45 else 1,
        lambda c: 1.1 if c >= 45 else 1,
    ),
    "open-sora-plan-1.1": (
        159,
        1,
        lambda c: c >= 45 and c % 3 != 0,
        lambda c: c >= 40 and c % 6 != 0,
        lambda c: 0.3,
        lambda c: 1.1 if c <= 130 else 1,
        lambda c: 1.2 if c > 130 else 1,
    ),
    "cogvideox-2b": (
        50,
        1,
        lambda c: c >= 18 and c % 3 != 0,
        lambda c: c >= 18 and c % 5 != 0,
        lambda c: 0.3,
        lambda c: 1.1 if c <= 40 else 1,
        lambda c: 1.1 if c >= 30 else 1,
    ),
    "vchitect-2.0": (
        100,
        1,
        lambda c: c > 30 and c % 2 == 0,
        lambda c: c > 30 and c % 5 != 0,
        lambda c: None,
        lambda c: 1.05 if c < 80 else 1,
        lambda c: 1.1 if c > 60 else 1,
    ),
    "mochi": (
        64,
        0,
        lambda c: c >= 20 and c % 2 == 0,
        lambda c: c >= 22 and c % 5 != 0 and c != 63,
        lambda c: max(0.5, c / 63),
        lambda c: 1.15 if c <= 50 else 1,
        lambda c: 1.25 if c >= 30 else 1,
    ),
}
SCRIPTS["cogvideox-5b"] = SCRIPTS["cogvideox-2b"]


@pytest.mark.parametrize("system", RELEASED)
def test_released_follows_the_script_call_by_call(system):
    calls, first, reuses, single, w, low_factor, high_factor = SCRIPTS[system]
    schedule = policies.get(f"{system}/released")(calls, True)
    first_single = next(c for c in range(first, first + calls) if single(c))
    low = high = 1.0
    for c, step in enumerate(schedule.steps, first):
        assert step.branches == ("cond" if single(c) else "both"), c
        reuse = reuses(c) and (single(c) or c < first_single)
        assert step.reuse == (("attention",) if reuse else ()), c
        if reuse:
            assert step.taps == (pytest.approx((1 + w(c), -w(c))) if w(c) is not None else (1.0,)), c
        low, high = (low * low_factor(c), high * high_factor(c)) if single(c) else (1.0, 1.0)
        assert (step.low, step.high) == pytest.approx((low, high)), c


def test_largest_multipliers_are_the_known_ones():
    """Compounded over the single-branch calls between two full ones they reach 1.46 to 2.49."""
    largest = {}
    for system, rule in RELEASED.items():
        steps = policies.get(f"{system}/released")(rule.calls, True).steps
        largest[system] = round(max(step.low for step in steps), 2), round(max(step.high for step in steps), 2)
    assert largest == {
        "open-sora-1.2": (1.75, 1.75),
        "latte": (1.46, 1.46),
        "open-sora-plan-1.1": (1.61, 2.49),
        "cogvideox-2b": (1.46, 1.46),
        "cogvideox-5b": (1.46, 1.46),
        "vchitect-2.0": (1.22, 1.46),
        "mochi": (1.75, 2.44),
    }


def test_the_low_pass_of_vchitect_keeps_the_mean_alone():
    assert 54 // policies.get("vchitect-2.0/released")(100, True).radius_divisor == 0


def test_mlp_reuse_repeats_the_newest_output_of_blocks_14_to_42():
    steps = policies.get("open-sora-1.2/released-mlp")(30, True).steps
    plain = policies.get("open-sora-1.2/released")(30, True).steps
    for step, without in zip(steps, plain, strict=True):
        assert (step.branches, step.taps, step.low, step.high) == (
            without.branches,
            without.taps,
            without.low,
            without.high,
        )
        if step.reuse:
            assert step.reuse == ("attention", "mlp[14:43]")
            assert step.taps_of(SiteNode("", "mlp", 14), "cond") == (1.0,)
            assert len(step.taps_of(SiteNode("", "spatial", 0), "cond")) == 2


@pytest.mark.parametrize("name", policies.PRESETS)
@pytest.mark.parametrize("guidance", [True, False])
def test_presets_are_valid_at_every_length_and_survive_json(name, guidance):
    for steps in (1, 2, 3, 4, 7, 20, 30, 50, 64, 159, 200):
        schedule = policies.get(name)(steps, guidance)
        assert len(schedule) == steps and schedule.name == name
        assert Schedule.from_json(schedule.to_json()) == schedule
        assert guidance or all(step.branches == "both" for step in schedule.steps)


@pytest.mark.parametrize("name", policies.PRESETS)
def test_any_part_of_a_preset_is_a_schedule_of_its_own(name):
    """As for one of two experts: construction refuses a part that reads what was computed before it."""
    schedule = policies.get(name)(30, True)
    for cut in range(1, 30):
        first, second = schedule.part(0, cut), schedule.part(cut, 30)
        assert first.steps == schedule.steps[:cut] and len(second) == 30 - cut
        assert [step.branches for step in second.steps[1:]] == [step.branches for step in schedule.steps[cut + 1 :]]
        assert all(
            set(part.reuse) <= set(whole.reuse) for part, whole in zip(second.steps, schedule.steps[cut:], strict=True)
        )


@pytest.mark.parametrize("system", RELEASED)
def test_at_another_length_the_same_share_is_skipped(system):
    """Twice the calls: reuse and single-branch calls begin at the same fraction of the run, and skip the same share of
    it to 3 %."""
    calls = RELEASED[system].calls

    def shares(steps):
        rows = policies.get(f"{system}/released")(steps, True).steps
        return [sum(row.branches == "cond" for row in rows) / steps, sum(bool(row.reuse) for row in rows) / steps]

    assert shares(2 * calls) == pytest.approx(shares(calls), abs=0.03)


# TFLOPs of one video as counted for each script: uncached, and under its schedule with the branches kept apart.
PUBLISHED = {
    "open-sora-1.2/released": (12897, 8795),
    "open-sora-1.2/released-mlp": (12897, 8126),
    "latte/released": (3439.6, 2366.2),
    "open-sora-plan-1.1/released": (11668, 7035),
    "cogvideox-2b/released": (11998, 7374),
    "cogvideox-5b/released": (33218, 20851),
    "vchitect-2.0/released": (29092, 18512),
    "mochi/released": (213434, 132866),
}


def plan_of(preset):
    system = SYSTEMS[preset.partition("/")[0]]
    return system, make_plan(policies.get(preset)(system.steps, system.guided), system.guided, system.tree)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_flops_at_the_published_sizes(preset):
    system, plan = plan_of(preset)
    assert (2e-12 * system.uncached_macs(plan), 2e-12 * system.cached_macs(plan)) == pytest.approx(
        PUBLISHED[preset], rel=1e-3
    )


def test_cache_bytes():
    """CogVideoX-2B: the conditional branch of 30 sites, 2 slots of 17,776 x 1920; the authors' layout takes 8.2 GB.
    Vchitect has 1 slot."""
    maps = 2 * 4 * 16 * 13 * 60 * 90
    system, plan = plan_of("cogvideox-2b/released")
    assert system.cache_bytes(plan, "model") == 30 * 2 * 17776 * 1920 * 2 + maps <= 4.3e9
    assert system.cache_bytes(plan, "int8") == 30 * 17776 * 3968 + maps <= 2.2e9
    # The rings of video and text each take a multiple of 256 bytes.
    assert (
        system.cache_bytes(plan, "int8-int4")
        == 30 * sum(-(-tokens * 3008 // 256) * 256 for tokens in (17550, 226)) + maps
    )
    system, plan = plan_of("vchitect-2.0/released")
    assert system.cache_bytes(plan, "model") == 24 * 40 * (1296 + 333) * 1536 * 2 + 2 * 4 * 16 * 40 * 54 * 96


@pytest.mark.parametrize(
    ("preset", "storage"), [("open-sora-1.2/released", "model"), ("hunyuan-video/paper", "int8-int4")]
)
def test_the_long_videos_fit_one_80_gb_device(preset, storage):
    """Weights, caches, and 12 GB of it left for activations."""
    system, plan = plan_of(preset)
    assert system.fitting_format(plan) == storage
    assert system.fitting_format(plan, 20_000_000_000) is None
