"""What using a saved run takes of its config."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls.build import inputs, pieces
from flaxcls.build.sources import source
from flaxcls.build.validate import check
from flaxcls.core.losses import LossSpec
from flaxcls.data.folds import parse_fold
from flaxcls.data.pipeline import InputOptions, Pipeline
from flaxcls.data.source import Source, Subset
from flaxcls.data.transform import Transform
from flaxcls.errors import DataError
from flaxcls.runtime import sharding


class SavedExperiment(NamedTuple):
    """The pieces of a run that its evaluation and its predictions need.

    Attributes:
      network, loss: as they were trained.
      has_ema: whether an average of the parameters was kept.
      best_metric: what says which of several results is better.
      eval_batch_size: examples at a time in evaluation.
      tta: the views that logits are the mean over; None: the images as they are.
      transform: what becomes of a picture; None where all have the network's size.
      input: how pictures are read.
      evaluation: opens a split, the run's own for None, whose data may be elsewhere now.
    """

    network: nn.Module
    loss: LossSpec
    has_ema: bool
    best_metric: str
    eval_batch_size: int
    tta: str | None
    transform: Transform | None
    input: InputOptions
    evaluation: Callable[[str | None, str | None], Pipeline]


def saved_mesh(config: ConfigDict, batch_size: int | None = None) -> Mesh:
    """All devices, chosen for batches of that size; None: the run's own."""
    check(config)
    sharding.set_up_devices(config.mesh.cpu_devices, batch_size or config.batch_size)
    return sharding.make_mesh()


def saved_experiment(
    config: ConfigDict, metadata: Mapping[str, Any], mesh: Mesh
) -> SavedExperiment:
    """What a run's config means with the metadata of one of its checkpoints."""
    class_names, image_shape = metadata["class_names"], tuple(metadata["image_shape"])

    def evaluation(split: str | None, data_dir: str | None) -> Pipeline:
        if data_dir:
            config.data["path" if config.data.path else "dir"] = data_dir
        opened = source(config, split or config.data.eval_split, class_names)
        if split is None:
            _check_held_out(config, opened, metadata["fingerprint"])
        return inputs.evaluation(config, opened)

    pictures = Source(  # as far as what becomes of them depends on the data
        name=config.data.name,
        split="",
        class_names=class_names,
        image_shape=tuple(metadata.get("source_shape", image_shape)),
        fingerprint="",
    )
    network = pieces.model(config, mesh, len(class_names), (image_shape,))
    return SavedExperiment(
        network=network,
        loss=pieces.loss(config, len(class_names)),
        has_ema=config.ema_decay is not None,
        best_metric=config.checkpoint.best_metric,
        eval_batch_size=config.eval.batch_size or config.batch_size,
        tta=pieces.test_time_augmentation(config, network, image_shape),
        transform=inputs.eval_transform(config, pictures),
        input=inputs.input_options(config),
        evaluation=evaluation,
    )


def _check_held_out(config: ConfigDict, opened: Source, trained: str) -> None:
    """DataError if the fold that a run has held out is not what it was not trained on.

    `trained` is the fingerprint of the training data.
    """
    fold = parse_fold(config.data.train_split)
    if fold is None or config.data.eval_split != str(fold._replace(is_rest=not fold.is_rest)):
        return
    if isinstance(opened, Subset) and opened.others().fingerprint != trained:
        raise DataError(
            f"'{opened.split}' is not what the run has held out: the data, the file of "
            "config.data.fold_groups or the version of scikit-learn, which divides them, is "
            "another one"
        )
