"""What a calibration leaves in a folder: schedules, their index, a report and its charts."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from fastercache import Measured, Schedule, Signature, Step
from fastercache.report.calibration import CalibrationReport, write_report, write_schedules
from fastercache.report.plots import COLOURS, HEIGHT, LEFT, WIDTH, Series, plot
from fastercache.schedule.carried import Carried

FAST = Schedule(
    (Step(), Step("cond"), Step("none"), Step()),
    "calibrated 2x",
    made_for=Signature(steps=4, guidance=(4.0,)),
    measured=Measured(2.1, 2.2, 48.25, (47.0, 49.5), 41.0, 64, 61.0, 246.0),
)
FASTER = replace(FAST, name="calibrated 3x", measured=replace(FAST.measured, speedup=3.0, psnr=40.0))
REPORT = CalibrationReport(
    (FAST, FASTER),
    [(1.5, 55.0), (2.2, 46.0), (3.1, 38.5), (1.0, math.inf)],
    [[0.0, 0.0, 1e-3, 5e-3], [0.0, 2e-3, 8e-3, 2e-2]],
    {"pipeline": "shapes | <b>", "prompts": 8},
)


def svg(text: str):
    return ElementTree.fromstring(text)


def marks(text: str, kind: str, colour: str):
    return [mark for mark in svg(text).iter(f"{{http://www.w3.org/2000/svg}}{kind}") if colour in mark.attrib.values()]


def test_a_report_has_its_figures_charts_and_steps(tmp_path):
    path = write_report(REPORT, tmp_path / "out")
    text = path.read_text()
    figures = "2.10 | 2.20 | 48.2 | 47.0 to 49.5 | 41.0 | 64 | 61 generations, 246 s"
    assert f"| [calibrated 2x](calibrated-2x.json) | {figures} |" in text
    assert "| pipeline | shapes \\| \\<b\\> |" in text
    assert "1 whose PSNR is not finite are left out" in text
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (path.parent / name).is_file(), name
    for name in ("speed.svg", "errors.svg"):
        svg((path.parent / name).read_text())


def test_the_charts_of_the_steps_are_those_of_the_schedules(tmp_path):
    text = write_report(REPORT, tmp_path).read_text()
    drawn = [line.split()[1] for line in text.splitlines() if line.startswith(("cond ", "uncond "))]
    assert drawn == ["██·█", "█··█"] * 2
    alone = replace(FAST, made_for=Signature(steps=4, guidance=(1.0,)))
    text = write_report(CalibrationReport([alone]), tmp_path).read_text()
    assert "uncond" not in text and "██·█" in text


def test_every_candidate_is_a_dot_and_every_schedule_a_ring(tmp_path):
    chart = (write_report(REPORT, tmp_path).parent / "speed.svg").read_text()
    dots = marks(chart, "circle", "3")
    assert len(dots) == 3 and len(marks(chart, "circle", "none")) == 2
    places = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in dots]
    assert [x for x, _ in places] == sorted(x for x, _ in places)  # faster is further right
    assert [y for _, y in places] == sorted(y for _, y in places)  # and further down


def test_errors_are_lines_that_begin_where_the_runs_part(tmp_path):
    chart = (write_report(REPORT, tmp_path).parent / "errors.svg").read_text()
    first, second = (mark.get("d") for colour in COLOURS[:2] for mark in marks(chart, "path", colour))
    assert first.count("L") == 1 and second.count("L") == 2 and "nan" not in chart


def test_what_is_not_known_is_left_out(tmp_path):
    write_report(REPORT, tmp_path)
    text = write_report(CalibrationReport([replace(FAST, measured=None)]), tmp_path).read_text()
    assert "not measured" in text and "svg" not in text
    assert not list(tmp_path.glob("*.svg"))  # nor are those of an earlier report left


def test_a_report_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one schedule"):
        CalibrationReport([])
    with pytest.raises(ValueError, match="errors are of 1 schedules, and there are 2"):
        CalibrationReport((FAST, FASTER), errors=[[0.1]])


def test_the_folder_of_schedules_can_be_carried(tmp_path):
    same, other = replace(FASTER, name=FAST.name), Schedule((Step(), Step()), "../in/dex")
    paths = write_schedules([FAST, same, other, replace(other, name="index")], tmp_path)
    assert [path.name for path in paths] == [
        "calibrated-2x.json",
        "calibrated-2x-1.json",
        "in-dex.json",
        "index-1.json",
    ]
    carried = Carried.read(tmp_path, "here", None)
    assert carried.schedules == {4: (FAST, same), 2: (other, replace(other, name="index"))}


# ---- plots -----------------------------------------------------------------------------------------------------------


def test_points_lie_where_the_axes_say():
    chart = plot([Series("a", [(0, 0), (10, 100)], colour="red")], "x & y", "<y>")
    low, high = marks(chart, "circle", "3")
    assert float(low.get("cx")) == LEFT and float(high.get("cx")) == pytest.approx(WIDTH - 20)
    assert float(low.get("cy")) - float(high.get("cy")) == HEIGHT
    assert "x & y" in [text.text for text in svg(chart).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0107, 0.049, ["0.01", "0.02", "0.05"]),
        (0.02, 0.02, ["0.02", "0.05"]),
        (1e-3, 1.0, ["0.001", "0.01", "0.1", "1"]),
    ],
)
def test_a_logarithmic_axis_has_lines_to_read_values_by(low, high, ticks):
    """And begins with the first step, whatever can be drawn of it."""
    chart = plot([Series("a", [(1, 0.0), (5, low), (9, high)], "line")], "x", "y", logarithmic=True)
    texts = [text for text in svg(chart).iter("{http://www.w3.org/2000/svg}text")]
    assert [text.text for text in texts if text.get("text-anchor") == "end"] == ticks
    assert next(text.text for text in texts if text.get("text-anchor") == "middle") in ("0", "1")


def test_the_legend_shows_each_series_as_it_is_drawn():
    drawn = [Series(kind, [(1, 2), (3, 4)], kind, colour) for kind, colour in (("dots", "red"), ("rings", "blue"))]
    chart = plot([*drawn, Series("line", [(1, 2), (3, 4)], "line", "green")], "x", "y")
    assert len(marks(chart, "circle", "red")) == len(marks(chart, "circle", "blue")) == 3
    assert len(marks(chart, "line", "green")) == 1


@pytest.mark.parametrize("points", [[(1, 5)], [(1, 5), (2, 5)], [(1e-9, 1e9), (2e-9, 1.1e9)], [(-3, -2), (5, 0.1)]])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_any_points_fit_into_the_plot(points, logarithmic):
    if logarithmic:
        points = [(x, abs(y)) for x, y in points]
    chart = plot([Series("a", points)], "x", "y", logarithmic)
    for mark in marks(chart, "circle", "3"):
        assert LEFT <= float(mark.get("cx")) <= WIDTH and 0 <= float(mark.get("cy")) <= HEIGHT + 40
    assert len(marks(chart, "circle", "3")) == len(points)


def test_no_point_at_all_is_refused():
    with pytest.raises(ValueError, match="no point to draw"):
        plot([Series("a", [(1, math.nan), (math.inf, 1)])], "x", "y")
