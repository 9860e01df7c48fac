"""The cost of the augmentations."""

import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxcls import augment
from flaxcls.build import Experiment
from flaxcls.perf.figures import Effort, Figures, figure, rates_of
from flaxcls.runtime import sharding
from flaxcls.runtime.output import write_result


def bench_augment(experiment: Experiment, effort: Effort) -> Figures:
    """Every augmentation on a batch of the recipe's size, and the recipe's own list."""
    shape = experiment.train.image_shape()
    count, classes = experiment.batch_size, len(experiment.class_names)
    random = np.random.default_rng(0)
    batch = {
        "image": random.integers(0, 256, (count, *shape), np.uint8),
        "label": np.eye(classes, dtype=np.float32)[np.arange(count) % classes],
        "index": np.arange(count, dtype=np.int32),
        "epoch": np.zeros(count, np.int32),
    }
    batch = sharding.split_batch(experiment.mesh, batch)
    ones = (1.0,) * shape[-1]
    pipelines = {name: ({"name": name},) for name in augment.AUGMENTATIONS}
    pipelines["color_jitter"] = (
        {"name": "color_jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    )
    if experiment.augmentations:
        pipelines["the recipe's"] = experiment.augmentations
    write_result(
        f"batches of {count} x {shape}, {sharding.describe(experiment.mesh)}, jax {jax.__version__}"
    )
    key = jax.random.key(0)

    def measure(specs: Sequence[Any]) -> float:
        apply = jax.jit(augment.build(specs, mean=ones, std=ones))
        jax.block_until_ready(apply(key, batch))

        def one() -> int:
            jax.block_until_ready(apply(key, batch))
            return 1

        return 1e3 / statistics.median(rates_of(one, effort.rounds))

    nothing = measure(())
    write_result(f"{'normalising alone':20} {nothing:8.1f} ms")
    figures = {"normalising alone": figure(nothing, "ms/batch")}
    for name, specs in pipelines.items():
        more = max(measure(specs) - nothing, 0)
        write_result(f"{name:20} {more:8.1f} ms more")
        figures[name] = figure(more, "ms/batch more")
    return figures
