"""From the config to the pieces: data, model, loss, augmentation, schedule, optimizer.

Each function raises ConfigError for what can't be, before anything slow happens.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from flaxcls import augment, losses, models, optim, options, schedules
from flaxcls.data.source import SOURCES, Source, open_source, open_tfds
from flaxcls.errors import ConfigError
from flaxcls.schedules import Duration, parse_duration


def _given(section: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """The fields of a section that are set, as keyword arguments."""
    return {
        key: value
        for key, value in section.items()
        if value is not None and key not in ("name", *without)
    }


def check(config: ConfigDict) -> None:
    """Raises ConfigError for fields out of range that no other function here looks at."""

    def require(field: str, condition: bool, what: str) -> None:
        if not condition:
            raise ConfigError(f"config.{field} must be {what}, got {get(config, field)!r}")

    batch, parts = config.batch_size, config.gradient_accumulation
    require("seed", config.seed >= 0, "at least 0")
    require("batch_size", batch >= 1, "at least 1")
    require("gradient_accumulation", parts >= 1 and batch % max(parts, 1) == 0,
            f"a divisor of config.batch_size, {batch}")
    ema = config.ema_decay
    require("ema_decay", ema is None or 0 <= ema < 1, "at least 0 and below 1")
    require("eval.batch_size", (config.eval.batch_size or 1) >= 1, "at least 1")
    require("checkpoint.keep", config.checkpoint.keep >= 1, "at least 1")
    for field, choices in (
        ("checkpoint.best_metric", ("accuracy", "accuracy_top5", "loss")),
        ("model.dtype", ("auto", "float32", "bfloat16")),
    ):
        require(field, get(config, field) in choices, " or ".join(choices))


def get(config: ConfigDict, path: str) -> Any:
    """The value at a path such as `checkpoint.keep`."""
    for name in path.split("."):
        config = config[name]
    return config


class Plan(NamedTuple):
    """What a config means for the data it names; made without reading the examples.

    The intervals are of steps; `save_every` may be of seconds.
    """

    train_source: Source
    eval_source: Source
    network: nn.Module
    steps_per_epoch: float
    total_steps: int
    rate: Callable[[Any], jax.Array]
    log_every: Duration
    eval_every: Duration
    save_every: Duration


def plan(config: ConfigDict) -> Plan:
    """Opens the data and works out the run; ConfigError for all that doesn't fit together."""
    train_source, eval_source = (
        source(config, split) for split in (config.data.train_split, config.data.eval_split)
    )
    num_examples, num_classes = len(train_source), len(train_source.class_names)
    to_steps = partial(schedules.to_steps, batch_size=config.batch_size, num_examples=num_examples)
    total_steps = to_steps(config.duration)
    if not total_steps:
        raise ConfigError(f"config.duration must be at least a step, got {config.duration!r}")
    to_steps = partial(to_steps, total_steps=total_steps)

    def interval(field: str, may_be_time: bool = False) -> Duration:
        duration = parse_duration(get(config, field))
        if not (may_be_time and duration.unit == "seconds"):
            duration = Duration(to_steps(get(config, field)), "steps")
        if duration.value < 1:
            raise ConfigError(f"config.{field} is less than a step or second, {get(config, field)!r}")
        return duration

    if config.checkpoint.best_metric == "accuracy_top5" and num_classes <= 10:
        raise ConfigError(
            "config.checkpoint.best_metric accuracy_top5 needs more than 10 classes, "
            f"{config.data.name} has {num_classes}"
        )
    augment.check(config.augment or ())
    loss(config, None, num_classes)
    return Plan(
        train_source=train_source,
        eval_source=eval_source,
        network=model(config, train_source),
        steps_per_epoch=num_examples / config.batch_size,
        total_steps=total_steps,
        rate=schedule(config, total_steps, to_steps),
        log_every=interval("log_every"),
        eval_every=interval("eval.every"),
        save_every=interval("checkpoint.every", may_be_time=True),
    )


def source(config: ConfigDict, split: str) -> Source:
    """The data that a split such as `train[:90%]` names."""
    given = _given(config.data, "train_split", "eval_split", "dir")
    opener = SOURCES.get(config.data.name, open_tfds)
    known = options.accepted(opener, ("split", "data_dir"))
    options.check("config.data", config.data.name, given, known)
    return open_source(config.data.name, split, data_dir=config.data.dir, **given)


def model(config: ConfigDict, like: Source) -> nn.Module:
    """The network for data like that of a source."""
    dtype = config.model.dtype
    if dtype == "auto":  # XLA:CPU computes bfloat16 in float32, only slower
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    module = models.build(
        config.model.name,
        num_classes=len(like.class_names),
        dtype=jnp.dtype(dtype),
        **_given(config.model, "dtype"),
    )
    models.check_image_shape(module, like.image_shape)
    return module


def loss(config: ConfigDict, labels: np.ndarray | None, num_classes: int) -> Callable:
    """The loss; class weights that are "balanced" come from the training split's `labels`."""
    given = _given(config.loss)
    if given.get("class_weights") == "balanced":
        del given["class_weights"]
        if labels is not None:
            given["class_weights"] = losses.balanced_class_weights(labels, num_classes)
    return losses.build(config.loss.name, **given)


def schedule(
    config: ConfigDict, total_steps: int, to_steps: Callable[[str], int]
) -> Callable[[Any], jax.Array]:
    """The learning rate as a function of the step."""
    learning_rate = config.optimizer.learning_rate
    if config.optimizer.learning_rate_batch:
        learning_rate *= config.batch_size / config.optimizer.learning_rate_batch
    return schedules.build(
        config.schedule.name,
        learning_rate=learning_rate,
        total_steps=total_steps,
        to_steps=to_steps,
        **_given(config.schedule),
    )


def optimizer(
    config: ConfigDict, network: nn.Module, params: Any, rate: Callable[[Any], jax.Array]
) -> tuple[optax.GradientTransformation, str]:
    """The optimizer and what it does to which parameters, in words; `params` may be shapes."""
    return optim.build(
        config.optimizer.name,
        schedule=rate,
        params=params,
        frozen=models.frozen(network),
        **_given(config.optimizer, "learning_rate", "learning_rate_batch"),
    )
