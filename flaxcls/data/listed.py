"""A list of pictures: rows of CSV, or objects of JSONL, with path, label and perhaps split."""

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np

from flaxcls.data.files import (
    SPLITS,
    Files,
    FileSource,
    asked_splits,
    class_labels,
    class_name,
    divide,
    is_picture,
)
from flaxcls.data.storage import open_text
from flaxcls.errors import ConfigError, DataError
from flaxcls.remote import is_remote
from flaxcls.runtime.output import printable, say

# What the columns of other people's lists are called, in any case; "file name" is file_name too.
_COLUMNS = {
    "path": (
        *("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
        *("image_file", "image_name", "img", "img_path"),
    ),
    "label": ("label", "labels", "class", "class_name", "category", "target"),
    "split": ("split",),
}
_REQUIRED = ("path", "label")
_OR_NO_HEADER = "; a list without names of columns has path,label or path,label,split in each row"
_DELIMITERS = ",;\t"
_INTEGER = re.compile("-?(0|[1-9][0-9]{0,17})")


class _Row(NamedTuple):
    path: str
    label: str
    split: str  # empty where the list has none


def open_list(
    split: str,
    path: str,
    *,
    held_out: float,
    split_seed: int,
    channels: int,
    max_bytes: int,
    class_names: Sequence[str] | None = None,
) -> FileSource:
    """Opens a split of a list; see `flaxcls.data.open_list`. Reads no file but the list.

    With `class_names`, those of a network, a split needs no training split beside it, and may lack
    some of the classes.

    Raises:
      ConfigError: no such list, an unknown split, or classes that don't fit together.
      DataError: a row is not as it should be; the sentence begins with its line.
    """
    path = os.path.expanduser(path)
    rows = [row for _, row in _rows(path)]
    there = sorted({row.split for row in rows})
    if not rows:
        raise ConfigError(f"{printable(path)} has no rows; each should be a path and a label")
    has_splits = there != [""]
    to_train = class_names is None
    if has_splits and to_train and "train" not in there:
        raise ConfigError(
            f"{printable(path)} has no rows of split train, only of {', '.join(there)}"
        )
    asked = asked_splits(split, there) if has_splits else [""]
    if has_splits and to_train:
        asked = ["train", *asked]
    classes = {part: {row.label for row in rows if row.split == part} for part in asked}
    found = class_labels(
        {f"split '{part}' of {path}" if part else path: classes[part] for part in asked},
        class_names,
    )
    class_names = found
    if to_train:
        class_names = _class_names({*found}, path, len(rows))
        _say_missing(class_names, {*found}, path)
    index = {name: number for number, name in enumerate(class_names)}
    files = Files(
        paths=[row.path for row in rows],
        sizes=np.full(len(rows), -1),
        labels=np.array([index.get(row.label, -1) for row in rows], np.int32),
    )
    split_of = np.array([row.split for row in rows]) if has_splits else None
    return FileSource(
        name="list",
        split=split,
        root=os.path.dirname(path),
        class_names=class_names,
        files=files,
        splits=divide(files, split_of, held_out=held_out, seed=split_seed),
        channels=channels,
        max_bytes=max_bytes,
        there=there if has_splits else ("train", "validation"),
    )


def contents(path: str) -> tuple[list[str], list[str]]:
    """The splits of a list, and the names of all classes that any of them has, sorted.

    The splits need not fit together, as they must for `open_list`, whose errors it raises.
    """
    path = os.path.expanduser(path)
    rows = [row for _, row in _rows(path)]
    there = sorted({row.split for row in rows} - {""})
    labels = {row.label for row in rows}
    return there or ["train", "validation"], _class_names(labels, path, len(rows)) if rows else []


def _class_names(labels: set[str], path: str, num_rows: int) -> list[str]:
    """The labels, sorted; where all are integers, the numbers from 0 to the largest."""
    if not all(map(_INTEGER.fullmatch, labels)):
        return sorted(labels)
    numbers = sorted(map(int, labels))
    for number in (numbers[0], numbers[-1]):
        if not 0 <= number < num_rows:
            line = next(line for line, row in _rows(path) if row.label == str(number))
            raise _bad(path, line, f"label {number} is not the number of a class, counted from 0")
    return [str(number) for number in range(numbers[-1] + 1)]


def _say_missing(class_names: Sequence[str], labels: set[str], path: str) -> None:
    if missing := [name for name in class_names if name not in labels]:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        say(
            f"flaxcls: {len(missing)} of {len(class_names)} classes in {printable(path)} have no "
            f"rows: {some}",
            error=True,
        )


def _rows(path: str) -> Iterator[tuple[int, _Row]]:
    """Every row and the number of its line; the list's form is checked, not the files."""
    read = _READERS.get(os.path.splitext(path)[1].lower())
    if not is_remote(path) and os.path.isdir(path):
        raise ConfigError(
            f"config.data.path must be a .csv or .jsonl file for list, but {path} is a folder, "
            "which config.data.name = 'folder' is for"
        )
    if read is None:
        raise ConfigError(f"config.data.path must be a .csv or .jsonl file, got {printable(path)}")
    has_split = None
    try:
        with open_text(path) as file:
            for line, record in read(path, file):
                row = _checked(path, line, record)
                has_split = bool(row.split) if has_split is None else has_split
                if bool(row.split) != has_split:
                    raise _bad(path, line, "either all rows have a split, or none")
                yield line, row
    except OSError as error:
        raise ConfigError(
            f"config.data.path: {printable(path)} cannot be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{printable(path)} is not UTF-8 text") from error


def _checked(path: str, line: int, record: dict[str, Any]) -> _Row:
    file, label, split = (record.get(column) for column in _COLUMNS)
    label = str(label) if type(label) is int else label
    for column, text in (("path", file), ("label", label)):
        if not isinstance(text, str) or not text.strip() or not _encodable(text):
            raise _bad(path, line, f"{column} must be text, got {record.get(column)!r}")
    split = str(split or "").strip()
    if split and split.lower() not in SPLITS:
        raise _bad(path, line, f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return _Row(file, sys.intern(class_name(label.strip())), SPLITS.get(split.lower(), ""))


def _encodable(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # half a character, which JSON can write
        return False


def _csv_records(path: str, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    delimiter, has_header, names = _form(path, file)
    file.seek(0)
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    try:
        rows = (cells for cells in reader if any(cells))
        columns = {name: name for name in names}
        if has_header:
            next(rows, None)  # there is none where all cells are empty
            columns = _columns(path, reader.line_num, names)
        for cells in rows:
            if len(cells) != len(names):
                expected, got = delimiter.join(names), delimiter.join(cells)
                raise _bad(path, reader.line_num, f"must be {expected}, got {got}")
            record = dict(zip(names, cells, strict=True))
            yield reader.line_num, {column: record[name] for column, name in columns.items()}
    except csv.Error as error:
        raise _bad(path, reader.line_num, f"not CSV: {error}") from error


def _form(path: str, file: TextIO) -> tuple[str, bool, list[str]]:
    """What separates the cells, whether the first row has their names, and these."""
    for delimiter in _DELIMITERS:
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            cells = next((cells for cells in reader if any(cells)), [])
        except csv.Error as error:
            if delimiter == _DELIMITERS[-1]:
                raise _bad(path, reader.line_num, f"not CSV: {error}") from error
            continue
        if 2 <= len(cells) <= len(_COLUMNS) and is_picture(cells[0]):
            return delimiter, False, [*_COLUMNS][: len(cells)]
        if any(_plain(cell) in names for names in _COLUMNS.values() for cell in cells[1:]):
            return delimiter, True, cells
    file.seek(0)
    first = next((line.strip() for line in file if line.strip()), "")
    delimiter = max(_DELIMITERS, key=first.count)
    return delimiter, bool(first), first.split(delimiter)


def _columns(path: str, line: int, names: Collection[str]) -> dict[str, str]:
    """Which of the names is the path's, the label's and, if there is one, the split's."""
    called = ", ".join(map(repr, names))
    columns = {}
    for column, known in _COLUMNS.items():
        exact, similar = ([n for n in names if _plain(n) in some] for some in ((column,), known))
        found = exact or similar
        if len(found) > 1:
            raise _bad(
                path,
                line,
                f"of the columns {called}, {' and '.join(map(repr, found))} may each be the "
                f"{column}: call the one that is meant {column!r}, and no other",
            )
        if not found and column in _REQUIRED:
            raise _bad(
                path,
                line,
                f"the columns are called {called}; none is the {column}, which would be called "
                f"{', '.join(known)}{_OR_NO_HEADER}",
            )
        if found:
            columns[column] = found[0]
    return columns


def _plain(name: str) -> str:
    return re.sub("[ -]", "_", name.strip().lower())


def _json_records(path: str, file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    columns = None
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise _bad(path, number, f"not JSON: {why}") from error
        if not isinstance(record, dict):
            raise _bad(path, number, "must be an object with path and label")
        if columns is None:
            columns = {"split": "split", **_columns(path, number, record)}
        yield number, {column: record.get(name) for column, name in columns.items()}


def _bad(path: str, line: int, what: str) -> DataError:
    return DataError(printable(f"{path}, line {line}: {what}"))


_READERS: dict[str, Callable[[str, TextIO], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".csv": _csv_records,
    ".jsonl": _json_records,
}
