"""Folds for cross-validation: "train, fold 3 of 5" is a part of "train".

"train, all but fold 3 of 5" is the rest of it. Folds are counted from 0; each example is in exactly
one, and every fold has its share of each class. Where there are groups, such as the pictures of one
patient, no two folds have examples of the same one. Folds have folds, too: "train, all but fold 3
of 5, fold 0 of 4".
"""

import csv
import os
import re
import warnings
from typing import NamedTuple

import numpy as np

from flaxcls.data.source import Source, Subset
from flaxcls.data.storage import open_text
from flaxcls.errors import ConfigError
from flaxcls.runtime.output import printable

_FOLD = re.compile(r"(.+), (all but )?fold (\d+) of (\d+)", re.ASCII)


class Fold(NamedTuple):
    """One of the `count` folds of a split or, with `is_rest`, all but that one."""

    split: str
    number: int
    count: int
    is_rest: bool = False

    def __str__(self) -> str:
        which = "all but fold" if self.is_rest else "fold"
        return f"{self.split}, {which} {self.number} of {self.count}"


def parse_fold(spec: str) -> Fold | None:
    """The fold that a split such as "train[:90%], fold 3 of 5" names; None if it names none."""
    match = _FOLD.fullmatch(spec)
    if match is None:
        return None
    split, rest, number, count = match.groups()
    fold = Fold(split, int(number), int(count), rest is not None)
    if fold.count < 2 or fold.number >= fold.count:
        raise ConfigError(
            f"split '{spec}': folds are counted from 0, and there must be two or more, as in "
            f"'{split}, fold 0 of 5'"
        )
    return fold


def whole_split(spec: str) -> str:
    """The split whose folds a split names, or their folds; itself if it names none."""
    fold = parse_fold(spec)
    return whole_split(fold.split) if fold else spec


def open_fold(whole: Source, fold: Fold, *, seed: int = 0, groups: str | None = None) -> Subset:
    """The examples of `fold` among those of `whole`, which is `fold.split` opened.

    Args:
      seed: another one divides the examples in another way.
      groups: a CSV file with the group of each example; see `read_groups`.
    """
    of_example = read_groups(groups, whole) if groups else None
    try:
        folds = assign_folds(whole.labels(), fold.count, seed=seed, groups=of_example)
    except ConfigError as error:
        raise ConfigError(f"split '{fold}': {error}") from error
    return Subset(whole, np.flatnonzero((folds == fold.number) != fold.is_rest), str(fold))


def assign_folds(
    labels: np.ndarray, count: int, *, seed: int = 0, groups: np.ndarray | None = None
) -> np.ndarray:
    """The fold of every example, int32 [N], stratified by the labels: scikit-learn's.

    Args:
      labels: int [N].
      count: of folds, 2 or more.
      seed: below 2**32.
      groups: of each example, int [N]: examples of one group come to one fold.

    Raises ConfigError where there are fewer examples, or fewer groups, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    of, what = (groups, "groups") if groups is not None else (np.arange(len(labels)), "examples")
    if len(np.unique(of)) < count:
        raise ConfigError(f"{len(np.unique(of)):,} {what} can't be divided into {count} folds")
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    division = kind(count, shuffle=True, random_state=seed)
    folds = np.full(len(labels), -1, np.int32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of rare classes, which some folds lack
        try:
            for number, (_, part) in enumerate(division.split(labels, labels, groups)):
                folds[part] = number
        except ValueError as error:  # no class is as large as that
            most = np.bincount(labels).max()
            raise ConfigError(
                f"no class has {count} examples, one for each fold; the largest has {most}"
            ) from error
    return folds


def read_groups(path: str, source: Source) -> np.ndarray:
    """The group of every example of a split, int [N], by a CSV file.

    Its first row names its columns: "group", and "file" or "index". A file is named by its path,
    absolute or in the folder of the data or of the CSV file; an index counts from 0 in the split
    that has the folds. Rows about other files do no harm.

    Raises ConfigError: no such file or column, an example without a group or with two.
    """
    path, column, rows = os.path.expanduser(path), "index", []
    try:
        with open_text(path) as file:
            table = csv.DictReader(file, strict=True)
            names = {name.strip().lower(): name for name in table.fieldnames or ()}
            column = next((name for name in ("file", "index") if name in names), None)
            if column is None or "group" not in names:
                raise ConfigError(
                    f"{printable(path)} must have the columns file,group or index,group, got "
                    f"{printable(','.join(names)) or 'nothing'}"
                )
            rows = [(row[names[column]] or "", row[names["group"]] or "") for row in table]
    except OSError as error:
        raise ConfigError(f"{printable(path)} can't be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{printable(path)} is not CSV: {error}") from error
    group_of = {}
    for name, group in rows:
        if group_of.setdefault(name.strip(), group.strip()) != group.strip():
            raise ConfigError(f"{printable(path)} has two groups for {column} {printable(name)}")
    found = [
        next((group_of[name] for name in _names(source, i, column, path) if name in group_of), "")
        for i in range(len(source))
    ]
    if "" in found:
        missing = found.index("")
        raise ConfigError(
            f"{printable(path)} has no group for {source.where(missing)} ({column} "
            f"{printable([*_names(source, missing, column, path)][-1])})"
        )
    return np.unique(found, return_inverse=True)[1]


def _names(source: Source, index: int, column: str, path: str) -> list[str]:
    """What an example may be called in a column of a file of groups; the shortest one is last."""
    if column == "index":
        return [str(index)]
    file = source.file(index)
    if file is None:
        raise ConfigError(
            f"{printable(path)} names files, but the examples of {source.name} are none: it must "
            "have the columns index,group"
        )
    folders = [os.path.dirname(path), *([source.root] if source.root is not None else [])]
    return [
        file,
        os.path.abspath(file),
        *(os.path.relpath(file, folder or ".") for folder in folders),
    ]
