"""Charts: scales that hold their values, ticks one can read, lines that keep their peaks."""

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flaxcls.report import svg
from flaxcls.report.svg import Line

NUMBERS = st.floats(-1e9, 1e9).filter(lambda x: x == 0 or abs(x) > 1e-9)


@given(st.lists(NUMBERS, min_size=1), st.booleans())
def test_axis_holds_the_values_and_has_a_few_ticks(values, log):
    axis = svg.axis("", values, log=log)
    assert all(-1e-9 <= axis.at(value) <= 1 + 1e-9 for value in values)
    ticks = svg.ticks(axis)
    assert 1 <= len(ticks) <= 8 and ticks == sorted({*ticks})
    assert all(-1e-9 <= axis.at(tick) <= 1 + 1e-9 for tick in ticks)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 30, [0, 10, 20, 30]), (0.92, 0.99, [0.92, 0.94])],
)
def test_ticks_are_round(low, high, ticks):
    found = svg.ticks(svg.axis("", [low, high]))
    assert found[: len(ticks)] == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1200.0, "1,200"), (0.05, "0.05"), (3e-5, "3e-05"), (2.5e7, "2.5e+07"), (-1, "-1")],
)
def test_numbers_are_short(value, text):
    assert svg.short(value) == text


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_long_lines_keep_their_ends_of_scale(values):
    points = list(enumerate(values))
    kept = svg.thinned(points, 100)
    assert len(kept) <= 100 or len(points) <= 100
    assert kept == sorted(kept) and {*kept} <= {*points}
    assert min(values) == min(y for _, y in kept) and max(values) == max(y for _, y in kept)


def test_line_is_where_its_values_are():
    x, y = svg.Axis("step", 0, 10, svg.short), svg.Axis("", 0, 1, svg.short)
    text = svg.line_chart([Line("a < b", "c0", [(0, 0), (10, 1)])], x, y, says='"quoted" & <b>')
    root = ElementTree.fromstring(text)
    assert root.get("aria-label") == '"quoted" & <b>' and root.get("role") == "img"
    (line,) = (path for path in root if path.get("class") == "line c0")
    (left, bottom), (right, top) = (
        map(float, each.split()) for each in line.get("d")[1:].split("L")
    )
    assert left < right and bottom > top
    grid = [path.get("d").split()[1] for path in root if path.get("class") == "grid"]
    assert f"{bottom:g}" in {f"{float(y.partition('H')[0]):g}" for y in grid}
    assert [title.text for title in root.iter("title")][0] == "a < b, step 0: 0"


def test_log_scale_is_one():
    axis = svg.axis("", [0.01, 1.0], log=True)
    assert axis.at(0.1) == pytest.approx(0.5)
    assert svg.axis("", [0.0, 1.0], log=True).log is False


def test_stacked_bar_is_as_wide_as_its_parts():
    text = svg.stacked_bar([("c0", "one", 1.0), ("c1", "three", 3.0)], "says")
    widths = [float(rect.get("width")) for rect in ElementTree.fromstring(text)]
    assert widths == [250, 750] and math.isclose(sum(widths), 1000)
