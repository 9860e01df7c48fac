"""Charts as inline SVG, whose colours and fonts are the style sheet's: light, dark and on paper.

They are drawn for a column of some 360 pixels, where text has the size of the page's. Matplotlib
would draw for one colour scheme, with text as outlines, and take a second to be imported.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from markupsafe import Markup

from flaxcls.runtime.output import printable

_WIDTH, _HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 20, 10, 36  # margins
_MOST_POINTS = 600  # of a line: more than its pixels are not seen

Point = tuple[float, float]
Format = Callable[[float], str]


class Line(NamedTuple):
    """Points in the order of x, and the style sheet's classes for it: "c0", "c1 thin", ..."""

    label: str
    style: str
    points: Sequence[Point]


class Axis(NamedTuple):
    """What an axis shows: its label, the ends of its scale and how its ticks are written."""

    label: str
    low: float
    high: float
    format: Format
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value is, from 0 to 1."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(each) for each in (value, low, high))
        return (value - low) / (high - low)


def short(value: float) -> str:
    """`1,200`, `0.05`, `3e-05`: the number in as few characters as it takes."""
    if value and not 1e-4 < abs(value) < 1e6:
        return f"{value:.1e}".replace(".0e", "e")
    return f"{value:,.4f}".rstrip("0").rstrip(".")


def axis(label: str, values: Sequence[float], *, format: Format = short, log: bool = False) -> Axis:
    """An axis that holds the values and ends at ticks; a log one if all are above 0."""
    low, high = min(values), max(values)
    if log and low > 0:
        if high < 1.2 * low:
            low, high = low / 2, high * 2
        return Axis(label, low, high, format, log=True)
    if low == high:
        low, high = (low, low + 1) if low >= 0 else (low - 1, low)
    step = _tick_step(high - low)
    return Axis(label, math.floor(low / step) * step, math.ceil(high / step) * step, format)


def _tick_step(span: float) -> float:
    power = 10.0 ** math.floor(math.log10(span / 4))
    return next(m * power for m in (1, 2, 5, 10) if span / (m * power) <= 5)


def ticks(scale: Axis) -> list[float]:
    """The values that are written at a scale: round, in order, and few."""
    if scale.log:
        decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        for within in ((1, 2, 5), (1, 3), (1,)):
            found = [m * 10.0**decade for decade in decades for m in within]
            found = [tick for tick in found if scale.low <= tick <= scale.high]
            if 2 <= len(found) <= 7:
                return found
        if len(found) > 7:
            return found[:: math.ceil(len(found) / 7)]
    step = _tick_step(scale.high - scale.low)  # also of a log scale of less than a decade
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


class _Canvas:
    """Elements of an SVG within the margins of a chart's two axes."""

    def __init__(self, x: Axis, y: Axis):
        self._x, self._y, self.elements = x, y, list[Markup]()
        self._draw_axes()

    def x(self, value: float) -> float:
        return round(_LEFT + self._x.at(value) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        return round(_HEIGHT - _BOTTOM - self._y.at(value) * (_HEIGHT - _TOP - _BOTTOM), 1)

    def add(self, element: str, *values: object) -> None:
        """An element; the values are escaped."""
        self.elements.append(Markup(element).format(*values))

    def _draw_axes(self) -> None:
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        for tick in ticks(self._y):
            y = self.y(tick)
            self.add('<path class="grid" d="M{} {}H{}"/>', _LEFT, y, right)
            text = self._y.format(tick)
            self.add('<text x="{}" y="{}" class="y">{}</text>', _LEFT - 6, y + 4, text)
        for tick in ticks(self._x):
            text = self._x.format(tick)
            self.add('<text x="{}" y="{}" class="x">{}</text>', self.x(tick), bottom + 16, text)
        self.add('<path class="axis" d="M{} {}H{}"/>', _LEFT, bottom, right)
        self.add('<text x="{}" y="{}" class="label">{}</text>', right, _HEIGHT - 4, self._x.label)

    def add_bars(self, style: str, heights: Sequence[float | None], titles: Sequence[str]) -> None:
        """Bars of one width from 0 to 1; None is no bar."""
        for number, (height, title) in enumerate(zip(heights, titles, strict=True)):
            if height is not None:
                left, right = (self.x(n / len(heights)) for n in (number, number + 1))
                self.add(
                    '<rect class="{}" x="{:.1f}" y="{}" width="{:.1f}" height="{:.1f}">'
                    "<title>{}</title></rect>",
                    style,
                    left + 1,
                    self.y(height),
                    right - left - 2,
                    max(self.y(0) - self.y(height), 1),
                    title,
                )

    def drawing(self, says: str) -> Markup:
        """The whole; `says` is for who can't see it."""
        start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            _WIDTH, _HEIGHT, printable(says)
        )
        return start + Markup("").join(self.elements) + Markup("</svg>")


def line_chart(
    lines: Sequence[Line], x: Axis, y: Axis, *, marks: Sequence[float] = (), says: str
) -> Markup:
    """Lines over x; `marks` are values of x with a dashed upright, such as restarts."""
    canvas = _Canvas(x, y)
    for mark in marks:
        if x.low <= mark <= x.high:
            path = f"M{canvas.x(mark)} {_TOP}V{_HEIGHT - _BOTTOM}"
            canvas.add('<path class="mark" d="{}"/>', path)
    for line in lines:
        points = [point for point in thinned(line.points) if not y.log or point[1] > 0]
        if len(points) == 1:
            at = canvas.x(points[0][0]), canvas.y(points[0][1])
            canvas.add('<circle class="dot {}" cx="{}" cy="{}" r="3.5"/>', line.style, *at)
            continue
        path = "".join(f"L{canvas.x(px)} {canvas.y(py)}" for px, py in points)
        canvas.add('<path class="line {}" d="M{}"/>', line.style, path[1:])
        if 1 < len(points) <= 30 and "thin" not in line.style:
            for px, py in points:
                canvas.add(
                    '<circle class="dot {}" cx="{}" cy="{}" r="2.5"><title>{}</title></circle>',
                    line.style,
                    canvas.x(px),
                    canvas.y(py),
                    f"{printable(line.label)}, {x.label} {x.format(px)}: {y.format(py)}",
                )
    return canvas.drawing(says)


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most some points of a line: the lowest and the highest of each stretch, so peaks stay."""
    if len(points) <= most:
        return list(points)
    kept = []
    size = math.ceil(len(points) / (most // 2))
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def reliability_diagram(
    confidence: Sequence[float], accuracy: Sequence[float], counts: Sequence[int], says: str
) -> Markup:
    """Accuracy in each bin of the confidence, and how far it is from the bin's mean confidence.

    The bins are of one width, in order from 0 to 1; those without examples have no bar. On the
    diagonal both would be equal.
    """
    canvas = _Canvas(Axis("confidence", 0, 1, _percent), Axis("accuracy", 0, 1, _percent))
    heights = [right if count else None for right, count in zip(accuracy, counts, strict=True)]
    canvas.add_bars("bar soft", heights, [f"{count:,} examples" for count in counts])
    for sure, right in zip(confidence, heights, strict=True):
        if right is not None:
            gap = f"M{canvas.x(sure)} {canvas.y(right)}V{canvas.y(sure)}"
            canvas.add('<path class="gap" d="{}"/>', gap)
    diagonal = f"M{canvas.x(0)} {canvas.y(0)}L{canvas.x(1)} {canvas.y(1)}"
    canvas.add('<path class="diagonal" d="{}"/>', diagonal)
    return canvas.drawing(says)


def histogram(counts: Sequence[int], x: str, says: str) -> Markup:
    """Counts of bins of one width between 0 and 1, as bars."""
    canvas = _Canvas(Axis(x, 0, 1, _percent), axis("", [0, *counts]))
    canvas.add_bars("bar", [count or None for count in counts], [f"{count:,}" for count in counts])
    return canvas.drawing(says)


def _percent(share: float) -> str:
    """What a tick of a scale from 0 to 100 % says: the ends have the unit."""
    return f"{100 * share:.0f} %" if share in (0, 1) else f"{100 * share:.0f}"


def stacked_bar(parts: Sequence[tuple[str, str, float]], says: str) -> Markup:
    """One bar whose parts, (style, label, value) each, are as wide as their share of the whole."""
    total, left, height = sum(value for _, _, value in parts), 0.0, 22
    elements = []
    for style, label, value in parts:
        width = 1000 * value / total
        elements.append(
            Markup(
                '<rect class="{} part" x="{:.1f}" y="0" width="{:.1f}" height="{}">'
                "<title>{}</title></rect>"
            ).format(style, left, width, height, printable(label))
        )
        left += width
    return (
        Markup('<svg viewBox="0 0 1000 {}" role="img" aria-label="{}" class="stack" {}>').format(
            height, printable(says), Markup('preserveAspectRatio="none"')
        )
        + Markup("").join(elements)
        + Markup("</svg>")
    )
