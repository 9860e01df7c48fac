"""A checkpoint of a run, made ready to be used."""

from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from flaxcls import build, models
from flaxcls.buckets import AnyPath
from flaxcls.build import SavedExperiment
from flaxcls.core.metrics import best_of
from flaxcls.data.matched import read_class_map
from flaxcls.data.pipeline import Pipeline
from flaxcls.errors import ConfigError
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
    workdir: AnyPath,
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


def open_evaluation(
    run: RestoredRun,
    split: str | None = None,
    data_dir: str | None = None,
    source: str | Path | None = None,
    classes: str | Path | None = None,
) -> Pipeline:
    """The examples that a saved run shall be evaluated on, none of them read yet.

    Args:
      split: as in TFDS; None: what the run evaluated on.
      data_dir: where the run's data is now, what config.data.path or .dir was; None: as in the run.
      source: other data, by a name or a path; their classes are matched by name, and may be fewer.
        Without a `split`: all pictures of a folder or a list.
      classes: a CSV of name,class for those of its classes that the network calls otherwise.
    """
    if source is None:
        if classes:
            raise ConfigError("--classes is for --source, whose classes it explains")
        return run.experiment.evaluation(split, data_dir)
    if data_dir:
        raise ConfigError("--data_dir is for the run's own data, and --source for other data")
    class_of = read_class_map(str(classes)) if classes else None
    return run.experiment.evaluation_on(str(source), split, class_of)


def choose_weights(restored: RestoredRun, run: str | Path, ema: bool | None) -> str:
    """Which of the weights, "eval" or "ema", as in the results of evaluations.

    None for `ema` is the better ones when the checkpoint was evaluated, by the run's best_metric.
    """
    if ema and not restored.ema:
        raise ConfigError(f"{run} kept no average of its parameters: config.ema_decay was not set")
    if ema is not None:
        return "ema" if ema else "eval"
    results = restored.metadata["progress"]["results"]
    return best_of(results, restored.experiment.best_metric) if results else "eval"
