"""Metrics as (sum, count) pairs, which add up over batches, devices and hosts.

A dict of pairs of scalars lives on the devices and only `compute`, on the host, divides: so the
mean over a set is that over its examples, however batched. Counts of examples are int32 and exact.
A pair of arrays [K] is of the K classes, and stands for the mean over their means.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Which weights results of evaluations are of, as they name them and in words.
WEIGHTS = {"eval": "parameters", "ema": "averaged parameters"}
TOTALS = ("broken_images", "skipped_updates")  # metrics whose sums are wanted, not their means

Metrics = dict[str, tuple[jax.Array, jax.Array]]


def classification_metrics(
    logits: jax.Array,
    targets: jax.Array,
    losses: jax.Array,
    weights: jax.Array,
    mask: jax.Array | None = None,
) -> Metrics:
    """The pairs of one batch: "loss", "accuracy" and, with more than 10 classes, "accuracy_top5".

    The arguments are those of `example_metrics`.
    """
    return over_examples(example_metrics(logits, targets, losses, weights, mask))


def example_metrics(
    logits: jax.Array,
    targets: jax.Array,
    losses: jax.Array,
    weights: jax.Array,
    mask: jax.Array | None = None,
) -> Metrics:
    """What each example adds to `classification_metrics`: the pairs are of arrays [B].

    Args:
      logits: float [B, K].
      targets: soft targets float [B, K], whose largest entry is taken for the truth (the first one
        if several are), or labels int [B].
      losses: float32 [B], the loss of each example.
      weights: float32 [B], what each example weighs in the loss. Accuracies are not weighted.
      mask: bool or 0/1 [B]; an example with 0 counts nowhere, even if its loss is NaN. None: all 1.
    """
    num_classes = logits.shape[-1]
    labels = targets if targets.ndim == 1 else jnp.argmax(targets, axis=-1)
    counted = jnp.ones(labels.shape, bool) if mask is None else mask.astype(bool)
    count = counted.astype(jnp.int32)
    rank = rank_of_label(logits, labels)

    def right_in_top(k: int) -> tuple[jax.Array, jax.Array]:
        return jnp.where(rank < k, count, 0), count

    metrics = {
        "loss": (
            jnp.where(counted, losses * weights, 0).astype(jnp.float32),
            jnp.where(counted, weights, 0).astype(jnp.float32),
        ),
        "accuracy": right_in_top(1),
    }
    if num_classes > 10:
        metrics["accuracy_top5"] = right_in_top(5)
    return metrics


def balanced_accuracy(
    logits: jax.Array, labels: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The pair of one batch, int32 [K] each: the right and all examples of each class.

    The arguments are those of `example_metrics`, labels int [B].
    """
    counts = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.int32)
    counts *= mask.astype(jnp.int32)[:, None]
    right = (rank_of_label(logits, labels) == 0).astype(jnp.int32)
    return jnp.sum(counts * right[:, None], axis=0), jnp.sum(counts, axis=0)


def over_examples(metrics: Metrics) -> Metrics:
    """The sums of pairs of arrays [B]."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), metrics)


def rank_of_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many classes come before the label's, int32 [B]: 0 is the best; K where nothing is right.

    Equal logits come in the order of their classes, as in `argmax`; so a network that always gives
    the same logits is right as often as one that always answers 0 to k-1. An example with a NaN
    among its logits, or with a label out of range, is never right.
    """
    classes = jnp.arange(logits.shape[-1])
    label = labels[:, None]
    own = jnp.sum(jnp.where(classes == label, logits, 0), axis=-1, keepdims=True)
    before = (logits > own) | ((logits == own) & (classes < label))
    valid = (labels >= 0) & (labels < logits.shape[-1]) & ~jnp.isnan(logits).any(axis=-1)
    return jnp.where(valid, jnp.sum(before, axis=-1, dtype=jnp.int32), logits.shape[-1])


def zeros_like(metrics: Any) -> Metrics:
    """What to start adding from: `metrics` are pairs of arrays or of shapes (`jax.eval_shape`)."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)


def add(first: Metrics, second: Metrics) -> Metrics:
    """The pairs of the union of two disjoint sets of examples."""
    return jax.tree.map(jnp.add, first, second)


def compute(metrics: Metrics) -> dict[str, float]:
    """The means as Python floats, NaN where nothing was counted. Fetches from the device, once.

    Of classes those that have examples. Of the TOTALS the sums, as integers.
    """
    pairs = jax.device_get(metrics)

    def value(name: str, total: Any, count: Any) -> float:
        if name in TOTALS:
            return int(total)
        totals, counts = (np.asarray(x, np.float64) for x in (total, count))
        counted = counts > 0
        return float(np.mean(totals[counted] / counts[counted])) if counted.any() else math.nan

    return {name: value(name, *pair) for name, pair in pairs.items()}


def is_better(value: float, other: float, metric: str) -> bool:
    """Whether a value of a metric is better than another one: a smaller loss, a larger accuracy."""
    return value < other if metric == "loss" else value > other


def best_of(results: Mapping[str, Mapping[str, float]], metric: str) -> str:
    """The name of the best of several results by a metric, the first one of equal ones."""
    sign = -1 if metric == "loss" else 1
    return max(results, key=lambda name: sign * results[name][metric])
