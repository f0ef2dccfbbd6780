"""What a calibrated schedule was made for and measured to do: kept with it, and compared with a run."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from fastercache import Measured, Prediction, Schedule, ScheduleError, Signature, Step, policies

MADE_FOR = Signature(
    steps=4,
    model="LatteTransformer3DModel",
    config="0123456789abcdef",
    weights="fedcba9876543210",
    adapters=(("style", 0.8),),
    scheduler="DDIMScheduler",
    scheduler_config="aaaaaaaaaaaaaaaa",
    sigmas=(999.0, 749.0, 499.0, 249.0),
    shape=(4, 8, 8, 8),
    guidance=(4.0,),
    dtype="float32",
    cache_format="model",
)
MEASURED = Measured(2.5, 2.6, 52.25, (51.0, 53.5), 44.5, 64, 60.5, 243.0)
STEPS = (Step(), Step("cond"), Step("none", prediction=Prediction((1.5, -0.5))), Step())
CALIBRATED = Schedule(STEPS, "calibrated-2.5x", made_for=MADE_FOR, measured=MEASURED)


# ---- as data ---------------------------------------------------------------------------------------------------------


def test_both_come_back_from_json(tmp_path):
    CALIBRATED.to_json(tmp_path / "calibrated.json")
    assert Schedule.from_json(tmp_path / "calibrated.json") == CALIBRATED
    document = json.loads(CALIBRATED.to_json())
    assert document["format"] == "fastercache-schedule-3"
    assert document["made_for"]["adapters"] == [["style", 0.8]] and document["measured"]["psnr"] == 52.25


@pytest.mark.parametrize("field", ["made_for", "measured"])
def test_one_alone_comes_back_too(field):
    schedule = replace(CALIBRATED, **{field: None})
    assert Schedule.from_json(schedule.to_json()) == schedule and field not in json.loads(schedule.to_json())


def test_what_is_not_known_is_not_written():
    schedule = Schedule(STEPS, made_for=Signature(steps=4, dtype="bfloat16"))
    assert json.loads(schedule.to_json())["made_for"] == {"steps": 4, "dtype": "bfloat16"}
    assert Schedule.from_json(schedule.to_json()) == schedule


def test_a_schedule_without_them_is_written_as_before():
    assert json.loads(Schedule(STEPS).to_json())["format"] == "fastercache-schedule-2"
    assert json.loads(policies.paper(9).to_json())["format"] == "fastercache-schedule-1"


def test_they_stay_with_what_is_made_of_the_schedule():
    for made in (CALIBRATED.part(1, 4), CALIBRATED.without_guidance(), replace(CALIBRATED, name="other")):
        assert made.made_for == MADE_FOR and made.measured == MEASURED
    assert len(CALIBRATED.part(1, 4)) == 3


def document(**changes: object) -> str:
    return json.dumps(json.loads(CALIBRATED.to_json()) | changes)


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("made_for", {"stepz": 4}, "made_for, has unknown key 'stepz'"),
        ("made_for", {"steps": 0}, "the schedule, made_for: steps is 0; it must be a whole number"),
        ("made_for", {"sigmas": [float("nan")] * 4}, "made_for: sigmas is nan; it must be a finite"),
        ("made_for", {"sigmas": 3}, "made_for: sigmas is 3; it must be a list"),
        ("made_for", {"shape": [4, 0]}, "made_for: shape is 0"),
        ("made_for", {"guidance": "4"}, "made_for: guidance is '4'; it must be a list"),
        ("made_for", {"adapters": [["style"]]}, "adapters has .*each must be .name, scale."),
        ("made_for", {"model": 3}, "made_for: model is 3; it must be printable text"),
        ("measured", {"speed": 2}, "measured, has unknown key 'speed'"),
        ("measured", {"speedup": -1}, "measured: speedup is -1; it must be a finite number of at least 0"),
        ("measured", {"psnr": float("inf")}, "measured: psnr is inf"),
        ("measured", {"psnr_interval": [53, 51]}, r"psnr_interval is \[53, 51\]; it must be \[lower"),
        ("measured", {"pairs": 1.5}, "measured: pairs is 1.5"),
    ],
)
def test_a_broken_one_is_refused(field, change, message):
    changed = json.loads(CALIBRATED.to_json())[field] | change
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(document(**{field: changed}))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("made_for", 3, "'made_for' is 3, not an object"),
        ("made_for", {"dtype": "float32"}, "'made_for' lacks 'steps'"),
        ("measured", [], "'measured' is .., not an object"),
        ("measured", {"speedup": 2}, "'measured' lacks 'flops_ratio'"),
    ],
)
def test_another_thing_in_their_place_is_refused(field, value, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(document(**{field: value}))
    with pytest.raises(ScheduleError, match=f"{field} is 'x'; it must be a"):
        Schedule(STEPS, **{field: "x"})


def test_figures_in_words():
    words = str(MEASURED)
    assert "2.50x faster" in words and "52.2 dB [51.0, 53.5], at least 44.5, on 64" in words and "243 s" in words
    assert "[" not in str(replace(MEASURED, psnr_interval=None))


# ---- compared with a run ---------------------------------------------------------------------------------------------


def test_the_same_runs_do_not_differ():
    assert MADE_FOR.differences(MADE_FOR) == ((), ())
    rounded = replace(MADE_FOR, sigmas=tuple(sigma * 1.0001 for sigma in MADE_FOR.sigmas))
    assert MADE_FOR.differences(rounded) == ((), ())


CHANGES = {
    "steps": (30, "wrong", "its steps are 30, not 4"),
    "scheduler": ("UniPC", "wrong", "its scheduler is UniPC, not DDIMScheduler"),
    "model": ("WanTransformer3DModel", "doubtful", "its model is WanTransformer3DModel, not LatteTransformer3DModel"),
    "config": ("other", "doubtful", "its model has another configuration"),
    "weights": ("other", "doubtful", "its model has other weights"),
    "adapters": ((), "doubtful", "its adapters are none, not style at 0.8"),
    "scheduler_config": ("other", "doubtful", "its scheduler has another configuration"),
    "sigmas": ((999.0, 749.0, 400.0, 249.0), "doubtful", "its sigmas differ from step 3 on, 400 there and not 499"),
    "shape": ((4, 8, 16, 16), "doubtful", "its latents are 4 x 8 x 16 x 16, not 4 x 8 x 8 x 8"),
    "guidance": ((6.5, 3.0), "doubtful", "its guidance is 6.5 and 3, not 4"),
    "dtype": ("bfloat16", "doubtful", "its dtype is bfloat16, not float32"),
    "cache_format": ("int8", "doubtful", "its caches are stored as 'int8', not 'model'"),
}


@pytest.mark.parametrize("field", CHANGES)
def test_what_differs_is_said(field):
    value, kind, words = CHANGES[field]
    found = MADE_FOR.differences(replace(MADE_FOR, **{field: value}))
    assert found._asdict() == {"wrong": (), "doubtful": ()} | {kind: (words,)}


def test_every_part_is_compared():
    assert set(CHANGES) == {field.name for field in fields(Signature)}


@pytest.mark.parametrize("field", sorted(set(CHANGES) - {"steps"}))
def test_what_one_of_them_does_not_know_is_not_compared(field):
    unknown = replace(MADE_FOR, **{field: None})
    assert MADE_FOR.differences(unknown) == unknown.differences(MADE_FOR) == ((), ())


def test_weights_of_another_dtype_are_not_compared():
    """They are rounded, so that a hash of them tells nothing."""
    found = MADE_FOR.differences(replace(MADE_FOR, dtype="bfloat16", weights="other"))
    assert found.doubtful == ("its dtype is bfloat16, not float32",)


def test_adapters_are_known_in_any_order():
    two = replace(MADE_FOR, adapters=(("style", 0.8), ("light", 0.5)))
    assert two.adapters == (("light", 0.5), ("style", 0.8))


def test_guided():
    assert MADE_FOR.guided and replace(MADE_FOR, guidance=None).guided is None
    assert replace(MADE_FOR, guidance=(1.0,)).guided is False
