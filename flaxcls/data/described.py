"""Data that are not on this machine: what a step can be compiled with, and no examples."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from flaxcls.data.source import Example, Source, fingerprint, resolve_split
from flaxcls.errors import ConfigError, DataError

Shape = tuple[int | None, int | None, int]


class Facts(NamedTuple):
    """The shape of a data set's images, None where it varies, its classes, and its splits."""

    image_shape: Shape
    num_classes: int
    splits: Mapping[str, int]


_CIFAR: Shape = (32, 32, 3)
_MNIST: Shape = (28, 28, 1)
_ANY: Shape = (None, None, 3)

# Of TFDS's data sets, as its catalog has them (www.tensorflow.org/datasets/catalog).
FACTS = {
    "cifar10": Facts(_CIFAR, 10, {"train": 50_000, "test": 10_000}),
    "cifar100": Facts(_CIFAR, 100, {"train": 50_000, "test": 10_000}),
    "fashion_mnist": Facts(_MNIST, 10, {"train": 60_000, "test": 10_000}),
    "food101": Facts(_ANY, 101, {"train": 75_750, "validation": 25_250}),
    "imagenet2012": Facts(_ANY, 1000, {"train": 1_281_167, "validation": 50_000}),
    "kmnist": Facts(_MNIST, 10, {"train": 60_000, "test": 10_000}),
    "mnist": Facts(_MNIST, 10, {"train": 60_000, "test": 10_000}),
    "oxford_iiit_pet": Facts(_ANY, 37, {"train": 3_680, "test": 3_669}),
    "svhn_cropped": Facts(_CIFAR, 10, {"train": 73_257, "test": 26_032, "extra": 531_131}),
}


class Described(Source):
    """What is known of a split; DataError for whoever asks for an example.

    Args:
      sizes: the examples of each of the data set's splits, or of any split.
    """

    is_readable = False

    def __init__(
        self,
        name: str,
        split: str,
        image_shape: Shape,
        num_classes: int,
        sizes: Mapping[str, int] | int,
    ):
        if isinstance(sizes, int):
            names = [part.partition("[")[0].strip() for part in split.split("+")]
            sizes = dict.fromkeys(names, sizes)
        slices = resolve_split(split, {key: [size] for key, size in sizes.items()})
        self._length = sum(piece.stop - piece.start for piece in slices)
        super().__init__(
            name=name,
            split=split,
            class_names=[f"class_{label}" for label in range(num_classes)],
            image_shape=image_shape,
            fingerprint=fingerprint(name=name, image_shape=image_shape, slices=slices),
            splits=sizes,
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        raise DataError(f"{self.where(index)} is not on this machine")

    def labels(self) -> np.ndarray:
        raise DataError(f"the labels of {self.name} are not on this machine")


def describe(name: str, split: str) -> Described:
    """A split of a data set of FACTS; ConfigError for another."""
    facts = FACTS.get(name.partition(":")[0])
    if facts is None:
        raise ConfigError(
            f"{name} is not prepared on this machine, and its size is not known: give it as "
            "--num_examples=N --num_classes=N"
        )
    return Described(name, split, facts.image_shape, facts.num_classes, facts.splits)
