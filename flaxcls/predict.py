"""Classifies pictures by a saved run.

    python -m flaxcls.predict --run=DIR FILES-or-FOLDERS... [--topk=5] [--format=table|csv|jsonl]

needs the run's folder and the pictures, nothing else. Folders are searched with all that is below
them, in alphabetical order. Standard output holds the result and nothing else, in the order of the
files:

  table  a line for every class: file, class and probability; separated by tabs unless on a terminal
  csv    a line for every file, below the names of the columns:
         file,class_1,probability_1,class_2,probability_2,...
  jsonl  a line for every file: {"file": ..., "predictions": [{"class": ..., "probability": ...}]}

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
import os
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
Write = Callable[[str, Ranked], Any]  # the result of a file


def _plain_table(out: Guarded, class_names: Sequence[str], topk: int) -> Write:
    def write(file: str, ranked: Ranked) -> None:
        for name, probability in ranked:
            out.write(f"{printable(file)}\t{printable(name)}\t{probability:.4f}\n")

    return write


def _terminal_table(out: Guarded, class_names: Sequence[str], topk: int) -> Write:
    from rich.console import Console
    from rich.table import Table

    console = Console(file=out, highlight=False, markup=False, emoji=False)
    width = min(max(len(printable(name)) for name in class_names), console.width // 2)

    def write(file: str, ranked: Ranked) -> None:
        table = Table.grid(padding=(0, 2), expand=True)  # of its own, as files come one by one
        table.add_column(ratio=1, overflow="fold")
        table.add_column(width=width, overflow="ellipsis", no_wrap=True)
        table.add_column(width=7, justify="right")
        for rank, (name, probability) in enumerate(ranked):
            style = "bold" if rank == 0 else "dim"
            label = "" if rank else printable(file)
            table.add_row(label, printable(name), f"{probability:.2%}", style=style)
        console.print(table)

    return write


def _table(out: Guarded, class_names: Sequence[str], topk: int) -> Write:
    return (_terminal_table if out.isatty() else _plain_table)(out, class_names, topk)


def _csv(out: Guarded, class_names: Sequence[str], topk: int) -> Write:
    writer = csv.writer(out, lineterminator="\n")
    ranks = range(1, topk + 1)
    writer.writerow(["file", *(f"{what}_{n}" for n in ranks for what in ("class", "probability"))])
    shown = printable if out.isatty() else str  # a file has the exact names

    def write(file: str, ranked: Ranked) -> None:
        columns = ((shown(name), probability) for name, probability in ranked)
        writer.writerow([shown(file), *itertools.chain.from_iterable(columns)])

    return write


def _jsonl(out: Guarded, class_names: Sequence[str], topk: int) -> Write:
    def write(file: str, ranked: Ranked) -> None:
        predictions = [{"class": name, "probability": share} for name, share in ranked]
        out.write(json.dumps({"file": file, "predictions": predictions}) + "\n")

    return write


FORMATS: dict[str, Callable[[Guarded, Sequence[str], int], Write]] = {
    "table": _table,
    "csv": _csv,
    "jsonl": _jsonl,
}

FLAGS = flags.FlagValues()
flags.DEFINE_string("run", None, "The run's folder.", flag_values=FLAGS)
flags.DEFINE_integer("topk", 5, "How many classes.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("format", "table", FORMATS, "Format of the result.", flag_values=FLAGS)
flags.DEFINE_string("features", None, "A file for the features, .npz.", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "Which one: last, best or a step.", flag_values=FLAGS)
flags.DEFINE_bool("ema", None, "Averaged parameters, or not; the better ones.", flag_values=FLAGS)
flags.DEFINE_string("tta", None, "As of flaxcls.evaluate: flip, none.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 64, "Images per batch.", lower_bound=1, flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    arguments = cli.parse(FLAGS, argv, __doc__, others=True)
    if FLAGS.run is None:
        raise ConfigError("--run=DIR is missing; it is the folder that training made")
    if not arguments:
        raise ConfigError("no pictures are given: name files, or folders that hold them")
    if not any(map(os.path.exists, arguments)):
        raise ConfigError(f"there is no file {arguments[0]}")
    if FLAGS.features:
        cli.check_folder("features", FLAGS.features)
    files = cli.find_pictures(arguments)
    first = list(itertools.islice(files, FLAGS.batch_size))
    if not first:
        raise ConfigError(f"there are no pictures in {', '.join(arguments)}")

    from flaxcls.inference.predictor import Predictor
    from flaxcls.runtime import compilation_cache  # JAX, which takes seconds: not for --help

    compilation_cache.enable()
    predictor = Predictor(
        FLAGS.run,
        checkpoint=FLAGS.checkpoint,
        ema=FLAGS.ema,
        batch_size=len(first),
        tta=FLAGS.tta,
    )
    say(f"flaxcls: {printable(FLAGS.run)}, {predictor.describe()}", error=True)
    predict(predictor, itertools.chain(first, files))
    return 0


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
    write = FORMATS[FLAGS.format](out, class_names, topk)
    with features_file(FLAGS.features) as add_features:
        for names, predictions in predictor.files(files, report):
            best = np.argsort(-predictions.logits, axis=1, kind="stable")[:, :topk]
            shares = np.take_along_axis(predictions.probabilities, best, axis=1)
            for name, labels, row in zip(names, best, shares, strict=True):
                classes = (class_names[label] for label in labels)
                probabilities = (float(f"{share:.6g}") for share in row)
                write(name, list(zip(classes, probabilities, strict=True)))
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
