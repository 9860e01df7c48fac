"""From a Source to pixels of the network's size: one example, many into an array, a whole split."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from flaxcls.data.decode import MAX_PIXELS, Picture, set_up
from flaxcls.data.source import Source, reading_threads
from flaxcls.data.transform import Transform
from flaxcls.errors import ConfigError, DataError, UnreachableError
from flaxcls.runtime.cores import available_cores

_CHUNK = 256  # examples that a thread loads at a time
_SUBSTITUTES = 100  # neighbours tried instead of a broken image


class Broken(NamedTuple):
    """An example that could not be read, and the sentence that says why."""

    index: int
    reason: str


class LabelError(DataError):
    """A label is out of range: not one image is wrong then, but the data."""


def check_label(source: Source, index: int, label: int) -> None:
    """Raises LabelError unless the label of an example is one of the source's classes."""
    if not 0 <= label < len(source.class_names):
        raise LabelError(
            f"{source.where(index)} has label {label}, but there are "
            f"{len(source.class_names)} classes"
        )


class BrokenImages:
    """The unreadable images of a training split: reports each once, raises if they are too many.

    Args:
      num_examples: of the split.
      share: the part of them that may be unreadable.
      report: called with a sentence about each.
    """

    def __init__(self, num_examples: int, share: float, report: Callable[[str], None]):
        self._num_examples, self._share, self._report = num_examples, share, report
        self._known: set[int] = set()

    def note(self, broken: Sequence[Broken]) -> None:
        """Records some more; DataError when they are more than the share."""
        for index, reason in broken:
            if index in self._known:
                continue
            self._known.add(index)
            self._report(f"{reason}; another image replaces it")
            if len(self._known) > self._share * self._num_examples:
                raise DataError(
                    f"{len(self._known)} of {self._num_examples:,} training images can't be read, "
                    f"more than config.input.max_broken = {self._share:g} allows; the last one: "
                    f"{reason}"
                )


class Loader:
    """Loads examples; safe in threads, and can be sent to other processes.

    Args:
      source: where they come from.
      transform: how a picture of any size becomes an image; None for images of one size.
      max_pixels: pictures with more are refused before they are decoded.
    """

    def __init__(
        self, source: Source, transform: Transform | None = None, max_pixels: int = MAX_PIXELS
    ):
        self.source, self.transform, self.max_pixels = source, transform, max_pixels
        self.draws = transform.draws if transform else 0

    def __call__(
        self, index: int, size: int | None = None, draws: Sequence[float] = ()
    ) -> tuple[np.ndarray, int]:
        """The image, uint8 [size, size, C] or of the source's own shape, and the label.

        Raises:
          DataError: an unreadable image or a label out of range; the sentence names the example.
        """
        image, label = self.source[index]
        check_label(self.source, index, label)
        if not isinstance(image, bytes) and not self.transform:
            return image, label
        picture = self.picture(image, index)
        if self.transform:
            return self.transform(picture, size, draws), label
        return picture.pixels(), label

    def picture(self, image: bytes | np.ndarray, index: int) -> Picture:
        """An example's image, of which nothing but the size is known yet."""
        if not isinstance(image, bytes):
            return Decoded(image)
        where, channels = self.source.where(index), self.source.image_shape[2]
        return Picture(image, channels, where=where, max_pixels=self.max_pixels)

    def fill(
        self,
        images: np.ndarray,
        indices: np.ndarray,
        draws: np.ndarray,
        *,
        substitute: bool,
    ) -> tuple[np.ndarray, np.ndarray, list[Broken]]:
        """Loads the examples `indices` int [n] into `images` uint8 [n, H, W, C].

        Args:
          draws: uniform random numbers, float [n, self.draws].
          substitute: whether an example that can't be read is replaced by the next one that can,
            which depends on nothing but the data.

        Returns:
          The indices of the examples that were taken and their labels, int32 [n] each, and the
          broken ones among those asked for.

        Raises:
          DataError: an example can't be read and must not be, or can't be, replaced; or a label is
            out of range, or a store does not answer, which no other example makes right.
        """
        taken, labels = indices.astype(np.int32), np.empty(len(indices), np.int32)
        broken = []
        for row, index in enumerate(indices.tolist()):
            for attempt in range(_SUBSTITUTES):
                taken[row] = (index + attempt) % len(self.source)
                try:
                    image, labels[row] = self(int(taken[row]), images.shape[1], draws[row].tolist())
                    break
                except (LabelError, UnreachableError):
                    raise
                except DataError as error:
                    if not substitute or attempt == _SUBSTITUTES - 1:
                        raise
                    if attempt == 0:
                        broken.append(Broken(index, str(error)))
            if image.shape != images.shape[1:]:
                raise _different_sizes(self.source, images.shape[1:], image.shape)
            images[row] = image
        return taken, labels, broken


class Decoded:
    """Pixels that are there already, as a picture."""

    def __init__(self, pixels: np.ndarray):
        set_up()
        self._pixels = pixels
        self.height, self.width = pixels.shape[:2]
        self.is_grey = pixels.shape[2] == 1

    def pixels(self, reduction: int = 1) -> np.ndarray:
        return self._pixels

    def part(self, box: tuple[int, int, int, int]) -> np.ndarray:
        top, left, height, width = box
        return self._pixels[top : top + height, left : left + width]


def _different_sizes(source: Source, first: tuple, second: tuple) -> ConfigError:
    return ConfigError(
        f"{source.name} has images of different sizes ({tuple(first)} and {tuple(second)}): "
        "set config.image_size to resize them"
    )


def materialize(
    source: Source,
    transform: Transform | None = None,
    size: int | None = None,
    *,
    indices: np.ndarray | None = None,
    max_pixels: int = MAX_PIXELS,
    broken: BrokenImages | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Loads a whole split.

    Args:
      source: the split.
      transform, size: what makes images of one size, if the source's have several.
      indices: only these examples.
      max_pixels: as in `Loader`.
      broken: records unreadable images, which are replaced then as in `Loader.fill`.
      progress: called as progress(examples done, examples in all), in order.

    Returns:
      images uint8 [N, H, W, C], which CPU devices can share, and labels int32 [N].

    Raises:
      ConfigError: images of different sizes, or more than the memory holds.
      DataError: an unreadable image or a label out of range, where it is not replaced; the sentence
        names the example.
    """
    loader = Loader(source, transform, max_pixels)
    indices = np.arange(len(source)) if indices is None else indices
    count = len(indices)
    draws = np.zeros((count, loader.draws))
    if transform:
        shape = (size, size, source.image_shape[2])
    elif None not in source.image_shape:
        shape = source.image_shape
    else:
        shape = loader(int(indices[0]))[0].shape
    try:
        images = _empty((count, *shape))
    except MemoryError as error:
        raise ConfigError(
            f"{source.name} '{source.split}' is too large for memory ({count} images of {shape}): "
            "config.input.mode = 'stream' reads it as it goes"
        ) from error
    labels = np.empty(count, np.int32)
    chunk = 8 if source.is_remote else _CHUNK  # so that all threads have something to wait for

    def load(start: int) -> tuple[int, list[Broken]]:
        part = slice(start, min(start + chunk, count))
        _, labels[part], found = loader.fill(
            images[part], indices[part], draws[part], substitute=broken is not None
        )
        return part.stop, found

    with ThreadPoolExecutor(_threads(source)) as threads:
        for done, found in threads.map(load, range(0, count, chunk)):
            if broken is not None:
                broken.note(found)
            if progress is not None:
                progress(done, count)
    return images, labels


def _threads(source: Source) -> int:
    """How many are fastest for a source's images on this machine: one for each 32 pixels of a side.

    Python's part of an image is as long as the decoding of one of 32 pixels, and threads that wait
    for Python slow each other down: 50,000 of those take 1 thread 6.3 s, 16 threads 12.9 s; images
    of 64 and 128 pixels are fastest with 2 and 4 (16 cores).
    """
    shape = source.image_shape
    if source.is_remote or None in shape:
        return reading_threads(source.is_remote)
    return max(1, min(available_cores(), max(shape[:2]) // 32))


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """Memory for uint8 that begins at a multiple of 64 bytes.

    XLA:CPU uses such memory as it is; of any other every device of the process makes a copy.
    """
    size = math.prod(shape)
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].reshape(shape)
