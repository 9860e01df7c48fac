"""Exact metrics of a model on a whole split."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flaxcls import augment
from flaxcls.augment.views import mean_over_views
from flaxcls.buckets import AnyPath
from flaxcls.core import metrics
from flaxcls.core.step import make_eval_step, zero_metrics
from flaxcls.data.pipeline import Input, Pipeline
from flaxcls.data.resident import gather
from flaxcls.data.source import Source, some_names
from flaxcls.inference.restored import RestoredRun, open_evaluation, restore
from flaxcls.models.kernels import kernels_for
from flaxcls.runtime import sharding
from flaxcls.runtime.output import say


class Evaluator:
    """Evaluates variables on a whole split: every example counts once, whatever the batch size.

    Args:
      loss: what the metric "loss" is the mean of.
      data: every example once, as a Pipeline without an order opens it.
      batch_size: examples at a time; rounded up to a multiple of the devices.
      mean, std: the run's normalisation, one number per channel; None: the data are what the
        network is given.
      objective: the loss that is trained for, if it is another one; then a metric too.
      tta: the views of the images that logits are the mean over, of `augment.views`; None: none.
      balanced_accuracy: whether the mean accuracy over the classes is a metric.
    """

    def __init__(
        self,
        mesh: Mesh,
        network: nn.Module,
        loss: Callable,
        data: Input,
        *,
        batch_size: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        objective: Callable | None = None,
        tta: str | None = None,
        balanced_accuracy: bool = False,
    ):
        self._mesh, self._input = mesh, data
        self._batch_size = sharding.round_up(mesh, batch_size)
        self._data = sharding.replicate(mesh, data.arrays)

        def forward(variables, images):
            def of_view(view):
                given = view if mean is None else augment.normalize(view, mean, std)
                return network.apply(variables, given, train=False)

            return mean_over_views(tta, of_view)(images)

        step = make_eval_step(forward, loss, objective, balanced_accuracy)

        def eval_step(variables, sums, data, batch):
            return step(variables, sums, gather(data, batch))

        replicated = sharding.everywhere(mesh)
        eval_step = kernels_for(mesh, eval_step)
        self._step = jax.jit(eval_step, donate_argnums=1, out_shardings=replicated)

        def zeros():
            sums = zero_metrics(network.num_classes)
            if objective:
                sums["objective"] = sums["loss"]
            if balanced_accuracy:
                per_class = jnp.zeros(network.num_classes, jnp.int32)
                sums["balanced_accuracy"] = (per_class, per_class)
            return sums

        self._zeros = jax.jit(zeros, out_shardings=replicated)

    def __call__(
        self, variables: Any, alive: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """{"accuracy", "loss", "count", "accuracy_top5" from 11 classes on}, and what is asked for.

        `alive` is called after every batch.
        """
        sums = self._zeros()
        batches = self._input.evaluation_batches(self._batch_size)
        for batch in sharding.prefetch(self._mesh, batches):
            sums = self._step(variables, sums, self._data, batch)
            sharding.block_on_cpu(self._mesh, sums)
            alive()
        return {**metrics.compute(sums), "count": int(jax.device_get(sums["accuracy"][1]))}

    def results(
        self, variables: Any, ema: Any, alive: Callable[[], None] = lambda: None
    ) -> dict[str, dict[str, float]]:
        """The metrics of the parameters as "eval" and, unless {}, of their average as "ema"."""
        results = {"eval": self(variables, alive)}
        if ema:
            results["ema"] = self(ema, alive)
        return results

    def close(self) -> None:
        """Ends the workers that make the batches."""
        self._input.close()


def evaluate_run(
    workdir: AnyPath,
    *,
    split: str | None = None,
    checkpoint: str = "last",
    data_dir: str | None = None,
    source: str | Path | None = None,
    classes: str | Path | None = None,
    tta: str | None = None,
) -> tuple[int, str, dict[str, dict[str, float]]]:
    """The metrics of a saved run, which needs its folder and the data only.

    Args:
      workdir: the run's folder.
      checkpoint: "last", "best" or a step.
      split, data_dir, source, classes: the examples, see `open_evaluation`.
      tta: as for `restore`.

    Returns the step, the split and the metrics: those of the parameters as "eval" and those of
    their average, where the run kept one, as "ema".
    """
    run = restore(workdir, checkpoint, tta=tta)
    pipeline = open_evaluation(run, split, data_dir, source, classes)
    _say_absent_classes(pipeline.source)
    if run.experiment.tta:
        say(f"note: logits are the mean over the views of {run.experiment.tta}", error=True)
    with contextlib.closing(evaluator_of(run, pipeline)) as evaluator:
        results = evaluator.results(run.variables, run.ema)
    return run.step, pipeline.source.split, results


def evaluator_of(run: RestoredRun, pipeline: Pipeline) -> Evaluator:
    """What evaluates a saved run on the examples of a pipeline; to be closed."""
    experiment, metadata = run.experiment, run.metadata
    return Evaluator(
        run.mesh,
        experiment.network,
        experiment.loss.likelihood,
        pipeline.open(),
        batch_size=experiment.eval_batch_size,
        mean=metadata["mean"],
        std=metadata["std"],
        objective=experiment.loss.objective(
            metadata["class_weights"],
            metadata.get("class_counts"),  # which older runs don't have
        ),
        balanced_accuracy=experiment.best_metric == "balanced_accuracy",
        tta=experiment.tta,
    )


def _say_absent_classes(source: Source) -> None:
    """Which classes a split of pictures in files has examples of, if that is not all."""
    if source.file(0) is None:  # labels might not be known without reading every picture
        return
    counts = np.bincount(source.labels(), minlength=len(source.class_names))
    there = [source.class_names[label] for label in np.flatnonzero(counts)]
    if len(there) < len(source.class_names):
        say(
            f"note: '{source.split}' has {len(there)} of the {len(source.class_names)} classes: "
            f"{some_names(there)}",
            error=True,
        )
