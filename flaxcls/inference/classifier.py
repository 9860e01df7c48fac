"""What classifies pictures and files, whatever it is made of; see Predictor and Ensemble."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flaxcls.data.source import reading_threads
from flaxcls.errors import DataError
from flaxcls.inference.calibration import Calibration
from flaxcls.remote import is_remote
from flaxcls.runtime.read_ahead import in_order


class Predictions(NamedTuple):
    """What a network says of N pictures, float32.

    Rank classes by their logits: probabilities that are rounded to 0 or 1 are equal.
    """

    logits: np.ndarray  # [N, K]
    probabilities: np.ndarray  # [N, K]
    features: np.ndarray  # [N, D], "pooled" of `models.features`


class Prediction(NamedTuple):
    """What a network says of a picture: its best class, and the probability of every class.

    After `calibrate`, `classes` is the set that holds the right class as often as was promised, and
    `none_of_these` says that the best class is too uncertain to be an answer.
    """

    name: str
    probability: float
    probabilities: dict[str, float]  # the best one first
    classes: tuple[str, ...] = ()  # the best one first; empty without a calibration
    none_of_these: bool = False


class Answer(NamedTuple):
    """What a calibration makes of a prediction; see Prediction."""

    classes: tuple[str, ...]
    none_of_these: bool


class Classifier:
    """Base of what classifies pictures: subclasses say how one is read and what is said of several.

    Attributes:
      class_names: of the K classes.
      batch_size: pictures at a time.
      calibration: what `calibrate` has fitted, or None.
    """

    class_names: Sequence[str]
    batch_size: int
    calibration: Calibration | None = None

    def read(self, path: str | Path) -> Any:
        """A file's picture as `classify` takes it, or DataError; can be called in threads."""
        raise NotImplementedError

    def prepare(self, picture: Any) -> Any:
        """The same of a path, a PIL image or an array."""
        raise NotImplementedError

    def classify(self, images: Sequence[Any]) -> Predictions:
        """What is said of one or more pictures, each as `read` gives it."""
        raise NotImplementedError

    def predict(self, pictures: Any) -> Any:
        """Classifies a picture, or several; returns a Prediction, or a list of them.

        A picture is a file's path, a PIL image or an array, uint8 [H, W] or [H, W, C] with 1, 3 or
        4 channels, of any size; it becomes what evaluation would show to the network. Raises
        DataError for a file that can't be read and ValueError for what is no picture.
        """
        if is_one_picture(pictures):
            return self.predict([pictures])[0]
        images = [self.prepare(picture) for picture in pictures]
        return self.ranked(self.classify(images)) if images else []

    def ranked(self, predictions: Predictions) -> list[Prediction]:
        """What is said of each picture, with the names of the classes."""
        results = []
        order = np.argsort(-predictions.logits, axis=1, kind="stable").tolist()
        answers = self.answers(predictions)
        rows = zip(order, predictions.probabilities.tolist(), answers, strict=True)
        for labels, shares, answer in rows:
            ranked = {self.class_names[label]: shares[label] for label in labels}
            results.append(Prediction(*next(iter(ranked.items())), ranked, *(answer or ())))
        return results

    def answers(self, predictions: Predictions) -> list[Answer | None]:
        """What the calibration makes of each of some predictions; None without one."""
        if self.calibration is None:
            return [None] * len(predictions.logits)
        probabilities = predictions.probabilities
        order = np.argsort(-predictions.logits, axis=1, kind="stable")
        sets = self.calibration.sets(probabilities, order[:, 0])
        inside = np.take_along_axis(sets, order, axis=1)
        given = self.calibration.answers(probabilities)
        return [
            Answer(tuple(self.class_names[label] for label in labels[members]), not is_given)
            for labels, members, is_given in zip(order, inside, given.tolist(), strict=True)
        ]

    def files(
        self, files: Iterable[str], report: Callable[[DataError], None]
    ) -> Iterator[tuple[Sequence[str], Predictions]]:
        """Classifies files in their order, any number of them: yields names and predictions.

        They are read in threads while the devices compute, some batches ahead of what is yielded.
        Those that can't be read are skipped, and `report` is called with what was wrong.
        """

        def classify(batch: list[tuple[str, Any]]) -> tuple[Sequence[str], Predictions]:
            names, images = zip(*batch, strict=True)
            return names, self.classify(images)

        yield from in_order(classify, self.batches(files, report), threads=1)

    def batches(
        self, files: Iterable[str], report: Callable[[DataError], None]
    ) -> Iterator[list[tuple[str, Any]]]:
        """The files' names and pictures as `read` makes them, at most `batch_size` at a time.

        They are read in threads, ahead; those that can't be read are skipped, as in `files`.
        """

        def read(file: str) -> tuple[str, Any]:
            try:
                return file, self.read(file)
            except DataError as error:
                return file, error

        def pictures() -> Iterator[tuple[str, Any]]:
            rest = iter(files)
            first = [*itertools.islice(rest, 1)]
            threads = reading_threads(any(map(is_remote, first)))
            for file, image in in_order(read, itertools.chain(first, rest), threads):
                if isinstance(image, DataError):
                    report(image)
                else:
                    yield file, image

        readable = pictures()
        yield from iter(lambda: list(itertools.islice(readable, self.batch_size)), [])


def is_one_picture(value: Any) -> bool:
    """Whether it is a picture as `Classifier.predict` takes it, and not several of them."""
    return isinstance(value, (str, os.PathLike, Image.Image, np.ndarray)) and (
        getattr(value, "ndim", 3) <= 3
    )
