"""Reads every example of a split once, and says what would break a run or falsify its result."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from flaxcls.data.decode import MAX_PIXELS, Picture
from flaxcls.data.source import Source
from flaxcls.data.statistics import channel_histogram
from flaxcls.errors import DataError
from flaxcls.runtime.progress import progress
from flaxcls.runtime.read_ahead import in_order

MAX_SHARED = 0.001  # of the evaluation split: it moves an accuracy by at most 0.1 points
_CHUNK = 32  # pictures that a thread reads at a time


@dataclasses.dataclass
class Scan:
    """What is known of a split whose examples have all been read.

    Attributes:
      source: the split.
      labels: int64 [N].
      sizes: height and width as a viewer shows the picture, int32 [N, 2].
      digests: SHA-256 of the bytes, "S32" [N].
      broken: what is wrong with the examples that can't be read, by index; nothing else is known
        of these.
      formats: how many pictures there are of each.
      histogram: how often a channel has each value, int64 [C, 256].
    """

    source: Source
    labels: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray
    broken: dict[int, str]
    formats: collections.Counter
    histogram: np.ndarray

    @property
    def readable(self) -> np.ndarray:
        """The indices of the examples that can be read."""
        return np.setdiff1d(np.arange(len(self.labels)), list(self.broken))

    @property
    def class_counts(self) -> np.ndarray:
        """How many readable examples each class has."""
        count = len(self.source.class_names)
        labels = self.labels[self.readable]
        return np.bincount(labels[(labels >= 0) & (labels < count)], minlength=count)


def scan(source: Source, threads: int, max_pixels: int = MAX_PIXELS) -> Scan:
    """Reads and decodes every example; keeps some 50 bytes of each."""
    count, channels = len(source), source.image_shape[2]
    result = Scan(
        source,
        labels=np.zeros(count, np.int64),
        sizes=np.zeros((count, 2), np.int32),
        digests=np.zeros(count, "S32"),
        broken={},
        formats=collections.Counter(),
        histogram=np.zeros((channels, 256), np.int64),
    )

    def read(chunk: range) -> tuple[dict[int, str], collections.Counter, np.ndarray]:
        broken, formats = {}, collections.Counter()
        histogram = np.zeros_like(result.histogram)
        for index in chunk:
            try:
                source.verify(index)
                image, result.labels[index] = source[index]
                pixels, file_format = image, "pixels"
                if isinstance(image, bytes):
                    where = source.where(index)
                    picture = Picture(image, channels, where=where, max_pixels=max_pixels)
                    file_format, pixels = picture.header.format, picture.pixels()
            except DataError as error:
                broken[index] = str(error)
                continue
            content = image if isinstance(image, bytes) else image.tobytes()
            result.digests[index] = hashlib.sha256(content).digest()
            result.sizes[index] = pixels.shape[:2]
            formats[file_format] += 1
            histogram += channel_histogram(pixels)
        return broken, formats, histogram

    size = 1 if source.is_remote else _CHUNK
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    with progress(f"reading {source.name} '{source.split}'", count) as advance:
        for chunk, (broken, formats, histogram) in zip(
            chunks, in_order(read, chunks, threads), strict=True
        ):
            result.broken.update(broken)
            result.formats.update(formats)
            result.histogram += histogram
            advance(len(chunk))
    return result


class Problem(NamedTuple):
    """Something that would break or falsify a run, or (no error) that is worth knowing."""

    is_error: bool
    sentence: str
    examples: list[str]


def find_problems(train: Scan, evaluations: Sequence[Scan], max_broken: float) -> list[Problem]:
    """What is wrong with each split and, of those to evaluate on, beside the one to train on."""
    problems = [
        *_unreadable(train, max_broken, "training replaces each by the next one"),
        *_wrong_labels(train),
        *_copies(train),
    ]
    for evaluation in evaluations:
        problems += [
            *_unreadable(evaluation, 0, ""),
            *_wrong_labels(evaluation),
            *_missing_classes(train, evaluation),
            *_shared(train, evaluation),
            *_copies(evaluation),
        ]
    return [*problems, *_empty_classes(train, evaluations)]


def _of(number: int, scan: Scan) -> str:
    total = len(scan.labels)
    share = 100 * number / total
    return f"{number:,} of the {total:,} pictures of '{scan.source.split}' ({share:.2f} %)"


def _unreadable(scan: Scan, allowed: float, otherwise: str) -> Iterator[Problem]:
    if not scan.broken:
        return
    is_error = len(scan.broken) > allowed * len(scan.labels)
    limit = "evaluation reads all or stops"
    if allowed:
        limit = f"config.input.max_broken = {allowed:g} allows fewer"
    yield Problem(
        is_error,
        f"unreadable: {_of(len(scan.broken), scan)}; {limit if is_error else otherwise}",
        [scan.broken[index] for index in sorted(scan.broken)],
    )


def _wrong_labels(scan: Scan) -> Iterator[Problem]:
    count, readable = len(scan.source.class_names), scan.readable
    labels = scan.labels[readable]
    wrong = readable[(labels < 0) | (labels >= count)]
    if len(wrong) and np.all(labels == -1):  # as TFDS has it, of ImageNet's test split for one
        yield Problem(False, f"no labels: {_of(len(wrong), scan)}; nothing can be evaluated", [])
    elif len(wrong):
        yield Problem(
            True,
            f"labels that are none of the {count:,} classes, 0 to {count - 1}: "
            f"{_of(len(wrong), scan)}",
            [f"{scan.source.where(index)} has label {scan.labels[index]}" for index in wrong],
        )


def _empty_classes(train: Scan, evaluations: Sequence[Scan]) -> Iterator[Problem]:
    counts = np.sum([scan.class_counts for scan in (train, *evaluations)], axis=0)
    yield from _classes(train, counts == 0, False, "without any picture")


def _classes(train: Scan, chosen: np.ndarray, is_error: bool, what: str) -> Iterator[Problem]:
    names = [train.source.class_names[label] for label in np.flatnonzero(chosen)]
    if names:
        sentence = f"classes: {len(names):,} of the {len(chosen):,} {what}"
        yield Problem(is_error, sentence, names)


def _missing_classes(train: Scan, evaluation: Scan) -> Iterator[Problem]:
    if evaluation.labels.size and np.all(evaluation.labels == -1):
        return
    trained, evaluated = train.class_counts > 0, evaluation.class_counts > 0
    first, second = f"'{train.source.split}'", f"'{evaluation.source.split}'"
    what = f"in {second} but not in {first}; they count as mistakes"
    yield from _classes(train, evaluated & ~trained, True, what)
    what = f"in {first} but not in {second}; nothing tests them"
    yield from _classes(train, trained & ~evaluated, False, what)


def _shared(train: Scan, evaluation: Scan) -> Iterator[Problem]:
    ours, theirs = evaluation.readable, train.readable
    shared = ours[np.isin(evaluation.digests[ours], train.digests[theirs])]
    if not len(shared):
        return
    theirs = theirs[np.isin(train.digests[theirs], evaluation.digests[shared])]
    twins = dict(zip(train.digests[theirs], theirs, strict=True))
    yield Problem(
        len(shared) > MAX_SHARED * len(evaluation.labels),
        f"in '{train.source.split}' as well, byte for byte: {_of(len(shared), evaluation)}",
        [
            f"{_labelled(evaluation, index)} = {_labelled(train, twins[evaluation.digests[index]])}"
            for index in shared
        ],
    )


def _copies(scan: Scan) -> Iterator[Problem]:
    readable = scan.readable
    _, picture, times = np.unique(scan.digests[readable], return_inverse=True, return_counts=True)
    if len(readable) == len(times):
        return
    labels_of_pictures = np.unique(np.stack([picture, scan.labels[readable]]), axis=1)
    is_torn = np.bincount(labels_of_pictures[0]) > 1  # between labels
    groups = np.split(readable[np.argsort(picture, kind="stable")], np.cumsum(times)[:-1])
    repeated = [
        (torn, group) for torn, group in zip(is_torn, groups, strict=True) if group[1:].size
    ]
    repeated.sort(key=lambda item: (not item[0], item[1][0]))
    torn = f"; pictures with several labels: {is_torn.sum():,}" if is_torn.any() else ""
    yield Problem(
        False,
        f"copies of others in the same split: {_of(len(readable) - len(times), scan)}{torn}",
        [" = ".join(_labelled(scan, index) for index in group) for _, group in repeated],
    )


def _labelled(scan: Scan, index: int) -> str:
    label, names = scan.labels[index], scan.source.class_names
    return f"{scan.source.where(index)} [{names[label] if 0 <= label < len(names) else label}]"
