"""k nearest neighbours: how good a network's features are without any training on them."""

import contextlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxcls import augment, models
from flaxcls.buckets import AnyPath
from flaxcls.core.metrics import rank_of_label
from flaxcls.errors import ConfigError
from flaxcls.inference.features import split_features
from flaxcls.inference.restored import restore
from flaxcls.runtime import sharding
from flaxcls.runtime.output import say

TEMPERATURE = 0.07


def knn_run(
    workdir: AnyPath,
    neighbors: int,
    *,
    split: str | None = None,
    checkpoint: str = "last",
    data_dir: str | None = None,
) -> tuple[int, str, dict[str, dict[str, float]]]:
    """What `evaluator.evaluate_run` returns, by neighbours instead of the network's head.

    The neighbours of a picture are looked for among those of the run's training split, as
    evaluation would see them.
    """
    run = restore(workdir, checkpoint)
    experiment, metadata = run.experiment, run.metadata
    train_split = metadata["config"]["data"]["train_split"]
    pipelines = [experiment.evaluation(name, data_dir) for name in (train_split, split)]
    known, asked = (pipeline.source for pipeline in pipelines)
    if not 1 <= neighbors <= len(known):
        raise ConfigError(
            f"--knn must be from 1 to {len(known):,}, the examples of '{known.split}', "
            f"got {neighbors}"
        )
    if known.fingerprint == asked.fingerprint:
        say("note: every picture is its own nearest neighbour, as it was trained on", error=True)

    def pooled(variables, images):
        images = augment.normalize(images, metadata["mean"], metadata["std"])
        return models.features(experiment.network, variables, images)["pooled"]

    opened = [pipeline.open() for pipeline in pipelines]
    results = {}
    with contextlib.ExitStack() as stack:
        for data in opened:
            stack.callback(data.close)
        for name, variables in (("eval", run.variables), ("ema", run.ema)):
            if variables:
                size = experiment.eval_batch_size
                features = [split_features(run.mesh, pooled, variables, x, size) for x in opened]
                classes = len(metadata["class_names"])
                results[name] = knn(run.mesh, *features, neighbors, classes, batch_size=size)
    return run.step, asked.split, results


def knn(
    mesh: Mesh,
    known: tuple[np.ndarray, np.ndarray],
    asked: tuple[np.ndarray, np.ndarray],
    neighbors: int,
    num_classes: int,
    *,
    batch_size: int = 128,
) -> dict[str, float]:
    """{"accuracy", "count", "accuracy_top5" from 11 classes on} of the weighted vote of neighbours.

    The nearest by cosine similarity s vote for their class, each with the weight exp(s / 0.07) (Wu
    et al. 2018, arXiv:1805.01978; the evaluation of DINO). Of equal votes the first class wins.

    Args:
      known, asked: features float32 [N, D] and labels int32 [N].
      neighbors: at most as many as are known.
      batch_size: of those asked, at a time.
    """
    bank = sharding.replicate(mesh, (unit(known[0]), known[1]))
    step = jax.jit(
        partial(_ranks, make_votes(neighbors, num_classes)),
        out_shardings=sharding.everywhere(mesh),
    )
    size, (features, labels) = sharding.round_up(mesh, batch_size), asked
    rows = sharding.local_rows(mesh, size)
    ranks = []
    for start in range(0, len(labels), size):
        part = np.minimum(np.arange(start, start + size), len(labels) - 1)[rows]
        batch = {"features": unit(features[part]), "label": labels[part]}
        batch = sharding.split_batch(mesh, batch)
        ranks.append(jax.device_get(step(bank, batch["features"], batch["label"])))
    rank = np.concatenate(ranks)[: len(labels)]
    result = {"accuracy": float(np.mean(rank < 1)), "count": len(labels)}
    if num_classes > 10:
        result["accuracy_top5"] = float(np.mean(rank < 5))
    return result


def make_votes(neighbors: int, num_classes: int) -> Callable[..., jax.Array]:
    """Returns `votes(known, labels, asked) -> float32 [B, K]`, of features of length 1."""

    def votes(known: jax.Array, labels: jax.Array, asked: jax.Array) -> jax.Array:
        similarity, index = nearest(known, asked, neighbors)
        weights = jnp.exp((similarity - 1) / TEMPERATURE)  # - 1: of no effect but on the size
        classes = jax.nn.one_hot(labels[index], num_classes)
        return jnp.einsum("bk,bkc->bc", weights, classes, precision=jax.lax.Precision.HIGHEST)

    return votes


def nearest(known: jax.Array, asked: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Cosine similarity and index, [B, count], of those known that are the nearest, best first.

    The features are of length 1, [N, D] and [B, D]; of equally near ones the first comes first.
    """
    similarity = jnp.matmul(asked, known.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(similarity, count)


def _ranks(votes: Callable, bank: tuple, asked: jax.Array, labels: jax.Array) -> jax.Array:
    """How many classes have more votes than the right one, int32 [B]."""
    return rank_of_label(votes(*bank, asked), labels)


def unit(features: np.ndarray) -> np.ndarray:
    """Each row at length 1; one of zeros stays."""
    flat = features.reshape(len(features), -1)
    length = np.linalg.norm(flat.astype(np.float64), axis=1, keepdims=True)
    return (flat / np.maximum(length, 1e-12)).astype(np.float32)
