"""What a network makes of every picture of a split."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxcls.data.pipeline import Input
from flaxcls.data.resident import gather
from flaxcls.runtime import sharding


def split_features(
    mesh: Mesh,
    features: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    data: Input,
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The features of every example, float32 [N, ...], and the labels, int32 [N].

    In every process all of them, of which each computes its share.

    Args:
      features: (variables, images uint8 [B, H, W, C]) -> [B, ...], to be jitted.
      data: opened by a Pipeline.
      batch_size: examples at a time; rounded up to a multiple of the devices.
    """
    arrays = sharding.replicate(mesh, data.arrays)

    def forward(variables, arrays, batch):
        batch = gather(arrays, batch)
        given = features(variables, batch["image"]).astype(jnp.float32)
        return batch["index"], batch["mask"], given, batch["label"]

    forward = jax.jit(forward, out_shardings=sharding.everywhere(mesh))
    found, labels = None, np.empty(len(data), np.int32)
    batches = data.evaluation_batches(sharding.round_up(mesh, batch_size))
    for batch in sharding.prefetch(mesh, batches):
        index, mask, rows, targets = jax.device_get(forward(variables, arrays, batch))
        if found is None:
            found = np.empty((len(data), *rows.shape[1:]), np.float32)
        there = mask > 0  # the last batch is filled up
        found[index[there]], labels[index[there]] = rows[there], targets[there]
    return found, labels
