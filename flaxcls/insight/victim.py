"""A saved run as what attacks and corruptions are tried on."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls import augment
from flaxcls.buckets import AnyPath
from flaxcls.data.pipeline import Pipeline
from flaxcls.inference.predictor import Predictor
from flaxcls.models.kernels import kernels_for
from flaxcls.runtime import sharding


class Victim:
    """A network as attacks see it: a function of images in [0, 1], in batches of one size.

    `variables` are on the devices of `mesh`; `mean` and `std` are the run's normalisation.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        network: Any,
        variables: Any,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
    ):
        def logits_of(variables: Any, images: jax.Array) -> jax.Array:
            images = augment.normalize(images * 255, mean, std)
            return network.apply(variables, images, train=False).astype(jnp.float32)

        self.mesh, self.variables = mesh, variables
        self.logits_of = kernels_for(mesh, logits_of)
        self.num_classes: int = network.num_classes
        self.batch_size = sharding.round_up(mesh, batch_size)
        self._classify = jax.jit(
            lambda variables, images: self.logits_of(variables, images).argmax(axis=1)
        )

    def batches(self, *arrays: np.ndarray) -> Iterator[tuple[int, list[jax.Array]]]:
        """How many rows count in each batch, and the arrays' rows, filled up, on the devices."""
        for start in range(0, len(arrays[0]), self.batch_size):
            rows = np.arange(start, start + self.batch_size)
            rows = np.minimum(rows, len(arrays[0]) - 1)
            batch = {str(place): array[rows] for place, array in enumerate(arrays)}
            count = min(self.batch_size, len(arrays[0]) - start)
            yield count, list(sharding.split_batch(self.mesh, batch).values())

    def classify(self, images: np.ndarray) -> np.ndarray:
        """The classes, int32 [N], of float32 images [N, H, W, C] in [0, 1]."""
        found = [np.zeros(0, np.int32)]
        for count, (batch,) in self.batches(images):
            found.append(jax.device_get(self._classify(self.variables, batch))[:count])
        return np.concatenate(found)


def load_victim(workdir: AnyPath, checkpoint: str, ema: bool | None) -> tuple[Predictor, Victim]:
    """A saved run, and its network as attacks see it."""
    predictor = Predictor(workdir, checkpoint=checkpoint, ema=ema)
    run = predictor.restored
    victim = Victim(
        run.mesh,
        run.experiment.network,
        predictor.variables,
        mean=run.metadata["mean"],
        std=run.metadata["std"],
        batch_size=run.experiment.eval_batch_size,
    )
    return predictor, victim


def sample(
    pipeline: Pipeline, examples: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 [N, H, W, C], labels int32 [N] and numbers int32 [N] of some of a split's."""
    size = len(pipeline.source)
    chosen = np.random.default_rng(seed).permutation(size)[:examples]
    chosen = np.sort(chosen).astype(np.int32)
    images = np.empty((len(chosen), *pipeline.image_shape()), np.uint8)
    labels, done = np.empty(len(chosen), np.int32), 0
    with contextlib.closing(pipeline.open()) as data:
        for batch in data.evaluation_batches(64):
            batch = {name: np.asarray(array) for name, array in batch.items()}
            for row in np.flatnonzero(np.isin(batch["index"], chosen) & (batch["mask"] > 0)):
                index = batch["index"][row]
                place = np.searchsorted(chosen, index)
                if "image" in batch:
                    images[place], labels[place] = batch["image"][row], batch["label"][row]
                else:
                    images[place] = data.arrays["image"][index]
                    labels[place] = data.arrays["label"][index]
                done += 1
            if done == len(chosen):
                break
    return images, labels, chosen
