"""From the config to the pieces: data, model, loss, augmentation, schedule, optimizer.

Each function raises ConfigError for what can't be, before anything slow happens.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import augment, models
from flaxcls.build import accepted, inputs, notes
from flaxcls.config import default, options
from flaxcls.config.fields import fields, options_of
from flaxcls.config.tree import get
from flaxcls.config.user_code import is_path
from flaxcls.core import losses, optim, schedules
from flaxcls.core.schedules import Duration, parse_duration
from flaxcls.data import check_tfds_name, open_source, open_tfds, opener
from flaxcls.data.source import Source
from flaxcls.errors import ConfigError
from flaxcls.runtime import sharding

_MOST_STEPS = 2**31 - 1  # that a state can count
_MOST_HOURS = 10_000  # without a step; threads can't wait for any time
_MOST_CPU_DEVICES = 1024  # XLA makes a thread for each, and hangs before it has made a million


def check(config: ConfigDict) -> None:
    """Raises ConfigError for fields of a wrong type or value that nothing else looks at."""

    def require(field: str, condition: bool, what: str) -> None:
        if not condition:
            raise ConfigError(f"config.{field} must be {what}, got {get(config, field)!r}")

    for field, standard in fields(default()):
        if standard is not None:
            kind = type(standard)
            require(field, options.fits(get(config, field), kind), options.describe(kind))
    accepted.check(config)
    batch, parts = config.batch_size, config.gradient_accumulation
    require("seed", 0 <= config.seed < 2**64, "at least 0 and below 2**64")
    require("batch_size", batch >= 1, "at least 1")
    require(
        "gradient_accumulation",
        parts >= 1 and batch % max(parts, 1) == 0,
        f"a divisor of config.batch_size, {batch}",
    )
    ema = config.ema_decay
    require("ema_decay", ema is None or 0 <= ema < 1, "at least 0 and below 1")
    for field in (
        "repeats",
        "input.threads",
        "input.read_ahead",
        "input.max_pixels",
        "input.max_bytes",
        "eval.batch_size",
        "eval.image_size",
        "checkpoint.keep",
        "divergence.max_skipped",
        "mesh.fsdp",
        "mesh.cpu_devices",
        "optimizer.learning_rate_batch",
    ):
        value = get(config, field)
        require(field, value is None or options.fits(value, options.Count), "at least 1")
    require("divergence.max_rollbacks", config.divergence.max_rollbacks >= 0, "at least 0")
    with _about("hang_after"):
        hang_after = parse_duration(config.hang_after)
    require("hang_after", hang_after.unit == "seconds", "a time, such as '10 minutes'")
    require("hang_after", hang_after.value <= 3600 * _MOST_HOURS, f"at most {_MOST_HOURS} hours")
    devices = config.mesh.cpu_devices or 1
    require("mesh.cpu_devices", devices <= _MOST_CPU_DEVICES, f"at most {_MOST_CPU_DEVICES}")
    require("divergence.max_grad_norm", config.divergence.max_grad_norm > 0, "above 0")
    require("input.processes", (config.input.processes or 0) >= 0, "at least 0")
    require("input.max_broken", 0 <= config.input.max_broken <= 1, "at least 0 and at most 1")
    require(
        "augment",
        config.augment is None or isinstance(config.augment, (list, tuple)),
        "a list such as ({'name': 'flip'},)",
    )
    for field, choices in (
        ("input.mode", ("auto", "resident", "stream")),
        ("checkpoint.best_metric", ("accuracy", "accuracy_top5", "loss")),
        ("checkpoint.on_error", ("continue", "stop")),
        ("model.dtype", ("auto", "float32", "bfloat16")),
    ):
        require(field, get(config, field) in choices, " or ".join(choices))


@contextlib.contextmanager
def _about(field: str) -> Iterator[None]:
    """Names the field in a ConfigError that does not."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith("config."):
            raise
        raise ConfigError(f"config.{field}: {error}") from error


class Plan(NamedTuple):
    """What a config means for the data it names; made without reading the examples.

    The intervals are of steps; `save_every` may be of seconds. `treatment` says in words what the
    optimizer does to which parameters, `notes` what a user may not have meant.
    """

    train_source: Source
    eval_source: Source
    image_sizes: inputs.Sizes
    network: nn.Module
    steps_per_epoch: float
    total_steps: int
    rate: Callable[[Any], jax.Array]
    optimizer: optax.GradientTransformation
    treatment: str
    log_every: Duration
    eval_every: Duration
    save_every: Duration
    notes: tuple[str, ...]


def plan(config: ConfigDict, mesh: Mesh) -> Plan:
    """Opens the data and works out the run on the devices of a mesh.

    ConfigError for all that doesn't fit together.
    """
    train_source, eval_source = (
        source(config, split) for split in (config.data.train_split, config.data.eval_split)
    )
    num_examples, num_classes = len(train_source), len(train_source.class_names)
    if config.batch_size > num_examples * config.repeats:
        raise ConfigError(
            f"config.batch_size = {config.batch_size:,} is larger than the training split, which "
            f"has {num_examples:,} examples"
        )
    total_steps, in_steps = length(config, num_examples)

    def interval(field: str, may_be_time: bool = False) -> Duration:
        with _about(field):
            duration = parse_duration(get(config, field))
            if not (may_be_time and duration.unit == "seconds"):
                steps = in_steps(get(config, field))
                # A small part of a short run, or an epoch of few examples, may be less than a step.
                if duration.unit == "%" or (duration.unit == "epochs" and duration.value >= 1):
                    steps = max(1, steps)
                duration = Duration(steps, "steps")
        if duration.value < 1:
            raise ConfigError(f"config.{field} must be at least a step, got {get(config, field)!r}")
        return duration

    if config.checkpoint.best_metric == "accuracy_top5" and num_classes <= 10:
        raise ConfigError(
            "config.checkpoint.best_metric accuracy_top5 needs more than 10 classes, "
            f"{config.data.name} has {num_classes}"
        )
    with _about("image_size"):
        image_sizes = inputs.image_sizes(config, lambda duration: round(in_steps(duration)))
    reached = sum(begin < total_steps for begin in image_sizes.begins)
    image_sizes = inputs.Sizes(*(column[:reached] for column in image_sizes))
    inputs.check(config, train_source, image_sizes)
    _check_normalization(config, train_source.image_shape[-1])
    shapes = [inputs.image_shape(train_source, size) for size in image_sizes.sizes]
    for shape in shapes:
        _check_augmentation(config, shape, num_classes)
    loss(config, _given_class_weights(config, num_classes))
    evaluated = inputs.image_shape(eval_source, inputs.eval_image_size(config))
    network = model(config, mesh, num_classes, (*shapes, evaluated))
    rate = learning_rate(config, num_examples)
    params = models.shapes(network, shapes[0])["params"]
    transformation, treatment = optimizer(config, network, params, rate)
    return Plan(
        train_source=train_source,
        eval_source=eval_source,
        image_sizes=image_sizes,
        network=network,
        steps_per_epoch=num_examples / config.batch_size,
        total_steps=total_steps,
        rate=rate,
        optimizer=transformation,
        treatment=treatment,
        log_every=interval("log_every"),
        eval_every=interval("eval.every"),
        save_every=interval("checkpoint.every", may_be_time=True),
        notes=(
            *notes.shortened(config.schedule, total_steps, in_steps),
            *notes.evaluated_twice(train_source, eval_source, partial(source, config)),
            *notes.enlarged(image_sizes, train_source),
            *notes.ignored(train_source, eval_source),
        ),
    )


def length(config: ConfigDict, num_examples: int) -> tuple[int, Callable[[str], float]]:
    """The steps of the run, and what turns any duration into steps, perhaps not whole ones."""
    sizes = {"batch_size": config.batch_size, "num_examples": num_examples}
    with _about("duration"):
        total_steps = schedules.in_steps(config.duration, **sizes)
    if total_steps > _MOST_STEPS:
        raise ConfigError(
            f"config.duration must be at most {_MOST_STEPS:,} steps, got {config.duration!r}, "
            f"which are {total_steps:.3g}"
        )
    if total_steps <= 0.5:
        raise ConfigError(f"config.duration must be at least a step, got {config.duration!r}")
    sizes["total_steps"] = round(total_steps)
    return round(total_steps), partial(schedules.in_steps, **sizes)


def check_source(config: ConfigDict) -> dict[str, Any]:
    """The options of the data, if they are right; the data are not opened."""
    given = options_of(config.data, "train_split", "eval_split", "dir", "mean", "std")
    open_split = opener(config.data.name)
    if given and open_split is open_tfds:  # else the sentence would be about an option
        check_tfds_name(config.data.name, config.data.dir)
    known = options.accepted(open_split, ("name", "split", "data_dir", "class_names", "max_bytes"))
    options.check("config.data", config.data.name, given, known)
    return given


def source(config: ConfigDict, split: str, class_names: Sequence[str] | None = None) -> Source:
    """The data that a split such as `train[:90%]` names.

    With `class_names`, the classes of a network by label, a folder or a list needs no more than
    some of them.
    """
    given = check_source(config)
    return open_source(
        config.data.name,
        split,
        data_dir=config.data.dir,
        max_bytes=config.input.max_bytes,
        class_names=class_names,
        **given,
    )


def _check_normalization(config: ConfigDict, channels: int) -> None:
    given = (config.data.mean, config.data.std)
    if given == (None, None):
        return
    for values in given:
        if not options.fits(values, tuple[float, ...]) or len(values) != channels:
            raise ConfigError(
                f"config.data.mean and config.data.std must both be given, {channels} "
                f"number{'s' * (channels > 1)} each, got {given}"
            )
    if min(config.data.std) <= 0:
        raise ConfigError(f"config.data.std must be above 0, got {config.data.std}")


def _check_augmentation(config: ConfigDict, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Traces the augmentations for images of that shape: some can't take every size."""
    ones = (1.0,) * image_shape[-1]
    size = config.batch_size
    shapes = {
        "image": jax.ShapeDtypeStruct((size, *image_shape), jnp.uint8),
        "label": jax.ShapeDtypeStruct((size, num_classes), jnp.float32),
        "index": jax.ShapeDtypeStruct((size,), jnp.int32),
        "epoch": jax.ShapeDtypeStruct((size,), jnp.int32),
    }
    augmentation = augment.build(config.augment or (), mean=ones, std=ones)
    jax.eval_shape(augmentation, jax.random.key(0), shapes)


def model(
    config: ConfigDict,
    mesh: Mesh,
    num_classes: int,
    image_shapes: Sequence[tuple[int, int, int]],
) -> nn.Module:
    """The network for images of all these shapes; its parameters must be the same for each."""
    dtype = config.model.dtype
    if dtype == "auto":
        dtype = sharding.fast_dtype(mesh.devices.flat[0])
    module = models.build(
        config.model.name,
        num_classes=num_classes,
        dtype=jnp.dtype(dtype),
        **options_of(config.model, "dtype"),
    )
    for shape in image_shapes:
        models.check_image_shape(module, shape)
        if is_path(config.model.name):
            models.check_own(module, shape)
    if len({str(models.shapes(module, shape)) for shape in set(image_shapes)}) > 1:
        raise ConfigError(
            f"{config.model.name} has other parameters for images of another size, but "
            f"config.image_size and config.eval.image_size ask for {sorted(set(image_shapes))}"
        )
    return module


def _given_class_weights(config: ConfigDict, num_classes: int) -> Sequence[float] | None:
    weights = config.loss.class_weights
    if weights is None or weights == "balanced":
        return None
    if not options.fits(weights, tuple[float, ...]) or len(weights) != num_classes:
        raise ConfigError(
            f"config.loss.class_weights must be 'balanced' or {num_classes} numbers, "
            f"got {weights!r}"
        )
    return weights


def class_weights(config: ConfigDict, source: Source, num_classes: int) -> list[float] | None:
    """The weight of each class: as given, or balanced by a training split's labels; or None."""
    if config.loss.class_weights == "balanced":
        return losses.balanced_class_weights(source.labels(), num_classes).tolist()
    return _given_class_weights(config, num_classes)


def loss(config: ConfigDict, weights: Sequence[float] | None) -> Callable:
    """The loss with these class weights."""
    given = options_of(config.loss, "class_weights")
    return losses.build(config.loss.name, class_weights=weights, **given)


def objective(config: ConfigDict, weights: Sequence[float] | None) -> Callable | None:
    """The loss that is trained for, if evaluation's `losses.likelihood` is another one."""
    given = options_of(config.loss, "class_weights")
    is_same = losses.is_likelihood(config.loss.name, class_weights=weights, **given)
    return None if is_same else loss(config, weights)


def learning_rate(config: ConfigDict, num_examples: int) -> Callable[[Any], jax.Array]:
    """The learning rate as a function of the step, for a training split of that size."""
    total_steps, in_steps = length(config, num_examples)
    peak = config.optimizer.learning_rate
    if config.optimizer.learning_rate_batch:
        peak *= config.batch_size / config.optimizer.learning_rate_batch
    with _about("schedule"):
        return schedules.build(
            config.schedule.name,
            learning_rate=peak,
            total_steps=total_steps,
            to_steps=lambda duration: round(in_steps(duration)),
            **options_of(config.schedule),
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
        **options_of(config.optimizer, "learning_rate", "learning_rate_batch"),
    )
