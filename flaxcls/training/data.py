"""The data of a run, opened: what its batches are made of, and what is known of its images."""

from collections.abc import Callable
from functools import partial

import numpy as np

from flaxcls import models
from flaxcls.build import Experiment
from flaxcls.data.pipeline import first_images, statistics
from flaxcls.runtime import sharding

FIRST_IMAGES = 2000  # for the networks whose first weights depend on the data


class RunData:
    """Opened pipelines of both splits, and what of the data a step has built in.

    Attributes:
      train, evaluation: the batches.
      mean, std: what images are normalised by, one per channel.
      class_weights: of the loss, one per class; None: all 1.
      class_counts: training examples of each class, for a loss that has use for them, else None.
      first_images: what a network may use before its first step, uint8 [N, H, W, C].

    Args:
      report: gets a sentence about each broken image.
      normalization: mean and standard deviation, as a resumed run has them; None: as the experiment
        or the data have them.
    """

    def __init__(
        self,
        experiment: Experiment,
        report: Callable[[str], None] = print,
        normalization: tuple[list[float], list[float]] | None = None,
    ):
        source = experiment.train.source
        rows = partial(sharding.local_rows, experiment.mesh)
        self.train = experiment.train.open(report, rows)
        self.mean, self.std = (
            normalization
            or experiment.normalization
            or statistics(self.train, experiment.as_evaluated)
        )
        self.class_weights, self.class_counts = experiment.loss.of_labels(
            source.labels, len(source.class_names)
        )
        self.evaluation = experiment.evaluation.open(rows=rows)
        count = FIRST_IMAGES if models.needs_images(experiment.network) else 1
        self.first_images: np.ndarray = first_images(self.train, experiment.as_evaluated, count)

    @classmethod
    def unread(cls, experiment: Experiment) -> "RunData":
        """What a step is compiled with, without reading an example: only the shapes are true."""
        data = cls.__new__(cls)
        source = experiment.train.source
        channels, classes = source.image_shape[-1], len(source.class_names)
        data.train, data.evaluation = experiment.train.unread(), experiment.evaluation.unread()
        data.mean, data.std = experiment.normalization or ([0.5] * channels, [0.25] * channels)
        # Two examples of every other class: equal weights the compiler would see.
        labels = np.concatenate([np.arange(classes), np.arange(0, classes, 2)])
        data.class_weights, data.class_counts = experiment.loss.of_labels(lambda: labels, classes)
        data.first_images = np.zeros((1, *experiment.evaluation.image_shape()), np.uint8)
        return data

    def close(self) -> None:
        """Ends what makes the batches."""
        self.train.close()
        self.evaluation.close()
