"""Draws what tests/integration/test_week.py has measured, and prints it as a sentence.

WEEK_FOLDER=. python -m pytest -m torture tests/integration/test_week.py
python tests/baselines/week_plot.py week_disk.json docs/week.svg
python tests/baselines/week_plot.py week_bucket.json docs/week_bucket.svg
"""

import itertools
import json
import statistics
import sys
from pathlib import Path

from markupsafe import Markup

from flaxcls.report.svg import Axis, Line, axis, line_chart

WIDTH, HEIGHT, TITLE = 380, 270, 36  # of a panel, in pixels; of them, above its chart
STYLE = """
text { font: 11px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #59626e; }
.title { font-size: 13px; fill: #1b1f24; } .x { text-anchor: middle; }
.y, .label { text-anchor: end; } path { fill: none; } .grid { stroke: #d9dde3; }
.axis { stroke: #59626e; } .mark { stroke: #b8bec6; stroke-dasharray: 1 3; }
.line { stroke-width: 1.25; stroke-linejoin: round; } .dashed { stroke-dasharray: 3 2; }
.c0 { stroke: #1f6feb; } .c1 { stroke: #cf5a0c; } .dot { stroke: none; }
.dot.c0 { fill: #1f6feb; } .dot.c1 { fill: #cf5a0c; }
"""
# A panel each: what it shows, in units of so many, the median of OVER saves, and how it is drawn.
PANELS = {
    "Resident memory, MB": (("memory", 1e6, ""),),
    "Seconds a save": (("seconds", 1, ""),),
    "Processor seconds a step and its save": (("cpu", 1, ""),),
    "Threads, and open files (dashed)": (("threads", 1, ""), ("files", 1, " dashed")),
}
OVER = 15


def main(source: str, target: str) -> None:
    week = json.loads(Path(source).read_text())
    panels = [panel(week, title, shown) for title, shown in PANELS.items()]
    size = 2 * WIDTH, 2 * HEIGHT + 24
    drawing = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" height="{}">'
        '<style>{}</style><rect width="{}" height="{}" fill="#fff"/>{}{}</svg>\n'
    ).format(
        *size,
        *size,
        Markup(STYLE),
        *size,
        Markup("").join(
            Markup('<g transform="translate({} {})">{}</g>').format(
                number % 2 * WIDTH, number // 2 * HEIGHT, drawn
            )
            for number, drawn in enumerate(panels)
        ),
        legend(2 * HEIGHT + 12),
    )
    Path(target).write_text(drawing)
    print(sentence(week))


def panel(week: dict, title: str, shown: tuple) -> Markup:
    """Quantities over the checkpoints that were saved: of one process, and of many."""
    lines, ends = [], []
    for run, style in (("week", "c1"), ("undisturbed", "c0")):
        end = 0
        for life in lives(week[run]):
            for name, unit, dashed in shown:
                values = [value / unit for value in quantity(life, name)]
                lines.append(Line(run, f"{style} thin{dashed}", medians(values, end)))
            end += len(life)
            ends.append(end)
    y = axis("", [0, *(value for line in lines for _, value in line.points)])
    x = Axis("checkpoints saved", 0, len(week["week"]), lambda value: f"{value:,.0f}")
    marks = ends[: len(lives(week["week"])) - 1]
    chart = line_chart([line for line in lines if line.points], x, y, marks=marks, says=title)
    chart = Markup(str(chart).replace("<svg ", f'<svg y="{TITLE}" width="360" height="230" ', 1))
    return Markup('<text class="title" x="16" y="24">{}</text>{}').format(title, chart)


def lives(rows: list[dict]) -> list[list[dict]]:
    """The rows of each process."""
    return [[*life] for _, life in itertools.groupby(rows, key=lambda row: row["process"])]


def quantity(life: list[dict], name: str) -> list[float]:
    values = [row[name] for row in life]
    return (
        [after - value for value, after in itertools.pairwise(values)] if name == "cpu" else values
    )


def medians(values: list[float], first: int) -> list[tuple[float, float]]:
    """Points: the median of each OVER values, at the last one of them."""
    return [
        (first + begin + len(some) - 1, statistics.median(some))
        for begin in range(0, len(values), OVER)
        if (some := values[begin : begin + OVER])
    ]


def legend(y: int) -> Markup:
    return Markup(
        '<path class="line c0" d="M48 {0}h24"/><text x="78" y="{1}">one process, undisturbed</text>'
        '<path class="line c1" d="M248 {0}h24"/><text x="278" y="{1}">the week: a process after '
        'another</text><path class="mark" d="M498 {2}v14"/><text x="506" y="{1}">killed</text>'
    ).format(y - 4, y, y - 11)


def sentence(week: dict) -> str:
    events = ", ".join(f"{name} {count}" for name, count in sorted(week["events"].items()))
    waits = [
        min(life[0]["time"] - start for start in week["starts"] if start < life[0]["time"])
        for life in lives(week["week"])
    ]
    saves = [
        statistics.median(row["seconds"] for row in week[run]) for run in ("undisturbed", "week")
    ]
    return (
        f"{len(week['week'])} checkpoints by {len(week['starts'])} processes in "
        f"{week['seconds']['week']:.0f} s (undisturbed: {len(week['undisturbed'])} in "
        f"{week['seconds']['undisturbed']:.0f} s); {events}; {week['not saved']} not saved; "
        f"medians: a save {saves[1]:.3f} s (undisturbed {saves[0]:.3f}), from a restart to "
        f"the next checkpoint {statistics.median(waits):.1f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
