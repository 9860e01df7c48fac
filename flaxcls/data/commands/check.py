"""Scans a data set before training: what is in it, what would break a run or falsify its result.

    python -m flaxcls.data check --source=NAME-or-PATH [--config.data.eval_split=test ...]
    python -m flaxcls.data check --config=FILE [--json=FILE]

reads and decodes every picture once. --source is the name of a data set, a folder of pictures or a
list of them (.csv, .jsonl). All splits that are there are checked, beside the one to train on;
only one to evaluate on where --config.data.eval_split is given, or a recipe whose data are neither
a folder nor a list. Exit code 45 means that there are errors:

  what training refuses, such as a class without pictures or one that a split lacks
  unreadable pictures: any to evaluate on, or more to train on than config.input.max_broken allows
  labels that are no class
  classes that are evaluated but have no picture to train on
  more than 0.1 % of the pictures to evaluate on are trained on as well, byte for byte

Fewer of these, classes that nothing tests, copies within a split, and pictures of a folder that are
ignored are warnings. --json=FILE gets everything, with the name of every file that is reported.
"""

import collections
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flaxcls import cli
from flaxcls.data import FILES, contents
from flaxcls.data.commands.shared import define_flags, read_config
from flaxcls.data.files import asked_splits
from flaxcls.data.scan import Problem, Scan, find_problems, scan
from flaxcls.data.source import Source, all_ignored, reading_threads
from flaxcls.data.statistics import mean_and_std
from flaxcls.errors import ConfigError, DataError, FlaxclsError
from flaxcls.runtime.output import Guarded, printable

_CLASSES_SHOWN = 20
_EXAMPLES_SHOWN = 5


FLAGS = define_flags()
flags.DEFINE_string("json", None, "A file for the whole report.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    overrides, argv = cli.split_overrides(argv)
    cli.parse(FLAGS, argv, __doc__)
    if FLAGS.json:
        cli.check_folder("json", FLAGS.json)
    config = read_config(FLAGS, overrides)
    named = any(override.startswith("data.eval_split=") for override in overrides)
    named = named or bool(FLAGS.config and config.data.name not in FILES)
    sources, problems = open_splits(config, named_only=named, is_recipe=bool(FLAGS.config))
    scans = [
        scan(source, FLAGS.threads or reading_threads(source.is_remote), config.input.max_pixels)
        for source in sources
    ]
    problems += find_problems(scans[0], scans[1:], config.input.max_broken)
    ignored = all_ignored(sources)
    if ignored.pictures:
        problems.append(Problem(False, ignored.sentence(), [*ignored.pictures]))
    problems.sort(key=lambda problem: not problem.is_error)
    report = describe(scans, problems)
    _print_report(report, problems)
    code = DataError.exit_code if any(problem.is_error for problem in problems) else 0
    if FLAGS.json:
        text = json.dumps({**report, "exit_code": code}, indent=1)
        try:
            Path(FLAGS.json).write_text(text + "\n")
        except OSError as error:
            raise ConfigError(f"--json={FLAGS.json} can't be written: {error.strerror}") from error
    return code


def open_splits(
    config: ConfigDict, *, named_only: bool, is_recipe: bool
) -> tuple[list[Source], list[Problem]]:
    """The split to train on and those to evaluate on, and why training would refuse them.

    Args:
      config: its data are meant.
      named_only: to evaluate on, only config.data.eval_split; else all that are there.
      is_recipe: whether config.data.eval_split was chosen at all.

    Raises ConfigError or DataError if there is nothing to train on.
    """
    from flaxcls import build  # JAX, which takes a second: not for --help

    data, names = config.data, None
    if data.name in FILES:
        build.check_source(config)
        there, names = contents(data.name, data.path)
    else:
        there = build.source(config, data.train_split).splits
    chosen = [data.eval_split] if named_only or is_recipe or not there else []
    specs = [data.train_split, *chosen]
    if not named_only:
        taken = {name for spec in specs for name in asked_splits(spec, there)}
        specs += [name for name in there if name not in taken]
    if names is None:
        return [build.source(config, spec) for spec in specs], _nothing_held_out(specs)
    sources, problems = _open_files(config, specs, names, chosen)
    return sources, problems + _nothing_held_out(specs)


def _nothing_held_out(specs: Sequence[str]) -> list[Problem]:
    if len(specs) > 1:
        return []
    sentence = (
        f"there is nothing to evaluate on but '{specs[0]}': --config.data.train_split="
        "'train[:90%]' --config.data.eval_split='train[90%:]' would divide it"
    )
    return [Problem(True, sentence, [])]


def _open_files(
    config: ConfigDict, specs: Sequence[str], class_names: Sequence[str], chosen: Collection[str]
) -> tuple[list[Source], list[Problem]]:
    """The splits of a folder or a list, whether or not they fit together, and why they don't.

    `class_names` are those of all splits; `chosen` are the splits that have to be right.
    """
    from flaxcls import build

    sources: list[Source] = []
    refusals: dict[str, FlaxclsError] = {}
    for spec in specs:
        try:
            sources.append(build.source(config, spec))
        except (ConfigError, DataError) as error:
            refusals[spec] = error
    if not refusals:
        return sources, []
    sources, problems = [], []
    for spec in specs:
        is_error = True
        try:
            sources.append(build.source(config, spec, class_names=class_names))
        except (ConfigError, DataError) as error:
            if not sources:  # nothing to train on
                raise refusals.get(spec, error) from error
            # It may not be for evaluation: pictures without classes are often called "test".
            is_error = spec in chosen or len(specs) == 2 or isinstance(error, DataError)
        problem = Problem(is_error, str(refusals[spec]), []) if spec in refusals else None
        if problem and problem not in problems:
            problems.append(problem)
    return sources, problems


def describe(scans: Sequence[Scan], problems: Sequence[Problem]) -> dict[str, Any]:
    """The report as JSON takes it, of the split to train on and the others."""
    train = scans[0]
    mean, std = mean_and_std(train.histogram) if train.formats else (None, None)
    return {
        "name": train.source.name,
        "classes": train.source.class_names,
        "splits": [_describe_split(scan) for scan in scans],
        "mean": mean,
        "std": std,
        "ignored": all_ignored(scan.source for scan in scans)._asdict(),
        "problems": [problem._asdict() for problem in problems],
    }


def _describe_split(scan: Scan) -> dict[str, Any]:
    sizes = scan.sizes[scan.readable]
    heights, widths = (
        [int(statistic(side)) for statistic in (np.min, np.median, np.max)] if len(side) else None
        for side in sizes.T
    )
    return {
        "split": scan.source.split,
        "fingerprint": scan.source.fingerprint,
        "pictures": len(scan.labels),
        "unreadable": len(scan.broken),
        "formats": dict(scan.formats.most_common()),
        "heights": heights,  # smallest, median, largest
        "widths": widths,
        "class_counts": scan.class_counts.tolist(),
    }


def _print_report(report: dict[str, Any], problems: Sequence[Problem]) -> None:
    console = Console(highlight=False, emoji=False, file=Guarded(result=True))
    if not console.is_terminal:
        console.width = 120
    title = f"{printable(report['name'])}, {len(report['classes']):,} classes"
    console.print(title, style="bold", markup=False)
    console.print(_table_of_splits(report["splits"]))
    console.print(_table_of_classes(report))
    if report["mean"]:
        for name in ("mean", "std"):
            numbers = ", ".join(f"{value:.4f}" for value in report[name])
            comma = "," if len(report[name]) == 1 else ""
            console.print(f"--config.data.{name}='({numbers}{comma})'")
    if others := report["ignored"]["others"]:
        formats = collections.Counter(os.path.splitext(name)[1] or "no suffix" for name in others)
        kinds = ", ".join(f"{name} {count:,}" for name, count in formats.most_common(5))
        line = f"ignored: {len(others):,} files that are no pictures ({kinds})"
        console.print(printable(line), markup=False, soft_wrap=True)
    for problem in problems:
        kind, style = ("ERROR", "bold red") if problem.is_error else ("WARNING", "yellow")
        console.print(
            f"\n{kind}: {printable(problem.sentence)}", style=style, markup=False, soft_wrap=True
        )
        for example in problem.examples[:_EXAMPLES_SHOWN]:
            console.print(f"  {printable(example)}", markup=False, soft_wrap=True)
        more = len(problem.examples) - _EXAMPLES_SHOWN
        if more > 0:
            console.print(f"  and {more:,} more; --json=FILE lists all")
    errors = sum(problem.is_error for problem in problems)
    warnings = len(problems) - errors
    console.print(
        f"\n{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
        if problems
        else "\nNo problem found."
    )


def _table_of_splits(splits: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("split")
    for title in ("pictures", "unreadable", "widths: min, median, max", "heights"):
        table.add_column(title, justify="right")
    table.add_column("formats")
    for split in splits:
        sides = [
            ", ".join(map(str, split[side])) if split[side] else "-"
            for side in ("widths", "heights")
        ]
        formats = ", ".join(f"{name} {count:,}" for name, count in split["formats"].items())
        counts = [f"{split[name]:,}" for name in ("pictures", "unreadable")]
        table.add_row(escape(printable(split["split"])), *counts, *sides, formats)
    return table


def _table_of_classes(report: dict[str, Any]) -> Table:
    """The classes with the most and the fewest training pictures; all, if they are few."""
    counts = np.array([split["class_counts"] for split in report["splits"]])
    order = np.argsort(-counts[0], kind="stable").tolist()
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("class", overflow="ellipsis", no_wrap=True, max_width=40)
    for split in report["splits"]:
        table.add_column(escape(printable(split["split"])), justify="right")
    hidden = max(0, len(order) - _CLASSES_SHOWN)
    for rank, label in enumerate(order):
        if hidden and rank == _CLASSES_SHOWN // 2:
            low, high = (counts[0, order[i]] for i in (rank + hidden, rank - 1))
            table.add_row(f"... {hidden + 1:,} classes between", f"{low:,} to {high:,}", "")
        if rank < _CLASSES_SHOWN // 2 or rank > _CLASSES_SHOWN // 2 + hidden or not hidden:
            table.add_row(
                escape(printable(report["classes"][label])),
                *(f"{count:,}" for count in counts[:, label]),
            )
    return table
