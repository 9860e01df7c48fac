"""The cost of the augmentations."""

import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from flaxcls import augment
from flaxcls.build import Experiment
from flaxcls.data.transform import Augmented, Change
from flaxcls.perf.figures import Effort, Figures, figure, rates_of
from flaxcls.runtime import sharding
from flaxcls.runtime.output import write_result

IMAGES = 64  # that the host changes in a round


def bench_augment(experiment: Experiment, effort: Effort) -> Figures:
    """Every augmentation on a batch of the recipe's size, and the recipe's own list.

    Of the latter those that the host does are timed there.
    """
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
        pipelines["the recipe's, on the device"] = experiment.augmentations
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
    write_result(f"{'normalising alone':28} {nothing:8.1f} ms")
    figures = {"normalising alone": figure(nothing, "ms/batch")}
    for name, specs in pipelines.items():
        more = max(measure(specs) - nothing, 0)
        write_result(f"{name:28} {more:8.1f} ms more")
        figures[name] = figure(more, "ms/batch more")
    return {**figures, **changes_on_host(experiment, effort.rounds)}


def changes_on_host(experiment: Experiment, rounds: int) -> Figures:
    """Those of the recipe's augmentations that the host does to each image that it has decoded."""
    transform = experiment.train.transform
    changes = transform.changes if isinstance(transform, Augmented) else ()
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (IMAGES, *experiment.train.image_shape()), np.uint8)
    figures = {}
    for change in changes:
        draws = random.random((IMAGES, change.draws))

        def one(change: Change = change, draws: np.ndarray = draws) -> int:
            for image, drawn in zip(images, draws, strict=True):
                change.on_host(image, drawn)
            return IMAGES

        milliseconds = 1e3 / statistics.median(rates_of(one, rounds))
        write_result(f"{change.name:28} {milliseconds:8.3f} ms an image on one core of the host")
        figures[f"{change.name} on the host"] = figure(milliseconds, "ms/image")
    return figures
