"""Real data that comes with an installed package: no download, no preparation."""

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from flaxcls.data.source import Example, Source, fingerprint, resolve_split, take_slices
from flaxcls.errors import DataError


class Digits(Source):
    """The UCI test set of handwritten digits (Alpaydin & Kaynak 1998), as scikit-learn ships it.

    1,797 grey images of 8x8. A pixel counts the ink in a 4x4 block, 0 to 16; here that is 0 to
    255. The set has no published split: `digits_splits` fixes one.
    """

    def __init__(self, split: str):
        images, labels = read_digits()
        splits = digits_splits(labels)
        slices = resolve_split(split, {name: [len(order)] for name, order in splits.items()})
        order = take_slices(splits, slices)
        self._images, self._labels = images[order], labels[order]
        content = hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest()
        super().__init__(
            name="digits",
            split=split,
            class_names=[str(digit) for digit in range(10)],
            image_shape=(8, 8, 1),
            fingerprint=fingerprint(name="digits", content=content),
            splits=splits,
        )

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(self._images[index], int(self._labels[index]))

    def labels(self) -> np.ndarray:
        return self._labels.copy()


@functools.cache
def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [1797, 8, 8, 1] with ink 16 at 255, and labels int32 [1797].

    Reads scikit-learn's data file instead of importing scikit-learn, which takes over a second.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None:
        raise DataError("digits are part of scikit-learn: pip install scikit-learn")
    table = np.loadtxt(
        Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",", dtype=np.uint8
    )
    images = np.round(table[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return images, table[:, 64].astype(np.int32)


def digits_splits(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the 1,437 train and 360 test examples, each in exactly one and ascending.

    Every fifth example is for the test, counted within the classes in an order drawn from
    Philox's raw stream, which no version of NumPy or scikit-learn changes.
    """
    shuffled_within_class = np.lexsort((np.random.Philox(key=0).random_raw(len(labels)), labels))
    test = np.sort(shuffled_within_class[::5])
    return {"train": np.setdiff1d(np.arange(len(labels)), test), "test": test}
