"""What a saved run says of every example of a split: what honest evaluation begins with."""

import contextlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from flaxcls.data.pipeline import Pipeline
from flaxcls.inference.features import split_features
from flaxcls.inference.predictor import PROBABILITIES, forward_of
from flaxcls.inference.restored import RestoredRun


class SplitPredictions(NamedTuple):
    """What a network says of the N examples of a split, in the split's order.

    Rank classes by their logits: probabilities that are rounded to 0 or 1 are equal.
    """

    logits: np.ndarray  # float32 [N, K]
    probabilities: np.ndarray  # float32 [N, K]
    labels: np.ndarray  # int32 [N]


def predict_split(run: RestoredRun, pipeline: Pipeline, variables: Any) -> SplitPredictions:
    """The predictions of a saved run for every example of a pipeline, in every process all of them.

    Args:
      run: by `restore`, with its test-time augmentation.
      pipeline: by `run.experiment.evaluation(split, data_dir)`.
      variables: `run.variables`, or `run.ema` where that is not {}.
    """
    forward = forward_of(run)

    def outputs(variables, images):
        predictions = forward(variables, images)
        return jnp.stack([predictions.logits, predictions.probabilities], axis=1)

    with contextlib.closing(pipeline.open()) as data:
        size = run.experiment.eval_batch_size
        found, labels = split_features(run.mesh, outputs, variables, data, size)
    return SplitPredictions(found[:, 0], found[:, 1], labels)


def probabilities_of(logits: np.ndarray, outputs: str) -> np.ndarray:
    """The probabilities of classes, float32 [N, K]; `outputs` is of `core.losses.outputs_of`."""
    return np.asarray(PROBABILITIES[outputs](jnp.asarray(logits, jnp.float32)))
