"""Schedules as data: what is valid, what is said about the rest, and that nothing is lost on the way through JSON."""

import json

import pytest

from fastercache import Schedule, ScheduleError, Step, policies
from fastercache.schedule.sites import Selector, SiteNode
from fastercache.schedule.step import Prediction

FULL, SINGLE = Step(), Step("cond")
BLEND = Step("cond", ("attention",), (1.5, -0.5))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "has no steps"),
        ([SINGLE], "step 1 runs the conditional branch alone.*let step 1 run 'both'"),
        ([FULL, BLEND], r"step 2 blends 2 outputs of 'attention', but only 1 were computed.*let 2 steps"),
        ([FULL, FULL, SINGLE, Step("both", ("attention",), (1.0,))], "step 4 runs both branches and reuses.*too old"),
        ([FULL, Step("cond", ("attention",), (float("nan"),))], r"step 2: taps\[0\] is nan.*finite"),
        ([FULL, Step("cond", low=float("inf"))], "step 2: low is inf.*finite"),
        ([FULL, Step("cond", high="1")], "step 2: high is '1'"),
        ([FULL, Step("cond", ("attention",), ())], "give both or neither"),
        ([FULL, Step("cond", (), (1.0,))], "give both or neither"),
        ([FULL] * 5 + [Step("cond", ("mlp",), (1.0,) * 5)], "taps has 5 coefficients; at most 4"),
        (
            [FULL, Step("both", ("attention",), (1.0,), own_taps=(("mlp", (1.0,)),))],
            "own_taps for 'mlp', which is not among",
        ),
        ([FULL, Step("both", ("mlp",), (1.0,), own_taps=(("mlp", ()),))], "own_taps of 'mlp' is empty"),
        (
            [FULL, Step("both", ("mlp",), (1.0,), own_taps=(("mlp", (1.0, 0.5)),))],
            "blends 2 outputs of 'mlp', but only 1",
        ),
        ([FULL, Step("uncond")], "branches is 'uncond'; it must be 'both', 'cond' or 'none'"),
        ([FULL, Step(["both"])], "branches is .'both'.; it must be"),
        ([FULL, "cond"], "step 2 is 'cond', not a Step"),
        ([FULL, Step("cond", low=1e39)], r"step 2: low is 1e\+39.*of at most 10000"),
        ([FULL, Step("both", ("mlp",), (1e39,))], r"step 2: taps\[0\] is 1e\+39"),
        ([FULL, Step("cond", low=10**400)], "step 2: low is 10000.*of at most 10000"),
        ([FULL, Step("both", ([],), (1.0,))], "unknown site '..'"),
        ([FULL, Step("both", ("mlp", "mlp"), (1.0,))], "names a selector twice"),
        ([FULL, Step("none", ("mlp",), (1.0,))], "step 2 runs nothing .* reuses .'mlp'."),
        ([FULL, Step("none", low=1.5)], "step 2 runs nothing, so there is no branch to rebuild"),
        ([FULL, Step("none", prediction=Prediction(fresh=0.5))], "step 2 runs nothing, so it has no fresh prediction"),
        ([FULL, Step("none", prediction=Prediction((1.0, 1.0)))], "step 2 is made of 2 predictions, but only 1"),
        (
            [FULL] * 5 + [Step("none", prediction=Prediction((1.0,) * 4))],
            "prediction.taps has 4 coefficients; .* 1 to 3",
        ),
        ([Step("none")], "step 1 is made of 1 predictions, but only 0"),
        ([FULL, Step("cond", previous=0.5)], "step 2 adds 0.5 of the difference before the newest.*let two steps"),
        ([FULL, Step("both", ("mlp",), (1.0,), own_taps=(("mlp@left", (1.0,)),))], "after the @ comes a branch"),
        ([FULL, Step("both", ("atention",), (1.0,))], "unknown site 'atention'; known are attention, spatial"),
        ([FULL, Step("both", ("mlp[2]",), (1.0,))], "unknown site"),
    ],
)
def test_a_schedule_that_cannot_run_is_refused(steps, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(tuple(steps))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "has no list 'steps'"),
        ('{"steps": 3}', "has no list 'steps'"),
        ('{"steps": [{}], "stps": 1}', "unknown key 'stps'"),
        ('{"steps": [{}, {"brnches": "cond"}]}', "step 2 has unknown key 'brnches'"),
        ('{"steps": [{}, 7]}', "step 2 is 7"),
        ('{"steps": [{}, {"taps": 1}]}', "'taps' is 1, not a list"),
        ('{"steps": [{}], "format": "other"}', "has format 'other'"),
        ('{"steps": [{}], "radius_divisor": 2}', "radius_divisor is 2"),
        ('{"steps": [{}, {"low": NaN, "branches": "cond"}]}', "low is nan"),
        ('{"steps": [{}, {"reuse": [[]], "taps": [1]}]}', "unknown site"),
        ('{"steps": [{}, {"low": ' + "9" * 400 + ', "branches": "cond"}]}', "low is 9999"),
        ("[" * 100_000, "is not JSON"),
        ('{"steps": ' + "[" * 100_000, "is not JSON"),
        ('{"steps": [{"branches": "both", "branches": "cond"}]}', "key 'branches' stands twice"),
        ('{"steps": [{}], "name": 3}', "name is '3'; it must be printable text"),
        ('{"steps": [{}], "name": "a\\ud800b"}', "name is .*printable"),
        ('{"steps": [{}], "radius_divisor": 5.5}', "radius_divisor is 5.5"),
        ('{"steps": [{}, {"branches": "none", "prediction": {"tips": [1]}}]}', "unknown key 'tips'"),
        ('{"steps": [{}, {"branches": "none", "prediction": 1}]}', "'prediction' is 1, not an object"),
    ],
)
def test_a_broken_file_names_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "schedule.json"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_json(path)
    with pytest.raises(ScheduleError, match=r"nowhere\.json.*cannot be read"):
        Schedule.from_json(tmp_path / "nowhere.json")
    with pytest.raises(ScheduleError, match="cannot be read"):
        Schedule.from_json("a\0b.json")


@pytest.mark.parametrize("name", policies.BY_NAME)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 30, 50, 159])
@pytest.mark.parametrize("guidance", [True, False])
def test_every_policy_is_valid_at_every_length_and_survives_json(tmp_path, name, steps, guidance):
    schedule = policies.get(name)(steps, guidance)
    assert len(schedule) == steps
    schedule.to_json(tmp_path / "schedule.json")
    assert Schedule.from_json(tmp_path / "schedule.json") == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert guidance or all(step.branches != "cond" for step in schedule.steps)


def test_json_leaves_defaults_out():
    rows = json.loads(Schedule((FULL, FULL, BLEND)).to_json())["steps"]
    assert rows == [{}, {}, {"branches": "cond", "reuse": ["attention"], "taps": [1.5, -0.5]}]


def test_selectors():
    def matches(text, kind, layer):
        return Selector.parse(text).matches(SiteNode("", kind, layer))

    assert (
        matches("attention", "joint", 3) and not matches("attention", "mlp", 3) and not matches("attention", "cross", 3)
    )
    assert [matches("mlp[14:43]", "mlp", layer) for layer in (13, 14, 42, 43)] == [False, True, True, False]
    assert matches("spatial[2:]", "spatial", 99) and matches("spatial[:2]", "spatial", 0)


class TestPaper:
    """The rule of the paper with the defaults this project sets: s = floor(N/3) + 1, w and the gains as in Eq. 5 and
    10."""

    def test_chart_of_30_steps(self):
        assert policies.paper(30).chart().splitlines() == [
            "cond   ###########~#~###~#~#~#~###~#~",
            "uncond ###########....#....#....#....",
        ]

    def test_w_rises_linearly_from_0_at_s_to_1_at_the_last_step(self):
        schedule = policies.paper(30)
        for number, step in enumerate(schedule.steps, 1):
            if step.reuse:
                w = (number - 11) / (30 - 11)
                assert step.taps == pytest.approx((1 + w, -w))
        assert policies.paper(30).steps[-1].taps == (2.0, -1.0)

    def test_low_gain_before_the_middle_high_gain_after(self):
        for number, step in enumerate(policies.paper(30, low_gain=0.3, high_gain=0.4).steps, 1):
            expected = (1.0, 1.0) if step.branches == "both" else (1.3, 1.0) if number < 20.5 else (1.0, 1.4)
            assert (step.low, step.high) == expected

    def test_without_guidance_features_are_reused_on_every_second_step(self):
        assert policies.paper(12, False).chart().splitlines()[0] == "cond   #####~#~#~#~"

    def test_intervals(self):
        assert policies.paper(14, cfg_interval=3, reuse_interval=4).chart().splitlines() == [
            "cond   #####~~##~#~##",
            "uncond #####..#..#..#",
        ]
        for wrong in ({"cfg_interval": 0}, {"reuse_interval": -1}, {"start": 0}):
            with pytest.raises(ScheduleError, match=next(iter(wrong))):
                policies.paper(10, **wrong)
        for wrong in ({"reuse_interval": 1.5}, {"start": 2.5}, {"cfg_interval": True}):
            with pytest.raises(ScheduleError, match=f"{next(iter(wrong))} is .* whole number"):
                policies.paper(10, **wrong)
        with pytest.raises(ScheduleError, match="steps is 0"):
            policies.paper(0)


def test_a_file_of_the_first_format_loads(tmp_path):
    """As it was written before steps could run nothing."""
    path = tmp_path / "old.json"
    path.write_text(
        '{"format": "fastercache-schedule-1", "name": "old", "radius_divisor": 200,\n "steps": [\n  {},\n  {},\n'
        '  {"branches": "cond", "reuse": ["attention", "mlp[14:43]"], "taps": [1.5, -0.5], "low": 1.2,'
        ' "own_taps": [["mlp[14:43]", [1.0]]]}\n]}\n'
    )
    blend = Step("cond", ("attention", "mlp[14:43]"), (1.5, -0.5), 1.2, own_taps=(("mlp[14:43]", (1.0,)),))
    schedule = Schedule.from_json(path)
    assert schedule == Schedule((FULL, FULL, blend), name="old", radius_divisor=200)
    assert schedule.to_json() == path.read_text()
