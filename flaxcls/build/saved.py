"""What using a saved run takes of its config."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls.build import inputs, notes, pieces
from flaxcls.build.sources import open_other, source
from flaxcls.build.validate import check
from flaxcls.core.losses import LossSpec
from flaxcls.data.folds import parse_fold
from flaxcls.data.matched import Matched
from flaxcls.data.pipeline import InputOptions, Pipeline, Sizes
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
      evaluation_on: opens other data, `source` and `split` as in `open_other`, by the classes of
        the network, as the third argument says where names differ.
      in_both: how many examples two splits share, of the run's data; 0 for other data.
      trained_on: how many examples of a split are in the training split.
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
    evaluation_on: Callable[[str, str | None, Mapping[str, str] | None], Pipeline]
    in_both: Callable[[Source, Source], int]
    trained_on: Callable[[Source], int]


def saved_mesh(config: ConfigDict, batch_size: int | None = None) -> Mesh:
    """All devices, chosen for batches of that size; None: the run's own."""
    check(config)
    pieces.set_up_devices(config, batch_size or config.batch_size)
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
    transform = inputs.eval_transform(config, pictures)

    def evaluation_on(
        name_or_path: str, split: str | None, class_of: Mapping[str, str] | None
    ) -> Pipeline:
        matched = Matched(
            open_other(config, name_or_path, split, image_shape[2]),
            class_names,
            class_of,
            image_shape=None if transform else image_shape,
            max_pixels=config.input.max_pixels,
        )
        sizes = Sizes((0,), (inputs.eval_image_size(config),))
        return Pipeline(matched, transform, sizes, inputs.input_options(config))

    def open_split(name: str) -> Source:
        return source(config, name, class_names)

    def in_both(first: Source, second: Source) -> int:
        if isinstance(first, Matched) or isinstance(second, Matched):
            return 0
        return notes.in_both(first, second, open_split)

    def trained_on(split: Source) -> int:
        return in_both(open_split(config.data.train_split), split)

    network = pieces.model(config, mesh, len(class_names), (image_shape,))
    return SavedExperiment(
        network=network,
        loss=pieces.loss(config, len(class_names)),
        has_ema=config.ema_decay is not None,
        best_metric=config.checkpoint.best_metric,
        eval_batch_size=config.eval.batch_size or config.batch_size,
        tta=pieces.test_time_augmentation(config, network, image_shape),
        transform=transform,
        input=inputs.input_options(config),
        evaluation=evaluation,
        evaluation_on=evaluation_on,
        in_both=in_both,
        trained_on=trained_on,
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
