"""Sections that compare several runs, by what their folders tell; each run has a colour."""

import json
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from flaxcls.buckets import AnyPath
from flaxcls.config.fields import fields
from flaxcls.remote import is_remote
from flaxcls.report.blocks import (
    Block,
    Charts,
    Link,
    Note,
    Number,
    Section,
    Table,
    Text,
    count,
    percent,
)
from flaxcls.report.figures import COLOURS, curves, progress_axis, span
from flaxcls.report.run_files import RunFiles, number_in
from flaxcls.report.svg import Line
from flaxcls.runs.goodput import NAMES


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """A name for each run: that of its folder or, where several have that, with its number."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name} ({place})"
        for place, name in enumerate(names, start=1)
    ]


def results(runs: Sequence[RunFiles], folder: AnyPath) -> Section:
    """A row for each run: its last results and the best one, and what they took.

    Names lead to the runs' own pages, from a page in `folder`.
    """
    head = ["run", "step", "accuracy", "averaged", "loss", "best", "images/s", "time", "goodput"]
    rows = []
    for name, run in zip(names_of(runs), runs, strict=True):
        last, seconds = run.results, number_in(run.summary, "seconds")
        loss = number_in(last, "eval", "loss")
        rows.append(
            (
                _link(name, run, folder),
                count(run.last_step),
                percent(number_in(last, "eval", "accuracy"), 2),
                percent(number_in(last, "ema", "accuracy"), 2),
                Number(loss, "–" if loss is None else f"{loss:.4f}"),
                percent(number_in(run.summary, "best", "accuracy"), 2),
                count(number_in(run.summary, "images_per_second")),
                Number(seconds, "–" if seconds is None else span(seconds)),
                percent(number_in(run.goodput, "goodput")),
            )
        )
    unfinished = [
        name
        for name, run in zip(names_of(runs), runs, strict=True)
        if not run.summary.get("finished")
    ]
    notes = [Note(problem) for run in runs for problem in run.problems]
    notes += [Note(f"Not finished: {', '.join(unfinished)}.")] if unfinished else []
    return Section("Results", [*notes, Table("The last results", head, rows, sortable=True)])


def _link(name: str, run: RunFiles, folder: AnyPath) -> Link | str:
    page = run.path / "report.html"
    if is_remote(page) != is_remote(folder) or not page.exists():
        return name
    try:
        return Link(name, quote(os.path.relpath(str(page), str(folder)).replace(os.sep, "/")))
    except ValueError:  # another drive of Windows
        return name


def learning_curves(runs: Sequence[RunFiles]) -> Section | None:
    """The curves of all runs over each other."""
    x = progress_axis(runs)

    def lines(group: str, metric: str, style: str = "") -> list[Line]:
        return [
            Line(name, f"c{place % COLOURS}{style}", run.values(group, metric, x))
            for place, (name, run) in enumerate(zip(names_of(runs), runs, strict=True))
        ]

    charts = [
        curves("Accuracy in evaluation", lines("eval", "accuracy"), x, percents=True),
        curves("Accuracy of averaged parameters", lines("ema", "accuracy"), x, percents=True),
        curves("Loss in evaluation", lines("eval", "loss"), x, log=True),
        curves("Loss in training", lines("train", "loss", " thin"), x, log=True),
        curves("Learning rate", lines("train", "learning_rate"), x, from_zero=True),
    ]
    found = [chart for chart in charts if chart]
    return Section("Learning curves", [Charts(found)]) if found else None


def speed(runs: Sequence[RunFiles]) -> Section | None:
    """What the seconds of each run went to."""
    rows = []
    for name, run in zip(names_of(runs), runs, strict=True):
        spent = [number_in(run.goodput, "seconds", each) for each in NAMES]
        if any(spent):
            cells = [Number(s, "–" if s is None else span(s)) for s in spent]
            rows.append((name, *cells, count(number_in(run.goodput, "restarts"))))
    if not rows:
        return None
    table = Table("Where the time went", ["run", *NAMES.values(), "restarts"], rows, sortable=True)
    return Section("Speed and goodput", [table])


def config_differences(runs: Sequence[RunFiles]) -> Section | None:
    """The fields of the configs that are not the same in all runs."""
    known = [(name, run) for name, run in zip(names_of(runs), runs, strict=True) if run.config]
    if len(known) < 2:
        return None
    tables = [dict(fields(run.config)) for _, run in known]
    rows = []
    for field in sorted(set().union(*tables)):
        values = [_json(table.get(field)) for table in tables]
        if len({*values}) > 1:
            rows.append((field, *values))
    table: Block = Table("Fields that differ", ["field", *(name for name, _ in known)], rows)
    return Section("Config", [table if rows else Text("The configs are the same.")])


def environment(runs: Sequence[RunFiles]) -> Section | None:
    """Versions, devices and data, where they are not the same in all runs."""
    rows: list[tuple[str, ...]] = []
    recorded = [_flat(run.record) for run in runs]
    for key in sorted(set().union(*recorded)):
        values = [each.get(key, "–") for each in recorded]
        if len({*values}) > 1:
            rows.append((key, *values))
    if not rows:
        return None
    return Section("Environment", [Table("What differs", ["what", *names_of(runs)], rows)])


def _flat(record: dict[str, Any]) -> dict[str, str]:
    kept = {key: record[key] for key in ("commit", "device", "fingerprint") if key in record}
    versions = record.get("versions")
    kept |= versions if isinstance(versions, dict) else {}
    return {key: str(value) for key, value in kept.items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
