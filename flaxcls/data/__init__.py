"""Where the examples come from: the only folder that imports TFDS and the image decoders.

`open_source` is the way in; what a kind of data needs is imported when it is opened.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flaxcls.data.source import Source


def open_source(
    name: str, split: str, *, data_dir: str | Path | None = None, **options: Any
) -> Source:
    """Opens a split of a data set of SOURCES or, under any other name, of TFDS.

    Args:
      name: "digits", "fake", or a TFDS name such as "cifar10", "cifar10:3.0.2", "ds/config".
      split: TFDS's slicing: "train", "train[:90%]", "train[100:-50]", "train+test", ...
      data_dir: where TFDS keeps its data (else $TFDS_DATA_DIR, else ~/tensorflow_datasets).
      **options: keyword arguments of the function in SOURCES; TFDS takes none.

    Raises:
      ConfigError: unknown name or split, an empty slice, or a data set without images and classes.
      DataError: the prepared files are missing or broken.
    """
    if name in SOURCES:
        return SOURCES[name](split, **options)
    return open_tfds(name, split, data_dir=data_dir, **options)


def open_digits(split: str) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8x1: "train" (1,437) and "test" (360)."""
    from flaxcls.data.embedded import Digits

    return Digits(split)


def open_fake(
    split: str,
    *,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    num_examples: int = 1024,
) -> Source:
    """Made-up images that can be learned: "train", and "validation", "test" a quarter as large."""
    from flaxcls.data.fake import Fake

    return Fake(split, image_shape=image_shape, num_classes=num_classes, num_examples=num_examples)


def open_tfds(name: str, split: str, *, data_dir: str | Path | None = None) -> Source:
    """A data set of TFDS, read without TensorFlow; prepared first where it isn't yet."""
    from flaxcls.data.tfds import open_prepared

    return open_prepared(name, split, data_dir, others=SOURCES)


SOURCES: dict[str, Callable[..., Source]] = {"digits": open_digits, "fake": open_fake}
