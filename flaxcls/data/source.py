"""A Source is one split of a data set: random access to its examples, and what is known of them.

Importing this module costs nothing: TFDS, OpenCV and the data themselves are loaded by the source
that needs them.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from flaxcls.config.user_code import file_of, in_user_code
from flaxcls.errors import ConfigError, DataError
from flaxcls.runtime.cores import available_cores
from flaxcls.runtime.read_ahead import in_order

WAITING = 8  # threads a core that hide a latency of some 50 ms from decoding of some 6 ms


class Example(NamedTuple):
    """One example: encoded bytes or uint8 [H, W, C], and its class (not yet checked)."""

    image: bytes | np.ndarray
    label: int


class Ignored(NamedTuple):
    """Files in a folder of pictures that are no examples, by their paths."""

    not_read: tuple[str, ...] = ()  # pictures of a format that is not read
    misplaced: tuple[str, ...] = ()  # pictures beside the folders of the classes
    others: tuple[str, ...] = ()

    @property
    def pictures(self) -> tuple[str, ...]:
        return self.not_read + self.misplaced

    def sentence(self) -> str:
        """What is said of the ignored pictures; empty where there are none."""
        formats = sorted({os.path.splitext(name)[1].lower() for name in self.not_read})
        parts = []
        if formats:
            parts.append(f"{len(self.not_read):,} whose format is not read ({', '.join(formats)})")
        if self.misplaced:
            parts.append(f"{len(self.misplaced):,} beside the folders of the classes")
        return f"pictures that are ignored: {' and '.join(parts)}" if parts else ""


def all_ignored(sources: Iterable["Source"]) -> Ignored:
    """What any of the sources ignores."""
    kinds = zip(*(source.ignored for source in sources), strict=True)
    return Ignored(*(tuple(sorted({*itertools.chain(*kind)})) for kind in kinds))


class Source:
    """One split (or slices of splits) of a data set, in a fixed order, safe to read in threads.

    Attributes:
      name: what the user calls the data set.
      split: the split as it was asked for, e.g. "train[:90%]".
      class_names: the name of every class; an example's label is an index into them.
      image_shape: (height, width, channels) of every image, None where it varies.
      fingerprint: 16 hex digits that say which data these are: equal on every host, different
        when examples, their order or their number differ.
      splits: the names of the splits that the data set has.
      ignored: the files that are no examples, of a folder.
      is_remote: whether reading an example waits for the cloud, so that many threads should.
      is_readable: whether it has examples, and not only what is known of them.
      modified: when the example written last was, in seconds since 1970, and where it is; None
        where the examples are not files of their own.
      root: the folder that the examples' files are in, unless they are elsewhere; None as above.
    """

    ignored = Ignored()
    is_remote = False
    is_readable = True
    modified: tuple[float, str] | None = None
    root: str | None = None

    def __init__(
        self,
        *,
        name: str,
        split: str,
        class_names: Sequence[str],
        image_shape: tuple[int | None, int | None, int],
        fingerprint: str,
        splits: Iterable[str] = (),
    ):
        self.name = name
        self.split = split
        self.class_names = tuple(class_names)
        self.image_shape = image_shape
        self.fingerprint = fingerprint
        self.splits = tuple(splits)

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError

    def verify(self, index: int) -> None:
        """Raises DataError if what is stored of an example fails a checksum, if it has one."""

    def labels(self) -> np.ndarray:
        """Every example's label, int32 [N]; reads the whole split where nothing better is known."""
        found = (self[i].label for i in range(len(self)))
        if self.is_remote:
            found = in_order(lambda i: self[i].label, range(len(self)), reading_threads(True))
        return np.fromiter(found, np.int32, len(self))

    def where(self, index: int) -> str:
        """How an error message names an example."""
        return f"example {index} of {self.name} '{self.split}'"

    def file(self, index: int) -> str | None:
        """The path of an example's file; None where the examples are not files of their own."""
        return None


def reading_threads(is_remote: bool) -> int:
    """How many threads read and decode at a time: one a core, or `WAITING` where most wait."""
    return available_cores() * (WAITING if is_remote else 1)


class Subset(Source):
    """Some examples of a split, as a split of their own.

    Attributes:
      whole: the split.
      indices: of the examples in it, int [N], without repetition.
    """

    def __init__(self, whole: Source, indices: np.ndarray, split: str):
        content = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()
        super().__init__(
            name=whole.name,
            split=split,
            class_names=whole.class_names,
            image_shape=whole.image_shape,
            fingerprint=fingerprint(whole=whole.fingerprint, indices=content),
            splits=whole.splits,
        )
        self.whole, self.indices = whole, indices
        self.ignored, self.is_readable = whole.ignored, whole.is_readable
        self.is_remote = whole.is_remote
        self.modified, self.root = whole.modified, whole.root

    def others(self) -> "Subset":
        """The examples of the split that are not in this one."""
        rest = np.setdiff1d(np.arange(len(self.whole)), self.indices)
        return Subset(self.whole, rest, f"{self.whole.split} without {self.split}")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.whole[int(self.indices[index])]

    def verify(self, index: int) -> None:
        self.whole.verify(int(self.indices[index]))

    def labels(self) -> np.ndarray:
        return self.whole.labels()[self.indices]

    def where(self, index: int) -> str:
        return self.whole.where(int(self.indices[index]))

    def file(self, index: int) -> str | None:
        return self.whole.file(int(self.indices[index]))


def check_own_source(name: str, source: Any) -> None:
    """Raises ConfigError unless a user's own source is one, which its first example shows."""
    if not isinstance(source, Source):
        raise ConfigError(
            f"config.data.name is {name!r}, which must give a flaxcls.data.source.Source, "
            f"got {type(source).__name__}"
        )
    if not len(source):
        raise ConfigError(f"split '{source.split}' of {name} has no examples")
    with in_user_code(file_of(type(source))):
        example = source[0]
    is_one = isinstance(example, Example)
    image, label = example if is_one else (None, None)
    if isinstance(image, np.ndarray):
        wanted = zip(image.shape, source.image_shape, strict=False)
        fits = image.dtype == np.uint8 and image.ndim == len(source.image_shape) == 3
        is_one = fits and all(size in (side, None) for side, size in wanted)
    elif not isinstance(image, bytes):
        is_one = False
    if not is_one or not 0 <= label < len(source.class_names):
        got = f"an image {image.dtype} {image.shape}" if hasattr(image, "shape") else repr(image)
        raise ConfigError(
            f"the examples of {name} must be flaxcls.data.source.Example(image, label), with an "
            f"image uint8 {source.image_shape} or encoded bytes and a label below "
            f"{len(source.class_names)}, got {got:.60} and label {label!r} for number 0"
        )


class Slice(NamedTuple):
    """The examples `start` to `stop` (exclusive) of one split."""

    split: str
    start: int
    stop: int


def resolve_split(spec: str, shard_lengths: Mapping[str, Sequence[int]]) -> list[Slice]:
    """What a split in TFDS's language means for these splits; TFDS itself parses it.

    Args:
      spec: e.g. "train", "train[:90%]", "train[10%:20%]", "train[100:-50]", "train+test".
      shard_lengths: the number of examples in every shard of every split.

    Raises:
      ConfigError: an unknown split, a malformed or an empty slice, one beyond 100 % or the end.
    """
    if spec in shard_lengths:
        slices = [Slice(spec, 0, sum(shard_lengths[spec]))]
    else:
        slices = _parse_split(spec, shard_lengths)
    if spec == "all":  # that one of them is empty is no mistake of whoever asks for all
        slices = [part for part in slices if part.start < part.stop] or slices
    for part in slices:
        if part.start >= part.stop:
            size = sum(shard_lengths[part.split])
            raise ConfigError(f"split '{spec}' is empty: '{part.split}' has {size} examples")
    return slices


def _parse_split(spec: str, shard_lengths: Mapping[str, Sequence[int]]) -> list[Slice]:
    from tensorflow_datasets.core import ReadInstruction

    sizes = {name: sum(lengths) for name, lengths in shard_lengths.items()}
    for name in (part.partition("[")[0].strip() for part in spec.split("+")):
        if name not in (*sizes, "all"):
            raise ConfigError(f"unknown split '{name}'; there is {', '.join(sizes)}")
    infos = {
        name: SimpleNamespace(num_examples=sizes[name], shard_lengths=list(lengths))
        for name, lengths in shard_lengths.items()
    }
    try:
        parts = ReadInstruction.from_spec(spec).to_absolute(infos)
    except (ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[-1].partition(". ")[0]
        raise ConfigError(f"split '{spec}' is not a slice of the data: {reason}") from error
    return [
        Slice(
            part.splitname, part.from_ or 0, sizes[part.splitname] if part.to is None else part.to
        )
        for part in parts
    ]


def take_slices(indices: Mapping[str, np.ndarray], slices: Sequence[Slice]) -> np.ndarray:
    """The concatenation of the slices of every split's array."""
    return np.concatenate([indices[part.split][part.start : part.stop] for part in slices])


def count_classes(labels: np.ndarray, num_classes: int, user: str) -> np.ndarray:
    """How many examples each class has, int [num_classes], for a `user` that needs some of all.

    `labels` are int [N]. Raises DataError if one is out of range or a class has no example.
    """
    labels = np.asarray(labels)
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        raise DataError(
            f"labels must be from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}"
        )
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        missing = int(np.argmin(counts))
        raise DataError(f"{user} needs examples of every class; {missing} has none")
    return counts


def some_names(names: Sequence[str]) -> str:
    """Names of classes in a sentence: the first three, and how many more there are."""
    some = ", ".join(f"'{name}'" for name in names[:3])
    return some + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def fingerprint(**content: Any) -> str:
    """16 hex digits of the SHA-256 of JSON content; key order does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
