"""Encoded bytes to uint8 pixels, on the host, by OpenCV."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np

from flaxcls.data.source import Source
from flaxcls.errors import ConfigError, DataError

cv2.setNumThreads(1)  # the threads are ours: one image each

_CHUNK = 256  # examples that a thread decodes at a time
# TFDS's images are used as TensorFlow decodes them, which does not look at EXIF's orientation.
_FLAGS = {
    1: cv2.IMREAD_GRAYSCALE | cv2.IMREAD_IGNORE_ORIENTATION,
    3: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION,
}


def decode(image: bytes, channels: int, *, where: str = "an image") -> np.ndarray:
    """A JPEG, PNG, WebP or BMP file's bytes as uint8 [H, W, 3] in RGB order, or grey [H, W, 1].

    Raises:
      DataError: not an image, or one cut short; the sentence begins with `where`.
    """
    pixels = cv2.imdecode(np.frombuffer(image, np.uint8), _FLAGS[channels]) if image else None
    if pixels is None:
        raise DataError(f"{where} is not a readable image ({len(image)} bytes)")
    return pixels.reshape(*pixels.shape[:2], channels)


def materialize(
    source: Source, progress: Callable[[int, int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes a whole split, on every core this process may use.

    Args:
      source: a split whose images all have one size.
      progress: called as progress(examples done, examples in all), in order.

    Returns:
      images uint8 [N, H, W, C] and labels int32 [N].

    Raises:
      ConfigError: images of different sizes, or more than the memory holds.
      DataError: an unreadable image or a label out of range; the sentence names the example.
    """
    count = len(source)
    shape = _pixels(source, 0)[0].shape
    try:
        images = np.empty((count, *shape), np.uint8)
    except MemoryError as error:
        raise ConfigError(
            f"{source.name} '{source.split}' is too large for memory ({count} images of {shape}): "
            "it needs the streaming input, which is not available yet"
        ) from error
    labels = np.empty(count, np.int32)

    def load(start: int) -> int:
        stop = min(start + _CHUNK, count)
        for index in range(start, stop):
            pixels, labels[index] = _pixels(source, index)
            if pixels.shape != shape:
                raise ConfigError(
                    f"{source.name} has images of different sizes ({shape} and {pixels.shape}): "
                    "they need the streaming input, which is not available yet"
                )
            images[index] = pixels
        return stop

    with ThreadPoolExecutor(_available_cores()) as threads:
        for done in threads.map(load, range(0, count, _CHUNK)):
            if progress is not None:
                progress(done, count)
    return images, labels


def _pixels(source: Source, index: int) -> tuple[np.ndarray, int]:
    """One example decoded and its label checked."""
    image, label = source[index]
    if not 0 <= label < len(source.class_names):
        raise DataError(
            f"{source.where(index)} has label {label}, but there are "
            f"{len(source.class_names)} classes"
        )
    if isinstance(image, bytes):
        image = decode(image, source.image_shape[2], where=source.where(index))
    return image, label


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # what a container or SLURM grants, not what exists
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
