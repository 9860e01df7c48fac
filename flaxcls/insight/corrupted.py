"""How a saved run withstands common corruptions: its accuracy on corrupted images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flaxcls.buckets import as_path
from flaxcls.core.metrics import WEIGHTS
from flaxcls.core.step import seed_key
from flaxcls.errors import ConfigError
from flaxcls.insight.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from flaxcls.insight.intervals import wilson
from flaxcls.insight.victim import load_victim, sample
from flaxcls.runs import robustness_log


def corrupt_run(
    run: str | Path,
    *,
    examples: int = 1000,
    seed: int = 0,
    split: str | None = None,
    checkpoint: str = "last",
    ema: bool | None = None,
    data_dir: str | None = None,
    alive: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The accuracy of a saved run under each of CORRUPTIONS, at each of five severities.

    Arguments as in `attack_run`. Images are corrupted as the network is given them, after resizing
    and cropping. `alive` is told which corruption is next.

    Returns {"step", "weights", "split", "size", "count", "clean", "clean_interval", "corruptions":
    {name: [an accuracy a severity]}, "mean"}; "mean" is the mean corruption accuracy, of all 75. It
    is kept in the run's folder, for its report.
    """
    if examples < 1:
        raise ConfigError(f"--examples must be at least 1, got {examples}")
    run = as_path(run, "--run=")
    predictor, victim = load_victim(run, checkpoint, ema)
    pipeline = predictor.restored.experiment.evaluation(split, data_dir)
    images, labels, indices = sample(pipeline, examples, seed)
    clean = victim.classify(images.astype(np.float32) / 255)
    table: dict[str, list[float]] = {name: [] for name in CORRUPTIONS}
    for place, (name, accuracies) in enumerate(table.items()):
        alive(name)
        for severity in SEVERITIES:
            # The randomness of an image is that of its number, the corruption and the severity.
            key = jax.random.fold_in(jax.random.fold_in(seed_key(seed), place), severity)
            keys, right = jax.vmap(partial(jax.random.fold_in, key)), 0
            for count, (batch, classes, numbers) in victim.batches(images, labels, indices):
                changed = np.asarray(corrupt(name, severity, keys(numbers), batch))
                found = victim.classify(changed.astype(np.float32) / 255)
                right += int(np.sum((found == np.asarray(classes))[:count]))
            accuracies.append(right / len(labels))
    found = {
        "step": predictor.step,
        "weights": WEIGHTS[predictor.weights],
        "split": pipeline.source.split,
        "size": len(pipeline.source),
        "count": len(labels),
        "clean": float(np.mean(clean == labels)),
        "clean_interval": wilson(int(np.sum(clean == labels)), len(labels)),
        "corruptions": table,
        "mean": float(np.mean([*table.values()])),
    }
    robustness_log.keep(run, found)
    return found
