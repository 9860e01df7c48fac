"""Numbers as a page writes them, and the curves that are drawn of one run or of several."""

from collections.abc import Sequence

from flaxcls.report import svg
from flaxcls.report.blocks import Chart
from flaxcls.report.run_files import RunFiles, number
from flaxcls.report.svg import Line

_SPANS = ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s"))  # seconds of each
COLOURS = 8  # that the style sheet has, "c0" to "c7"


def share(value: float) -> str:
    """`98.61 %`, of 0 to 1."""
    return f"{100 * value:.2f} %"


def span(seconds: float) -> str:
    """`12 s`, `3 min 20 s`, `4 h 12 min`, `2 d 3 h`."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    large = next(each for each in _SPANS if round(seconds / each[2]) * each[2] >= each[0])
    size, unit, small, small_unit = large
    whole, rest = divmod(round(seconds / small), size // small)
    return f"{whole} {unit}" + (f" {rest} {small_unit}" if rest else "")


def _percent(value: float) -> str:
    return f"{100 * value:.4g} %"


def progress_axis(runs: Sequence[RunFiles]) -> str:
    """What curves are drawn over: "epoch" or, for less than two of them, "step"."""
    epochs = [number(row.get("epoch")) or 0 for run in runs for row in run.rows]
    return "epoch" if max(epochs, default=0) >= 2 else "step"


def curves(
    title: str,
    lines: Sequence[Line],
    x: str,
    *,
    percents: bool = False,
    log: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] = (),
    caption: str = "",
) -> Chart | None:
    """Lines over the steps or epochs, which begin at 0; None where no line has a point.

    The other scale ends at the lowest value or, `from_zero`, at 0. A `log` one is taken where the
    values span a factor of 10 and all are above 0.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    values = [value for line in lines for _, value in line.points] + [0.0] * from_zero
    log = log and min(values) > 0 and max(values) > 10 * min(values)
    y = svg.axis("", values, log=log, format=_percent if percents else svg.short)
    end = max(at for line in lines for at, _ in line.points)
    says = "; ".join(
        f"{line.label} from {y.format(line.points[0][1])} to {y.format(line.points[-1][1])}"
        for line in lines
    )
    drawing = svg.line_chart(
        lines, svg.Axis(x, 0, end or 1, svg.short), y, marks=marks, says=f"{title} by {x}: {says}"
    )
    legend = [(line.style, line.label) for line in lines] if len(lines) > 1 else []
    notes = [caption, *(["Logarithmic scale"] if log else [])]
    return Chart(title, drawing, list(dict.fromkeys(legend)), ". ".join(filter(None, notes)))
