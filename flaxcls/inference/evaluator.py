"""Exact metrics of a model on a whole split."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import augment, build, models
from flaxcls.build import inputs
from flaxcls.core import losses, metrics
from flaxcls.core.step import make_eval_step, zero_metrics
from flaxcls.data import FILES
from flaxcls.data.resident import gather
from flaxcls.data.source import Source, some_names
from flaxcls.runs import run_code, run_folder
from flaxcls.runs.checkpoint_reader import CheckpointReader
from flaxcls.runtime import sharding
from flaxcls.runtime.output import say


class Evaluator:
    """Evaluates variables on a whole split: every example counts once, whatever the batch size.

    Args:
      loss: what the metric "loss" is the mean of.
      data: every example once, as `inputs.evaluation` gives it.
      batch_size: examples at a time; rounded up to a multiple of the devices.
      mean, std: the run's normalisation, one number a channel.
      objective: the loss that is trained for, if it is another one; then a metric too.
    """

    def __init__(
        self,
        mesh: Mesh,
        network: nn.Module,
        loss: Callable,
        data: inputs.Input,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        objective: Callable | None = None,
    ):
        self._mesh, self._input = mesh, data
        self._batch_size = sharding.round_up(mesh, batch_size)
        self._data = sharding.replicate(mesh, data.arrays)
        step = make_eval_step(network, loss, lambda x: augment.normalize(x, mean, std), objective)

        def eval_step(variables, sums, data, batch):
            return step(variables, sums, gather(data, batch))

        place = sharding.everywhere(mesh)
        self._step = jax.jit(eval_step, donate_argnums=1, out_shardings=place)

        def zeros():
            sums = zero_metrics(network.num_classes)
            return {**sums, "objective": sums["loss"]} if objective else sums

        self._zeros = jax.jit(zeros, out_shardings=place)

    def __call__(
        self, variables: Any, alive: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """{"accuracy", "loss", "count", perhaps "objective", "accuracy_top5" from 11 classes on}.

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
    workdir: Path,
    *,
    split: str | None = None,
    checkpoint: str = "last",
    data_dir: str | None = None,
) -> tuple[int, str, dict[str, dict[str, float]]]:
    """The metrics of a saved run, which needs its folder and the data only.

    Args:
      workdir: the run's folder.
      split: as in TFDS; None: what the run evaluated on.
      checkpoint: "last", "best" or a step.
      data_dir: where the data lies now, what config.data.path or .dir was; None: as in the run.

    Returns the step, the split and the metrics: those of the parameters as "eval" and those of
    their average, where the run kept one, as "ema".
    """
    trained = restore(workdir, checkpoint)
    config, facts = trained.config, trained.facts
    if data_dir:
        config.data["path" if config.data.path else "dir"] = data_dir
    split = split or config.data.eval_split
    source = build.source(config, split, facts["class_names"])
    if config.data.name in FILES:  # whose labels are known without reading a picture
        _say_absent_classes(source)
    evaluator = Evaluator(
        trained.mesh,
        trained.network,
        losses.likelihood(config.loss.name),
        inputs.evaluation(config, source),
        batch_size=config.eval.batch_size or config.batch_size,
        mean=facts["mean"],
        std=facts["std"],
        objective=build.objective(config, facts["class_weights"]),
    )
    with contextlib.closing(evaluator):
        results = evaluator.results(trained.variables, trained.ema)
    return trained.step, split, results


def _say_absent_classes(source: Source) -> None:
    """Which classes a split has examples of, if that is not all."""
    counts = np.bincount(source.labels(), minlength=len(source.class_names))
    there = [source.class_names[label] for label in np.flatnonzero(counts)]
    if len(there) < len(source.class_names):
        say(
            f"note: '{source.split}' has {len(there)} of the {len(source.class_names)} classes: "
            f"{some_names(there)}",
            error=True,
        )


class Trained(NamedTuple):
    """A checkpoint of a run, ready to be used.

    `variables` are the parameters and batch statistics, and `ema` their average or {}, on the
    devices of `mesh`; `facts` is what the checkpoint tells besides, and `config` the run's.
    """

    config: ConfigDict
    step: int
    facts: dict[str, Any]
    mesh: Mesh
    network: nn.Module
    variables: Any
    ema: Any


def restore(workdir: Path, checkpoint: str = "last", batch_size: int | None = None) -> Trained:
    """Reads a checkpoint, "last", "best" or a step, of the run in a folder.

    `batch_size` is what the devices are chosen for, None: the run's own.
    """
    config = run_folder.load_config(workdir)
    run_code.use(workdir, config)
    build.check(config)
    sharding.set_up_devices(config.mesh.cpu_devices, batch_size or config.batch_size)
    mesh = sharding.make_mesh()
    checkpoints = CheckpointReader(workdir / "checkpoints")

    def read(step: int) -> tuple[dict[str, Any], nn.Module, Any]:
        facts = checkpoints.facts(step)
        image_shape = tuple(facts["image_shape"])
        network = build.model(config, mesh, len(facts["class_names"]), (image_shape,))
        variables = models.shapes(network, image_shape)
        shapes = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
        if config.ema_decay is not None:
            shapes["ema"] = dict(shapes)
        state = checkpoints.state(step, shapes, sharding.shardings(mesh, shapes))
        return facts, network, state

    step, (facts, network, state) = checkpoints.read(checkpoint, read)
    ema = state.pop("ema", {})
    return Trained(config, step, facts, mesh, network, state, ema)
