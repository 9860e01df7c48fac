"""The section on what attacks and corruptions, as far as there were any, did to a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from flaxcls.report.blocks import Block, Charts, Number, Section, Table, Text, count, percent
from flaxcls.report.figures import curves
from flaxcls.report.run_data import RunData
from flaxcls.report.run_files import number, number_in
from flaxcls.report.svg import Line
from flaxcls.runs import robustness_log

_NORMS = {"linf": "c0", "l2": "c1"}


def robustness(run: RunData) -> Section | None:
    """Accuracy by the size of the change of an image, and by the severity of corruptions."""
    rows = robustness_log.read(run.files.path)
    attacks = {
        (row.get("norm"), eps): row
        for row in rows
        if (eps := number(row.get("eps"))) is not None and number(row.get("robust")) is not None
    }
    corrupted = [row["corruptions"] for row in rows if isinstance(row.get("corruptions"), Mapping)]
    blocks = [*(_attacks(attacks) if attacks else ())]
    blocks += _corruptions(corrupted[-1]) if corrupted else ()
    return Section("Robustness", blocks) if blocks else None


def _attacks(attacks: Mapping[tuple[Any, float], Mapping[str, Any]]) -> Iterator[Block]:
    """The last attack of each norm and size."""
    yield Text(
        "The share of images that are right and stay so under attack: the last of each size."
    )
    lines = []
    for norm, style in _NORMS.items():
        points = [(eps, row["robust"]) for (of, eps), row in attacks.items() if of == norm]
        clean = [
            number_in(row, "accuracies", "clean") for (of, _), row in attacks.items() if of == norm
        ]
        if points and clean[-1] is not None:
            lines.append(Line(norm, style, sorted([(0, clean[-1]), *points])))
    charts = [
        curves(f"Under attack, {line.label}", [line], "eps", percents=True, from_zero=True)
        for line in lines
    ]
    yield Charts([chart for chart in charts if chart])
    rows = []
    for (norm, eps), row in sorted(attacks.items(), key=str):
        named = row.get("accuracies")
        method = [*named][-1] if isinstance(named, Mapping) and named else "–"
        clean = percent(number_in(row, "accuracies", "clean"))
        robust, images = percent(row["robust"]), count(number(row.get("count")))
        rows.append((str(norm), Number(eps, f"{eps:.4g}"), method, images, clean, robust))
    head = ["norm", "eps", "attack", "images", "clean", "under attack"]
    yield Table("Attacks", head, rows, sortable=True)


def _corruptions(corruptions: Mapping[str, Any]) -> Iterator[Block]:
    """The accuracy under each corruption at each severity, the worst one first."""
    named = {
        name: [number(each) for each in accuracies]
        for name, accuracies in corruptions.items()
        if isinstance(accuracies, list) and accuracies and None not in map(number, accuracies)
    }
    if not named:
        return
    means = {name: sum(accuracies) / len(accuracies) for name, accuracies in named.items()}
    rows = [
        (name.replace("_", " "), *map(percent, named[name]), percent(means[name]))
        for name in sorted(named, key=means.__getitem__)
    ]
    severities = [str(number) for number in range(1, len(rows[0]) - 1)]
    yield Table(
        "Accuracy under corruptions, by severity",
        ["corruption", *severities, "mean"],
        rows,
        sortable=True,
    )
