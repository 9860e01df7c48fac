"""A checkpoint of a run, made ready to be used."""

from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from flaxcls import build, models
from flaxcls.build import SavedExperiment
from flaxcls.runs import run_code, run_folder
from flaxcls.runs.checkpoint_reader import CheckpointReader
from flaxcls.runtime import sharding


class RestoredRun(NamedTuple):
    """A checkpoint of a run, ready to be used.

    `variables` are the parameters and batch statistics, and `ema` their average or {}, on the
    devices of `mesh`; `metadata` is what the checkpoint holds besides, and `experiment` what the
    run's config means.
    """

    experiment: SavedExperiment
    step: int
    metadata: dict[str, Any]
    mesh: Mesh
    variables: Any
    ema: Any


def restore(
    workdir: Path,
    checkpoint: str = "last",
    batch_size: int | None = None,
    tta: str | None = None,
) -> RestoredRun:
    """Reads a checkpoint of the run in a folder.

    Args:
      workdir: the run's folder.
      checkpoint: "last", "best" or a step.
      batch_size: what the devices are chosen for; None: the run's own.
      tta: the test-time augmentation, a name of `augment.views.VIEWS` or a user's own; "none" for
        none, None for the run's own, config.eval.tta.
    """
    config = run_folder.load_config(workdir)
    run_code.use(workdir, config)
    if tta is not None:
        config.eval.tta = None if tta == "none" else tta
    mesh = build.saved_mesh(config, batch_size)
    checkpoints = CheckpointReader(workdir / "checkpoints")

    def read(step: int) -> tuple[dict[str, Any], SavedExperiment, Any]:
        metadata = checkpoints.metadata(step)
        experiment = build.saved_experiment(config, metadata, mesh)
        variables = models.shapes(experiment.network, tuple(metadata["image_shape"]))
        shapes = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
        if experiment.has_ema:
            shapes["ema"] = dict(shapes)
        state = checkpoints.state(step, shapes, sharding.shardings(mesh, shapes))
        return metadata, experiment, state

    step, (metadata, experiment, state) = checkpoints.read(checkpoint, read)
    ema = state.pop("ema", {})
    return RestoredRun(experiment, step, metadata, mesh, state, ema)
