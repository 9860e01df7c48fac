"""The input of small data sets: the whole split on the device, batches gathered inside the step.

The host computes only which examples make up a batch, a pure function of (seed, step), so that a
resumed run needs nothing but its step number.
"""

import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.errors import ConfigError


class Resident:
    """A shuffled, endless sequence of batches of a split that fits in memory.

    Training sees one epoch's permutation after the other as a single sequence; batch `step` is
    its positions step*B to step*B + B - 1. Every example comes once an epoch, and where the size
    of the split is not a multiple of B a batch straddles two epochs: nothing is dropped.

    Attributes:
      arrays: {"image": uint8 [N, H, W, C], "label": int32 [N]}, to be placed on the devices and
        given to `gather`.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, *, batch_size: int, seed: int):
        if batch_size < 1:
            raise ConfigError(f"`batch_size` must be at least 1, got {batch_size}")
        self.arrays = {"image": images, "label": labels.astype(np.int32)}
        self.batch_size = batch_size
        # A batch touches two epochs at most, unless it is larger than the split.
        self._order = functools.lru_cache(maxsize=2)(
            functools.partial(epoch_order, len(images), seed)
        )

    def __len__(self) -> int:
        return len(self.arrays["label"])

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """Which examples batch `step` holds: {"index": int32 [B], "epoch": int32 [B]}."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epoch, place = np.divmod(positions, len(self))
        index = np.empty(self.batch_size, np.int32)
        for number in np.unique(epoch):
            chosen = epoch == number
            index[chosen] = self._order(int(number))[place[chosen]]
        return {"index": index, "epoch": epoch.astype(np.int32)}


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, int32 [N]: the same for every host and version of NumPy.

    Sorts Philox's raw stream keyed by (seed, epoch); `Generator.permutation` may change between
    versions of NumPy, the raw stream does not.
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    draws = np.random.Philox(key=key).random_raw(num_examples)
    return np.argsort(draws, kind="stable").astype(np.int32)


def evaluation_batches(num_examples: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order: {"index": int32 [B], "mask": float32 [B]}.

    The last batch is filled up with example 0 at mask 0, so that all have one shape.
    """
    for start in range(0, num_examples, batch_size):
        index = np.arange(start, start + batch_size, dtype=np.int32)
        mask = index < num_examples
        yield {"index": np.where(mask, index, 0), "mask": mask.astype(np.float32)}


def gather(arrays: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The images and labels of a batch of indices; meant for the inside of a jitted step.

    Args:
      arrays: `Resident.arrays` on the device.
      batch: an element of `Resident.batch` or `evaluation_batches`.

    Returns:
      The batch with "image" uint8 [B, H, W, C] and "label" int32 [B] added.
    """
    taken = {
        name: jnp.take(array, batch["index"], axis=0, mode="clip")  # the default mode checks bounds
        for name, array in arrays.items()
    }
    return {**batch, **taken}


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over all pixels, float64 [C] each, for values in [0, 1].

    Exact up to rounding, because a histogram of every channel of uint8 [N, H, W, C] counts each
    pixel as an integer.
    """
    channels = images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), 512):  # bincount widens its input to eight bytes
        block = images[start : start + 512]
        for channel in range(channels):
            counts[channel] += np.bincount(block[..., channel].ravel(), minlength=256)
    values = np.arange(256)
    total = counts.sum(axis=1)
    mean = counts @ values / total
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / total
    return mean / 255, np.sqrt(variance) / 255
