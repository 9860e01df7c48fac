"""Pictures in files of their own: the source that reads them, and how they divide into splits.

`flaxcls/data/folder.py` finds the files and their classes in folders, `flaxcls/data/listed.py` in a
list.
"""

import hashlib
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flaxcls.data.source import (
    Example,
    Ignored,
    Source,
    fingerprint,
    resolve_split,
    some_names,
    take_slices,
)
from flaxcls.data.storage import read_picture
from flaxcls.errors import ConfigError
from flaxcls.remote import is_remote, join
from flaxcls.runtime.output import printable

EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff")  # any case

# Of pictures that are not read, to report them apart from other files.
NOT_READ = ("avif", "heic", "heif", "jp2", "jxl", "svg", "ico", "psd", "ppm", "pgm", "exr", "hdr")
NOT_READ += ("arw", "cr2", "cr3", "dng", "nef", "orf", "raf", "rw2")  # of cameras

VALIDATION = ("val", "valid", "validation")
HELD_OUT = (*VALIDATION, "test")
SPLITS = {name: name for name in ("train", *HELD_OUT)} | {"training": "train", "testing": "test"}


class Files(NamedTuple):
    """Files and what they show, of all the splits that were listed."""

    paths: list[str]  # relative to the source's root, or absolute
    sizes: np.ndarray  # int64 [N], bytes; -1 where not known
    labels: np.ndarray  # int32 [N]
    times: np.ndarray | None = None  # int64 [N], nanoseconds since 1970 when each was written


class FileSource(Source):
    """Some of the files, by a split of `splits`: the indices of its files, in order.

    An example's image is its file's bytes, read when it is asked for, if they are no more than
    `max_bytes`.
    """

    def __init__(
        self,
        *,
        name: str,
        split: str,
        root: str,
        class_names: Sequence[str],
        files: Files,
        splits: Mapping[str, np.ndarray],
        channels: int,
        max_bytes: int,
        there: Collection[str],
        ignored: Ignored = Source.ignored,
    ):
        sizes = {key: [len(indices)] for key, indices in splits.items()}
        known = known_split(split, splits)
        if sizes.get("validation") == [0] and "validation" in known:
            raise ConfigError(_nothing_held_out(name, split, class_names, files))
        order = take_slices(splits, resolve_split(known, sizes))
        self.root, self._max_bytes = root, max_bytes
        self._paths = [files.paths[index] for index in order]
        self._sizes, self._labels = files.sizes[order], files.labels[order]
        content = hashlib.sha256("\0".join(self._paths).encode("utf-8", "surrogateescape"))
        content.update(self._sizes.astype("<i8").tobytes())
        content.update(self._labels.astype("<i4").tobytes())
        super().__init__(
            name=name,
            split=split,
            class_names=class_names,
            image_shape=(None, None, channels),
            fingerprint=fingerprint(
                name=name, class_names=class_names, content=content.hexdigest()
            ),
            splits=there,
        )
        self.ignored = ignored
        self.is_remote = is_remote(root) or any(map(is_remote, self._paths))
        if files.times is not None:
            last = int(np.argmax(files.times[order]))
            self.modified = float(files.times[order[last]] / 1e9), self.where(last)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Example:
        size, where = int(self._sizes[index]), self.where(index)
        picture = read_picture(self.file(index), where, self._max_bytes, size)
        return Example(picture, int(self._labels[index]))

    def labels(self) -> np.ndarray:
        return self._labels.copy()

    def where(self, index: int) -> str:
        return printable(self.file(index))

    def file(self, index: int) -> str:
        return join(self.root or "", self._paths[index])


def _nothing_held_out(name: str, split: str, class_names: Sequence[str], files: Files) -> str:
    counts = np.bincount(files.labels, minlength=len(class_names))
    some = ", ".join(
        f"'{text}' has {count}" for text, count in [*zip(class_names, counts, strict=True)][:3]
    )
    more = f" and so on for {len(counts) - 3:,} more" if len(counts) > 3 else ""
    others = "a column of splits" if name == "list" else "DIR/val/CLASS/* beside DIR/train/CLASS/*"
    return (
        f"split '{split}' is empty: a part of each class is held out, but none of the "
        f"{len(counts):,} has two pictures ({some}{more}); add pictures, or say which ones are "
        f"evaluated on by {others}"
    )


def known_split(split: str, there: Collection[str]) -> str:
    """A split such as "train+valid[:5%]" by the names of the splits that are there.

    All names of held-out data mean the same where there is only one such split, so that a recipe
    need not know what a folder calls its own; "val", "valid" and "validation" always do.

    Raises:
      ConfigError: a name that none of the splits has, or more than one could have.
    """
    parts = [part.strip().partition("[") for part in split.split("+")]
    return "+".join(_named(name, there) + bracket + span for name, bracket, span in parts)


def asked_splits(split: str, there: Collection[str]) -> list[str]:
    """The splits that are there and that a split such as "train+valid[:5%]" is made of."""
    names = {part.partition("[")[0] for part in known_split(split, there).split("+")}
    return sorted(there if "all" in names else names)


def _named(name: str, there: Collection[str]) -> str:
    if name in there or name == "all":
        return name
    for same in (VALIDATION, HELD_OUT):
        found = [other for other in there if other in same]
        if name in same and len(found) == 1:
            return found[0]
    raise ConfigError(f"unknown split '{name}'; there is {', '.join(there)}")


def divide(
    files: Files, split_of: np.ndarray | None, *, held_out: float, seed: int
) -> dict[str, np.ndarray]:
    """The indices of the files in each split, in an order that `seed` shuffles.

    Slices such as "train[:90%]" are thus samples of all classes. Files without splits are divided:
    a share of every class is held out as "validation", at least one file where the class has two,
    but never all. The order is that of a hash of the names, so that pictures which are added or
    taken away later hardly move others from one split to the other.

    Args:
      split_of: the name of every file's split, or None.
      held_out: share of a class for validation, between 0 and 1.
      seed: at least 0.
    """
    order = np.argsort([_hash(path, seed) for path in files.paths], kind="stable")
    if split_of is not None:
        return {name: order[split_of[order] == name] for name in np.unique(split_of).tolist()}
    counts = np.bincount(files.labels)
    quotas = np.where(counts > 1, np.round(counts * held_out).clip(1, counts - 1), 0)
    by_class = np.argsort(files.labels[order], kind="stable")
    rank_in_class = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    validation = np.zeros(len(order), bool)
    validation[by_class] = rank_in_class < np.repeat(quotas, counts)
    return {"train": order[~validation], "validation": order[validation]}


def _hash(path: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed} {path}".encode(errors="surrogateescape"), digest_size=7)
    return int.from_bytes(digest.digest())


def class_labels(
    classes: Mapping[str, set[str]], class_names: Sequence[str] | None
) -> Sequence[str]:
    """The names of the classes by their labels: the sorted ones, or those that are known already.

    Args:
      classes: the names found in each split, by what a sentence calls it; training's comes first.
      class_names: the classes of a network that is there; None: it is going to be trained on these.

    Raises:
      ConfigError: less than two classes, or not the same ones everywhere; with `class_names` one
        that is none of them.
    """
    if class_names is None:
        check_classes(classes)
        return sorted(next(iter(classes.values())))
    known = {*class_names}
    for where, names in classes.items():
        if unknown := sorted(names - known):
            raise ConfigError(
                f"class {some_names(unknown)} in {where} is none of the {len(known):,} known "
                f"classes, which are {some_names(class_names)}"
            )
    return tuple(class_names)


def check_classes(classes: Mapping[str, set[str]]) -> None:
    """Raises a ConfigError unless there are two classes or more, and the same ones everywhere.

    `classes` are the names found in each split, by what a sentence calls it; training's come first.
    """
    (train_where, train), *others = classes.items()
    if len(train) < 2:
        raise ConfigError(
            f"{train_where} has a single class, '{min(train)}': a classifier needs two or more"
        )
    for where, names in others:
        for only, has, lacks in (
            (names - train, where, train_where),
            (train - names, train_where, where),
        ):
            if only:
                raise ConfigError(
                    f"class {some_names(sorted(only))} is in {has} but not in {lacks}: "
                    "all splits must have the same classes"
                )


def class_name(text: str) -> str:
    """The name that is meant, whichever way its accents are encoded (macOS has its own)."""
    return unicodedata.normalize("NFC", printable(text))


def is_picture(name: str, extensions: Sequence[str] = EXTENSIONS) -> bool:
    """Whether a file's name ends as an image's does."""
    _, dot, extension = name.rpartition(".")
    return dot != "" and extension.lower() in extensions
