"""Exact metrics of a model on a whole split."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from flaxcls import augment, build, metrics, models, run, sharding
from flaxcls.checkpoint import Checkpoints
from flaxcls.data import resident
from flaxcls.data.decode import materialize
from flaxcls.errors import ConfigError
from flaxcls.step import make_eval_step, zero_metrics


class Evaluator:
    """Evaluates variables on a whole split: every example counts once, whatever the batch size.

    Args:
      images, labels: uint8 [N, H, W, C] and int32 [N].
      batch_size: examples at a time; rounded up to a multiple of the devices.
      mean, std: the run's normalisation, one number a channel.
    """

    def __init__(
        self,
        mesh: Mesh,
        network: nn.Module,
        loss: Callable,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self._mesh, self._size = mesh, len(images)
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._data = sharding.replicate(mesh, {"image": images, "label": labels})
        step = make_eval_step(network, loss, lambda x: augment.normalize(x, mean, std))

        def eval_step(variables, sums, data, batch):
            return step(variables, sums, resident.gather(data, batch))

        place = sharding.everywhere(mesh)
        self._step = jax.jit(eval_step, donate_argnums=1, out_shardings=place)
        self._zeros = jax.jit(lambda: zero_metrics(network.num_classes), out_shardings=place)

    def __call__(self, variables: Any) -> dict[str, float]:
        """{"accuracy", "loss", "count", and "accuracy_top5" with more than 10 classes}."""
        sums = self._zeros()
        for batch in resident.evaluation_batches(self._size, self._batch_size):
            batch = sharding.split_batch(self._mesh, batch)
            sums = sharding.keep_pace(self._step(variables, sums, self._data, batch))
        return {**metrics.compute(sums), "count": int(jax.device_get(sums["accuracy"][1]))}

    def results(self, variables: Any, ema: Any) -> dict[str, dict[str, float]]:
        """The metrics of the parameters as "eval" and, unless {}, of their average as "ema"."""
        results = {"eval": self(variables)}
        if ema:
            results["ema"] = self(ema)
        return results


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
      data_dir: where the data lies now; None: as in the run.

    Returns the step, the split and the metrics: those of the parameters as "eval" and those of
    their average, where the run kept one, as "ema".
    """
    config = run.load_config(workdir)
    if data_dir:
        config.data.dir = data_dir
    split = split or config.data.eval_split
    sharding.set_up_devices(config.mesh.cpu_devices, config.batch_size)
    mesh = sharding.make_mesh()
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.find(checkpoint)
    facts = checkpoints.facts(step)
    source = build.source(config, split)
    if list(source.class_names) != facts["class_names"]:
        raise ConfigError(
            f"the classes of {source.name} are not those that {workdir} was trained on"
        )
    network = build.model(config, source)
    images, labels = materialize(source)
    evaluator = Evaluator(
        mesh,
        network,
        build.loss(config, facts["class_weights"]),
        images,
        labels,
        batch_size=config.eval.batch_size or config.batch_size,
        mean=facts["mean"],
        std=facts["std"],
    )
    variables = models.shapes(network, images.shape[1:])
    shapes = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    if config.ema_decay is not None:
        shapes["ema"] = dict(shapes)
    state = checkpoints.state(step, shapes, sharding.shardings(mesh, shapes))
    checkpoints.close()
    ema = state.pop("ema", {})
    return step, split, evaluator.results(state, ema)
