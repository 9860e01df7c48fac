"""BatchNorm's statistics, estimated anew for weights that no training step has seen."""

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls import augment
from flaxcls.data.pipeline import Pipeline
from flaxcls.data.resident import gather
from flaxcls.inference.restored import RestoredRun
from flaxcls.models.kernels import kernels_for
from flaxcls.models.layers import batch_stats_of_examples
from flaxcls.runtime import sharding


def batch_statistics(run: RestoredRun, variables: Any, pipeline: Pipeline) -> Any:
    """The "batch_stats" of variables on all examples of a pipeline, in one pass, on the devices.

    In the pass each batch is normalised by its own statistics, as in training, without dropout.
    The mean over the batches is weighted by their examples, and the variance is that of all of them
    together: exactly so for what the first BatchNorm is given, whatever the size of the batches.
    """
    experiment, metadata, mesh = run.experiment, run.metadata, run.mesh

    def statistics(variables, arrays, batch):
        batch = gather(arrays, batch)
        images = augment.normalize(batch["image"], metadata["mean"], metadata["std"])
        with batch_stats_of_examples(batch["mask"]):
            _, updates = experiment.network.apply(
                variables, images, train=False, mutable=["batch_stats"]
            )
        return jnp.sum(batch["mask"]), updates["batch_stats"]

    statistics = kernels_for(mesh, statistics)
    statistics = jax.jit(statistics, out_shardings=sharding.everywhere(mesh))
    total, count = None, 0.0
    with contextlib.closing(pipeline.open()) as data:
        arrays = sharding.replicate(mesh, data.arrays)
        size = sharding.round_up(mesh, experiment.eval_batch_size)
        for batch in sharding.prefetch(mesh, data.evaluation_batches(size)):
            examples, found = jax.device_get(statistics(variables, arrays, batch))
            sums = jax.tree.map(partial(np.multiply, float(examples)), _moments(found))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            count += float(examples)
    moments = jax.tree.map(lambda x: x / count, total)
    found = jax.tree.map(np.float32, _statistics(moments))
    return jax.device_put(found, sharding.shardings(mesh, found))


def _moments(statistics: Any) -> Any:
    """Mean and mean square, float64, of each mean and variance."""
    if "mean" in statistics and "var" in statistics:
        mean = np.float64(statistics["mean"])
        return {"mean": mean, "var": np.float64(statistics["var"]) + mean**2}
    return {name: _moments(below) for name, below in statistics.items()}


def _statistics(moments: Any) -> Any:
    """Each mean and variance, of what `_moments` gives."""
    if "mean" in moments and "var" in moments:
        variance = np.maximum(moments["var"] - moments["mean"] ** 2, 0.0)
        return {"mean": moments["mean"], "var": variance}
    return {name: _statistics(below) for name, below in moments.items()}
