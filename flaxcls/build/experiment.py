"""The Experiment: all that a config means for the data and the devices that it names."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import models
from flaxcls.build import inputs, log_to, notes, pieces
from flaxcls.build.length import Length, interval, profiled_steps, run_length
from flaxcls.build.sources import source
from flaxcls.build.validate import about
from flaxcls.config.durations import Duration, parse_duration
from flaxcls.config.fields import plain
from flaxcls.core.adversarial import AdversarialMethod
from flaxcls.core.losses import LossSpec
from flaxcls.data.pipeline import Pipeline, Sizes
from flaxcls.data.source import Source
from flaxcls.errors import ConfigError
from flaxcls.runtime import sharding


class Divergence(NamedTuple):
    """config.divergence, where each field is explained."""

    max_grad_norm: float
    max_skipped: int
    max_rollbacks: int
    within: float  # steps


class Saving(NamedTuple):
    """config.checkpoint, where each field is explained."""

    every: Duration  # of steps or seconds
    keep: int
    best_metric: str
    on_error: Literal["continue", "stop"]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What is trained, on what, how and for how long; made without reading an example.

    Nothing that is given one knows the config tree: `config` is what the run's folder and its
    checkpoints record of it.

    Attributes:
      config: the config as JSON has it.
      mesh: the devices.
      seed: of everything random.
      train, evaluation: how the batches of the two splits are made.
      eval_batch_size: examples at a time.
      tta: the views that evaluation's logits are the mean over; None: the images as they are.
      normalization: mean and standard deviation per channel; None: those of the training images.
      augmentations: those on the devices, as `augment.build` takes them.
      network, loss, optimizer: what a step computes.
      adversarial: what the images of a step are attacked by; None: they are not.
      frozen: the paths of the parameters that are not trained.
      freeze_batch_stats: whether BatchNorm uses its running statistics in training, and keeps them.
      batch_norm_group: neighbours in a batch that BatchNorm takes its statistics of; None: all.
      gradient_accumulation: parts a batch is computed in.
      steps_per_dispatch: that are compiled as one; None: as many as are good on the devices.
      init_from: where the first weights are from; None: the network's initialisation.
      ema_decay: of the average of the parameters; None: none is kept.
      learning_rate: as a function of the step.
      parameter_groups: what the optimizer does to which parameters, in words.
      length: of the run.
      log_every, eval_every: of steps.
      log_to: the services that metrics are sent to.
      hang_after: seconds without a step; 0: never.
      profiled: the updates, counted from 0, that are traced.
      notes: what a user may not have meant.
    """

    config: Mapping[str, Any]
    mesh: Mesh
    seed: int
    train: Pipeline
    evaluation: Pipeline
    eval_batch_size: int
    tta: str | None
    normalization: tuple[list[float], list[float]] | None
    augmentations: tuple[Any, ...]
    network: nn.Module
    loss: LossSpec
    adversarial: AdversarialMethod | None
    optimizer: optax.GradientTransformation
    frozen: frozenset[str]
    freeze_batch_stats: bool
    batch_norm_group: int | None
    gradient_accumulation: int
    steps_per_dispatch: int | None
    init_from: str | None
    ema_decay: float | None
    learning_rate: Callable[[Any], jax.Array]
    parameter_groups: str
    length: Length
    log_every: Duration
    eval_every: Duration
    log_to: tuple[str, ...]
    hang_after: float
    profiled: range
    saving: Saving
    divergence: Divergence
    notes: tuple[str, ...]

    @property
    def batch_size(self) -> int:
        return self.length.batch_size

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.source.class_names

    @property
    def as_evaluated(self) -> Pipeline:
        """The training pictures as evaluation would see them, without random crops."""
        return dataclasses.replace(self.evaluation, source=self.train.source)


def make_experiment(
    config: ConfigDict, mesh: Mesh, open_split: Callable[[ConfigDict, str], Source] = source
) -> Experiment:
    """Opens the data, by `open_split`, and works out the run on the devices of a mesh.

    ConfigError for all that doesn't fit together.
    """
    log_to.check_installed(config.log_to)
    train_source, eval_source = (
        open_split(config, split) for split in (config.data.train_split, config.data.eval_split)
    )
    num_classes = len(train_source.class_names)
    if config.batch_size > len(train_source) * config.repeats:
        raise ConfigError(
            f"config.batch_size = {config.batch_size:,} is larger than the training split, which "
            f"has {len(train_source):,} examples"
        )
    run = run_length(config, len(train_source))
    saving = Saving(
        **{
            **config.checkpoint,
            "every": interval(config, "checkpoint.every", run, may_be_time=True),
        }
    )
    if saving.best_metric == "accuracy_top5" and num_classes <= 10:
        raise ConfigError(
            "config.checkpoint.best_metric accuracy_top5 needs more than 10 classes, "
            f"{config.data.name} has {num_classes}"
        )
    with about("image_size"):
        sizes = inputs.image_sizes(config, run.to_steps)
    reached = sum(begin < max(run.total_steps, 1) for begin in sizes.begins)
    sizes = Sizes(sizes.begins[:reached], sizes.sizes[:reached])
    train = inputs.training(config, train_source, sizes)
    evaluation = inputs.evaluation(config, eval_source)
    shapes = [train.image_shape(begin) for begin in sizes.begins]

    augmentations = pieces.augmentation(config, shapes, num_classes)
    train, augmentations = inputs.policies_on_host(train, augmentations, sharding.platform(mesh))

    network = pieces.model(config, mesh, num_classes, (*shapes, evaluation.image_shape()))
    models.check_partition(network, mesh.shape.get("model", 1))
    variables = models.shapes(network, shapes[0])
    params = variables["params"]
    frozen = pieces.frozen(config, network, params)
    optimizer, parameter_groups = pieces.optimizer(
        config, network, shapes[0], params, frozen, run, mesh
    )
    whole = config.copy_and_resolve_references()
    whole.data.long_tail = None
    return Experiment(
        config=plain(config),
        mesh=mesh,
        seed=config.seed,
        train=train,
        evaluation=evaluation,
        eval_batch_size=config.eval.batch_size or config.batch_size,
        tta=pieces.test_time_augmentation(config, network, evaluation.image_shape()),
        normalization=pieces.normalization(config, train_source.image_shape[-1]),
        augmentations=augmentations,
        network=network,
        loss=pieces.loss(config, num_classes),
        adversarial=pieces.adversarial_training(config),
        optimizer=optimizer,
        frozen=frozen,
        freeze_batch_stats=config.finetune.freeze_batch_stats,
        batch_norm_group=pieces.batch_norm_group(config),
        gradient_accumulation=config.gradient_accumulation,
        steps_per_dispatch=inputs.steps_per_dispatch(config, train),
        init_from=config.init_from,
        ema_decay=config.ema_decay,
        learning_rate=pieces.learning_rate(config, run),
        parameter_groups=parameter_groups,
        length=run,
        log_every=interval(config, "log_every", run),
        eval_every=interval(config, "eval.every", run),
        log_to=log_to.names(config.log_to),
        hang_after=parse_duration(config.hang_after).value,
        profiled=profiled_steps(config, run),
        saving=saving,
        divergence=Divergence(
            **{**config.divergence, "within": interval(config, "divergence.within", run).value}
        ),
        notes=(
            *notes.shortened(config.schedule, run),
            *notes.evaluated_twice(train_source, eval_source, partial(open_split, whole)),
            *notes.balanced_twice(config),
            *notes.of_pictures(config, sizes, train_source),
            *notes.ignored(train_source, eval_source),
            *notes.batch_norm_groups(config, mesh, variables),
        ),
    )


class Before(NamedTuple):
    """What a run that is resumed was until now."""

    config: Mapping[str, Any]
    total_steps: int
    learning_rate: Callable[[Any], jax.Array]


def before(config: ConfigDict, num_examples: int) -> Before:
    """The config, the length and the learning rate that a run has had, for its training split."""
    run = run_length(config, num_examples)
    return Before(plain(config), run.total_steps, pieces.learning_rate(config, run))
