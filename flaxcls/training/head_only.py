"""Training the head alone: what is below it is computed once, not in every step.

Where nothing below the head is trained and nothing random happens to the pictures, a picture's
features, what the head is given, are the same in every epoch. They take the place of the pictures:
computed once of both splits, kept on the devices, gathered by the step.
"""

from functools import partial
from typing import Any

import jax
import numpy as np

from flaxcls import augment, models
from flaxcls.build import Experiment
from flaxcls.core.optim import paths_of
from flaxcls.data.pipeline import RESIDENT_BYTES
from flaxcls.data.resident import Resident
from flaxcls.inference.features import split_features
from flaxcls.models.head import HEAD, begin_at_head, features_of
from flaxcls.models.layers import batch_stats_frozen
from flaxcls.runtime import sharding
from flaxcls.training.data import RunData


class HeadOnly:
    """The input and the network of a run that trains only the head.

    Attributes:
      network: applied to features instead of images.
      train, evaluation: the batches; their features are there after `compute`.
    """

    def __init__(self, experiment: Experiment, data: RunData, network: Any, features: Any):
        self.network = network
        self._experiment, self._data = experiment, data
        rows = partial(sharding.local_rows, experiment.mesh)

        def room(count: int, *order: Any) -> Resident:
            empty = np.empty((count, *features.shape), np.float32)
            return Resident(empty, np.zeros(count, np.int32), *order, rows=rows)

        self.train = room(len(data.train), experiment.train.order)
        self.evaluation = room(len(data.evaluation))

    def compute(self, variables: Any) -> None:
        """Computes the features of both splits."""
        experiment, mean, std = self._experiment, self._data.mean, self._data.std

        def features(train: bool, variables: Any, images: jax.Array) -> jax.Array:
            images = augment.normalize(images, mean, std)
            with batch_stats_frozen():  # those are, or there are none
                return features_of(experiment.network, variables, images, train=train)

        for source, into, train in (
            (self._data.train, self.train, True),
            (self._data.evaluation, self.evaluation, False),
        ):
            into.arrays["image"], into.arrays["label"] = split_features(
                experiment.mesh,
                partial(features, train),
                variables,
                source,
                experiment.eval_batch_size,
            )
            source.close()  # its pictures are not needed again

    def describe(self) -> str:
        """The input in words."""
        count, *shape = self.train.arrays["image"].shape
        size = (self.train.arrays["image"].nbytes + self.evaluation.arrays["image"].nbytes) / 2**20
        return (
            f"only the head is trained: the {' x '.join(map(str, shape))} features of each picture "
            f"are computed once and kept on the devices, {size:,.0f} MiB"
        )


def head_only(experiment: Experiment, data: RunData) -> HeadOnly | str | None:
    """What a run trains its head with, where that is the same as training it with the pictures.

    None where more than the head is trained. Where only that is, but its features are not the same
    in every epoch or don't fit into the memory that pictures may be given: why, in words.
    """
    if not experiment.frozen:
        return None
    network, shape = experiment.network, experiment.train.image_shape()
    variables = models.shapes(network, shape)
    trained = set(paths_of(variables["params"])) - experiment.frozen
    if not all(path.startswith(f"{HEAD}/") for path in trained):
        return None
    if variables.get("batch_stats") and not experiment.freeze_batch_stats:
        return "BatchNorm's statistics are those of the batch"
    if experiment.augmentations:
        return "the pictures are augmented"
    if experiment.tta:
        return "evaluation takes several views of the pictures"
    if experiment.adversarial:
        return "the pictures are attacked"
    if experiment.train.is_changing or experiment.evaluation.image_shape() != shape:
        return "the pictures are cropped at random or have several sizes"
    found = begin_at_head(network, variables, shape)
    if found is None:
        return "the network has something random, such as dropout, or logits not of its head alone"
    above, features = found
    size = max(len(data.train), len(data.evaluation)) * features.size * 4
    if size > RESIDENT_BYTES and experiment.train.options.mode != "resident":
        return f"they would take {size / 2**20:,.0f} MiB (config.input.mode='resident' allows it)"
    return HeadOnly(experiment, data, above, features)
