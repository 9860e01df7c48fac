"""Made-up images of any shape and number, for smoke runs and for measuring without a disk."""

import numpy as np

from flaxcls.data.source import Example, Source, fingerprint, resolve_split, take_slices
from flaxcls.errors import ConfigError

_PATTERN = 4  # cells on a side of a class's pattern
_STREAM = {"pattern": 0, "train": 1, "validation": 2, "test": 3}  # high words of the Philox keys


class Fake(Source):
    """Half noise, half a coarse pattern of the class: a network learns it in a few steps.

    An image is a function of its split and index alone, made when it is asked for. Labels are
    the indices modulo `num_classes`, so classes are balanced and every index has a fixed label.
    "train" has `num_examples`; "validation" and "test" a quarter of it, other images.
    """

    def __init__(
        self,
        split: str,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        num_examples: int,
    ):
        image_shape = tuple(image_shape)
        if len(image_shape) != 3 or min(image_shape) < 1 or image_shape[2] not in (1, 3):
            raise ConfigError(
                f"`image_shape` of fake data must be (height, width, 1 or 3), got {image_shape}"
            )
        for field, value in (("num_classes", num_classes), ("num_examples", num_examples)):
            if value < 1:
                raise ConfigError(f"`{field}` of fake data must be at least 1, got {value}")
        sizes = {"train": num_examples}
        sizes["validation"] = sizes["test"] = max(1, num_examples // 4)
        slices = resolve_split(split, {name: [size] for name, size in sizes.items()})
        self._streams = np.concatenate(
            [np.full(part.stop - part.start, _STREAM[part.split]) for part in slices]
        )
        ranges = {name: np.arange(size) for name, size in sizes.items()}
        self._indices = take_slices(ranges, slices)
        self._patterns = np.stack(
            [
                _random_bytes(_STREAM["pattern"], label, (_PATTERN, _PATTERN, image_shape[2]))
                for label in range(num_classes)
            ]
        )
        super().__init__(
            name="fake",
            split=split,
            class_names=[f"class_{label}" for label in range(num_classes)],
            image_shape=image_shape,
            fingerprint=fingerprint(
                name="fake", image_shape=image_shape, num_classes=num_classes, slices=slices
            ),
            splits=sizes,
        )

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        number = int(self._indices[index])
        label = number % len(self.class_names)
        height, width, _ = self.image_shape
        rows = np.arange(height) * _PATTERN // height
        columns = np.arange(width) * _PATTERN // width
        pattern = self._patterns[label][rows[:, None], columns]
        noise = _random_bytes(int(self._streams[index]), number, self.image_shape)
        return Example(pattern // 2 + noise // 2, label)

    def labels(self) -> np.ndarray:
        return (self._indices % len(self.class_names)).astype(np.int32)


def _random_bytes(stream: int, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform uint8 of the shape, from Philox's raw stream (the same in every version of NumPy)."""
    size = int(np.prod(shape))
    words = np.random.Philox(key=[number, stream]).random_raw(-(-size // 8))
    return words.astype("<u8").view(np.uint8)[:size].reshape(shape)
