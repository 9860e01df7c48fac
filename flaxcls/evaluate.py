"""Exact metrics of a model on a whole split.

    python -m flaxcls.evaluate --run=DIR [--split=test] [--checkpoint=last|best|STEP]

needs the folder of a run and its data, nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from flaxcls import augment, metrics, sharding
from flaxcls.data import resident
from flaxcls.step import make_eval_step, zero_metrics


class Evaluator:
    """Evaluates variables on a whole split: every example counts once, whatever the batch size.

    Args:
      images, labels: uint8 [N, H, W, C] and int32 [N].
      batch_size: examples at a time; rounded up to a multiple of the devices.
      mean, std: the run's normalisation, one number a channel.
    """

    def __init__(
        self,
        mesh: Mesh,
        network: nn.Module,
        loss: Callable,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self._mesh, self._size = mesh, len(images)
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._data = sharding.replicate(mesh, {"image": images, "label": labels})
        step = make_eval_step(network, loss, lambda x: augment.normalize(x, mean, std))

        def eval_step(variables, sums, data, batch):
            return step(variables, sums, resident.gather(data, batch))

        place = sharding.everywhere(mesh)
        self._step = jax.jit(eval_step, donate_argnums=1, out_shardings=place)
        self._zeros = jax.jit(lambda: zero_metrics(network.num_classes), out_shardings=place)

    def __call__(self, variables: Any) -> dict[str, float]:
        """{"accuracy", "loss", "count", and "accuracy_top5" with more than 10 classes}."""
        sums = self._zeros()
        for batch in resident.evaluation_batches(self._size, self._batch_size):
            sums = self._step(variables, sums, self._data, sharding.split_batch(self._mesh, batch))
        return {**metrics.compute(sums), "count": int(jax.device_get(sums["accuracy"][1]))}


FLAGS = flags.FlagValues()
