"""Classifies pictures by a saved run.

    python -m flaxcls.predict --run=DIR FILES-or-FOLDERS... [--topk=5] [--format=table|csv|jsonl]
    python -m flaxcls.predict --run=A --run=B FILES-or-FOLDERS... [--average=probabilities|logits]

needs the run's folder and the pictures, nothing else. Folders are searched with all that is below
them, in alphabetical order. Standard output holds the result and nothing else, in the order of the
files:

  table  a line for every class: file, class and probability; separated by tabs unless on a terminal
  csv    a line for every file, below the names of the columns:
         file,class_1,probability_1,class_2,probability_2,...
  jsonl  a line for every file: {"file": ..., "predictions": [{"class": ..., "probability": ...}]}

After flaxcls.calibrate probabilities are calibrated, and each file has a set of classes that holds
the right one as often as was promised, and an answer, unless the best class is too uncertain. Then

  table  has "in the set" or nothing behind each probability, and a line "none of these" without a
         probability above the classes where there is no answer
  csv    has two columns more: answer, empty for none of these, and set, as JSON has lists
  jsonl  has "answer", null for none of these, and "set"

Several --run are an ensemble, whose answers are averaged; it has no calibration.

--features=FILE.npz is given the inputs of the network's last layer besides: `features`, float32
[N, D], and `files`, the N names.

Files that can't be read are named on standard error and skipped; the exit code is 45 then. It is 46
if the result can't be written, as where its reader has gone. Control characters in the names of
files and classes are escaped in a table; csv and jsonl have the exact names.
"""

import contextlib
import csv
import itertools
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError, DataError
from flaxcls.files import atomic_write
from flaxcls.runtime.output import Guarded, printable, say

Ranked = list[tuple[str, float]]  # classes and their probabilities, the best one first
# The result of a file; the last one is of `flaxcls.inference.classifier`, None if not calibrated.
Write = Callable[[str, Ranked, Any], Any]
_NONE, _IN_THE_SET = "none of these", "in the set"


def _plain_table(out: Guarded, class_names: Sequence[str], topk: int, calibrated: bool) -> Write:
    def write(file: str, ranked: Ranked, answer: Any = None) -> None:
        if answer and answer.none_of_these:
            out.write(f"{printable(file)}\t{_NONE}\t\t\n")
        for name, probability in ranked:
            row = f"{printable(file)}\t{printable(name)}\t{probability:.4f}"
            if answer:
                row += f"\t{_IN_THE_SET if name in answer.classes else ''}"
            out.write(row + "\n")

    return write


def _terminal_table(
    out: Guarded, class_names: Sequence[str], topk: int, calibrated: bool = False
) -> Write:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=out, highlight=False, markup=False, emoji=False)
    width = min(max(len(printable(name)) for name in class_names), console.width // 2)

    def write(file: str, ranked: Ranked, answer: Any = None) -> None:
        table = Table.grid(padding=(0, 2), expand=True)  # of its own, as files come one by one
        table.add_column(ratio=1, overflow="fold")
        table.add_column(width=width, overflow="ellipsis", no_wrap=True)
        table.add_column(width=7, justify="right")
        table.add_column(width=len(_IN_THE_SET) if calibrated else 0)
        label, is_refused = printable(file), answer and answer.none_of_these
        if is_refused:
            table.add_row(label, _NONE, style="bold")
        for rank, (name, probability) in enumerate(ranked):
            style = "dim" if rank or is_refused else "bold"
            inside = _IN_THE_SET if answer and name in answer.classes else ""
            row = ("" if rank or is_refused else label, printable(name), f"{probability:.2%}")
            table.add_row(*row, inside, style=style)
        console.print(table)

    return write


def _table(out: Guarded, class_names: Sequence[str], topk: int, calibrated: bool) -> Write:
    return (_terminal_table if out.isatty() else _plain_table)(out, class_names, topk, calibrated)


def _csv(out: Guarded, class_names: Sequence[str], topk: int, calibrated: bool) -> Write:
    writer = csv.writer(out, lineterminator="\n")
    columns = [f"{what}_{n}" for n in range(1, topk + 1) for what in ("class", "probability")]
    writer.writerow(["file", *columns, *(("answer", "set") if calibrated else ())])
    shown = printable if out.isatty() else str  # a file has the exact names

    def write(file: str, ranked: Ranked, answer: Any = None) -> None:
        columns = ((shown(name), probability) for name, probability in ranked)
        row = [shown(file), *itertools.chain.from_iterable(columns)]
        if answer:
            best = "" if answer.none_of_these else shown(answer.classes[0])
            row += [best, json.dumps(answer.classes)]
        writer.writerow(row)

    return write


def _jsonl(out: Guarded, class_names: Sequence[str], topk: int, calibrated: bool) -> Write:
    def write(file: str, ranked: Ranked, answer: Any = None) -> None:
        predictions = [{"class": name, "probability": share} for name, share in ranked]
        result = {"file": file, "predictions": predictions}
        if answer:
            result["answer"] = None if answer.none_of_these else answer.classes[0]
            result["set"] = answer.classes
        out.write(json.dumps(result) + "\n")

    return write


FORMATS: dict[str, Callable[[Guarded, Sequence[str], int, bool], Write]] = {
    "table": _table,
    "csv": _csv,
    "jsonl": _jsonl,
}

FLAGS = cli.common_flags("checkpoint", "ema", "tta", "average")
flags.DEFINE_multi_string("run", None, "The run's folder; several.", flag_values=FLAGS)
flags.DEFINE_integer("topk", 5, "How many classes.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("format", "table", FORMATS, "Format of the result.", flag_values=FLAGS)
flags.DEFINE_string("features", None, "A file for the features, .npz.", flag_values=FLAGS)
flags.DEFINE_bool("calibrated", True, "Whether to use a calibration.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 64, "Images per batch.", lower_bound=1, flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    arguments = cli.parse(FLAGS, argv, __doc__, others=True)
    cli.check_run(FLAGS.run)
    cli.check_pictures(arguments)
    if FLAGS.features:
        cli.check_folder("features", FLAGS.features)
    files = cli.find_pictures(arguments)
    first = list(itertools.islice(files, FLAGS.batch_size))
    if not first:
        raise ConfigError(f"there are no pictures in {', '.join(arguments)}")

    from flaxcls.runtime import compilation_cache  # JAX, which takes seconds: not for --help

    compilation_cache.enable()
    classifier = _classifier(len(first))
    runs = ", ".join(map(printable, FLAGS.run))
    say(f"flaxcls: {runs}, {classifier.describe()}", error=True)
    predict(classifier, itertools.chain(first, files))
    return 0


def _classifier(batch_size: int) -> Any:
    """Of the run, or the ensemble of the runs, that the flags name."""
    from flaxcls.inference.ensemble import Ensemble
    from flaxcls.inference.predictor import Predictor

    options = {name: FLAGS[name].value for name in ("checkpoint", "ema", "tta")}
    options["batch_size"] = batch_size
    if len(FLAGS.run) > 1:
        return Ensemble(FLAGS.run, average=FLAGS.average, **options)
    return Predictor(FLAGS.run[0], calibrated=FLAGS.calibrated, **options)


def predict(predictor: Any, files: Iterable[str]) -> None:
    """Writes the result as the flags say; DataError, after that, for files that can't be read.

    Raises OutputError at once if standard output can't be written.
    """
    class_names = predictor.class_names
    topk = min(FLAGS.topk, len(class_names))
    readable = unreadable = 0

    def report(error: DataError) -> None:
        nonlocal unreadable
        unreadable += 1
        say(f"flaxcls: {printable(str(error))}", error=True)

    out = Guarded(result=True, exact=True)
    write = FORMATS[FLAGS.format](out, class_names, topk, predictor.calibration is not None)
    with features_file(FLAGS.features) as add_features:
        for names, predictions in predictor.files(files, report):
            best = np.argsort(-predictions.logits, axis=1, kind="stable")[:, :topk]
            shares = np.take_along_axis(predictions.probabilities, best, axis=1)
            answers = predictor.answers(predictions)
            for name, labels, row, answer in zip(names, best, shares, answers, strict=True):
                classes = (class_names[label] for label in labels)
                probabilities = (float(f"{share:.6g}") for share in row)
                write(name, list(zip(classes, probabilities, strict=True)), answer)
            out.flush()
            add_features(names, predictions.features)
            readable += len(names)
    if unreadable:
        raise DataError(
            f"{unreadable:,} of {unreadable + readable:,} files could not be read; "
            "they are named above"
        )


@contextlib.contextmanager
def features_file(path: str | None) -> Iterator[Callable[[Sequence[str], np.ndarray], None]]:
    """Yields a function that takes files and their features; at the end they are in the file.

    Until then the features are in a nameless file beside it; of the names there is a list.
    """
    if path is None:
        yield lambda files, features: None
        return
    target, names = Path(path).absolute(), []
    with contextlib.ExitStack() as stack:
        with _writing(path):
            rows = stack.enter_context(tempfile.TemporaryFile(dir=target.parent))

        def add(files: Sequence[str], features: np.ndarray) -> None:
            names.extend(files)
            with _writing(path):
                rows.write(features.astype("<f4").tobytes())

        yield add
        if names:
            with _writing(path):
                _save(target, rows, names)


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--features={path} can't be written: {error.strerror}") from error


def _save(path: Path, rows: IO[bytes], names: Sequence[str]) -> None:
    """Writes the float32 values in `rows` and the names as an .npz file, atomically."""
    shape = (len(names), rows.tell() // (4 * len(names)))
    rows.seek(0)
    with atomic_write(path) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("features.npy", "w", force_zip64=True) as member:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            shutil.copyfileobj(rows, member, 2**20)
        with archive.open("files.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, np.array(names))


if __name__ == "__main__":
    cli.run(main)
