"""An evaluation in depth as tables for people."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from flaxcls.insight.detailed import Detailed, Scaling
from flaxcls.insight.intervals import wilson
from flaxcls.insight.scores import class_scores, confident_mistakes, confusion, worst_first
from flaxcls.runs.metric_log import describe
from flaxcls.runtime.output import Guarded, printable

_CLASSES = 20  # that are shown, the worst ones
_MISTAKES = 10
_NAME = 32  # characters of a class


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


def _number(value: float) -> str:
    return f"{value:.4f}"


# What metrics are called and how they are written; macro_recall is the balanced accuracy.
METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "accuracy": ("accuracy", _share),
    "accuracy_top5": ("top-5 accuracy", _share),
    "balanced_accuracy": ("balanced accuracy", _share),
    "macro_precision": ("precision, mean of classes", _share),
    "macro_f1": ("F1, mean of classes", _share),
    "nll": ("negative log-likelihood", _number),
    "brier": ("Brier score", _number),
    "ece": ("calibration error, 15 equal bins", _share),
    "ece_adaptive": ("calibration error, 15 bins of equal count", _share),
}


def print_detailed(found: Detailed) -> None:
    """Writes the tables to standard output; OutputError if that can't be done."""
    console = _console()
    tables = [_metrics(found), _classes(found)]
    if found.scaling:
        tables.insert(1, _scaling(found.scaling))
    if (found.judged.rank > 0).any():
        tables.append(_mistakes(found))
    for title, table in tables:
        console.print(title, style="bold", soft_wrap=True)
        console.print(table)


def print_comparison(found: Detailed) -> None:
    """Writes what each of several runs is worth by itself, and how the first two differ."""
    console = _console()
    letters = [chr(ord("A") + n) if n < 26 else str(n + 1) for n in range(len(found.members))]
    for letter, member in zip(letters, found.members, strict=True):
        console.print(f"{letter}: {member.describe()}", soft_wrap=True)
    what = f"{' + '.join(letters)}, {found.average} averaged, {found.source.split}"
    console.print(f"{printable(what)}: {describe(found.metrics)}", soft_wrap=True)
    table = _table(["together", *letters, "A - B", "95 % interval"])
    for name, (label, form) in METRICS.items():
        if name not in found.metrics:
            continue
        cells = [form(row[name]) for row in (found.metrics, *found.member_metrics)]
        if difference := found.differences.get(name):
            cells.append("+" * (difference.value >= 0) + form(difference.value))
            clear = " *" if difference.is_clear else "  "
            cells.append(_range(form, *difference.interval) + clear)
        table.add_row(label, *cells)
    console.print(table)
    console.print("* chance is a poor explanation: the paired bootstrap's interval is without 0")


def _console() -> Any:
    console: Any = Console(file=Guarded(result=True), highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 120
    return console


def _range(form: Callable[[float], str], low: float, high: float) -> str:
    return f"{form(low).removesuffix(' %')} to {form(high)}"


def _table(numbers: Sequence[str]) -> Table:
    """A table with a column of names and then those of numbers."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("", overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _metrics(found: Detailed) -> tuple[str, Table]:
    count, shown = len(found.judged.labels), len(np.unique(found.judged.labels))
    classes = len(found.class_names)
    of = f"{classes:,} classes" if shown == classes else f"{shown:,} of the {classes:,} classes"
    where = f"{printable(found.source.name)} '{printable(found.source.split)}'"
    title, table = f"{where}: {count:,} examples of {of}", _table(["", "95 % interval"])
    for name, (label, form) in METRICS.items():
        if name in found.metrics:
            interval = found.intervals.get(name)
            table.add_row(
                label, form(found.metrics[name]), _range(form, *interval) if interval else ""
            )
    return title, table


def _scaling(scaling: Scaling) -> tuple[str, Table]:
    title = (
        f"Temperature {scaling.temperature:.3f}, fitted on {scaling.fitted_on}, measured on "
        f"{scaling.judged_on}"
    )
    table = _table(["as it is", "logits / temperature"])
    for name, before in scaling.before.items():
        label, form = METRICS[name]
        table.add_row(label, form(before), form(scaling.after[name]))
    return title, table


def _classes(found: Detailed) -> tuple[str, Table]:
    scores, pairs = class_scores(found.judged), confusion(found.judged)
    np.fill_diagonal(pairs, 0)
    order = worst_first(scores)
    title = "Classes, the worst first"
    if len(order) > _CLASSES:
        title += f" ({_CLASSES} of {len(order):,}; --out=DIR writes all)"
    columns = ["examples", "recall (accuracy)", "95 % interval", "precision", "F1"]
    table = _table(columns)
    table.add_column("most often taken for")
    low, high = wilson(scores.right, scores.count)
    for label in order[:_CLASSES]:
        other = int(pairs[label].argmax())
        mistaken = f"{_name(found, other)} ({pairs[label, other]:,})" if pairs[label].any() else ""
        table.add_row(
            _name(found, label),
            f"{scores.count[label]:,.0f}",
            _share(scores.recall[label]),
            _range(_share, low[label], high[label]),
            _share(scores.precision[label]),
            _share(scores.f1[label]),
            mistaken,
        )
    return title, table


def _mistakes(found: Detailed) -> tuple[str, Table]:
    order, judged = confident_mistakes(found.judged), found.judged
    title, table = f"The most confident of the {len(order):,} mistakes", _table(["probability"])
    table.add_column("taken for", overflow="fold")
    table.add_column("is", overflow="fold")
    for index in order[:_MISTAKES].tolist():
        table.add_row(
            found.source.where(index),
            _share(judged.confidence[index]),
            _name(found, judged.best[index]),
            _name(found, judged.labels[index]),
        )
    return title, table


def _name(found: Detailed, label: int) -> str:
    name = printable(found.class_names[label])
    return name if len(name) <= _NAME else name[: _NAME - 3] + "..."
