"""The input of small data sets: the whole split on the device, batches gathered inside the step.

The host computes only which examples make up a batch, a pure function of (seed, step), so that a
resumed run needs nothing but its step number.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.data.order import Batch, Order, Shapes, batch_shapes, evaluation_batches, take_rows


class Resident:
    """Batches of a split that is kept on the devices.

    Args:
      images, labels: uint8 [N, H, W, C] and int [N].
      order: which examples come when; None for a split that is only evaluated.
      rows: which rows of a batch of a size are this process's; None: all.

    Attributes:
      arrays: {"image": uint8 [N, H, W, C], "label": int32 [N]}, to be put on the devices and
        given to `gather`.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        order: Order | None = None,
        rows: Callable[[int], np.ndarray] | None = None,
    ):
        self.arrays: Any = {"image": images, "label": labels.astype(np.int32)}
        self._order, self._rows = order, rows or np.arange

    def __len__(self) -> int:
        return len(self.arrays["label"])

    def batch(self, step: int, offset: int = 0) -> Batch:
        """Which examples training batch `step` holds: {"index": int32 [B], "epoch": int32 [B]}."""
        return self._local_rows(self._order.batch(step + offset))

    def batch_shapes(self, step: int) -> Shapes:
        """The shapes of a step's batch, of the rows of all processes; needs no data."""
        return batch_shapes(self._order.batch_size, "index", "epoch")

    def batches(self, start: int, stop: int, offset: int = 0) -> Iterator[Batch]:
        """The training batches of the steps `start` to `stop` - 1, `offset` steps on."""
        return (self.batch(step, offset) for step in range(start, stop))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every example once, in order: {"index": int32 [B], "mask": float32 [B]}."""
        return map(self._local_rows, evaluation_batches(len(self), batch_size))

    def _local_rows(self, batch: Batch) -> Batch:
        return take_rows(batch, self._rows(len(batch["index"])))

    def describe(self) -> str:
        """In words, with the memory that a device's copy takes."""
        return f"on the devices, decoded, {self.arrays['image'].nbytes / 2**20:,.0f} MiB"

    def close(self) -> None:
        """Nothing to end."""


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
