"""From the config to the pieces of a training step: network, loss, schedule, optimizer."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import augment, models
from flaxcls.augment.views import view_shapes
from flaxcls.build import accepted
from flaxcls.build.length import Length
from flaxcls.build.validate import about
from flaxcls.config import options
from flaxcls.config.fields import options_of
from flaxcls.config.user_code import is_path
from flaxcls.core import adversarial, optim, schedules
from flaxcls.core.adversarial import AdversarialMethod
from flaxcls.core.losses import LossSpec
from flaxcls.errors import ConfigError
from flaxcls.models.layer_order import layers_of
from flaxcls.runtime import processes, sharding


def set_up_devices(config: ConfigDict, batch_size: int, num_processes: int = 1) -> None:
    """`sharding.set_up_devices` for the network of a config."""
    tokens = models.is_of_tokens(config.model.name)
    sharding.set_up_devices(config.mesh.cpu_devices, batch_size, num_processes, tokens=tokens)


def mesh(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a config asks for, checked against its batch.

    Of all devices that there are, or of `devices` (jax.Device), which may be another machine's.
    """
    part = config.batch_size // config.gradient_accumulation
    if devices is not None:
        made = sharding.make_mesh(config.mesh.fsdp, config.mesh.model, devices)
        sharding.check_batch_size(made, part)
        return made
    set_up_devices(config, part, processes.count())
    processes.check_device_counts()
    made = sharding.make_mesh(config.mesh.fsdp, config.mesh.model)
    sharding.check_batch_size(made, part)
    return made


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
        **accepted.options_given(config, "model"),
    )
    for shape in image_shapes:
        models.check_image_shape(module, shape)
        if is_path(config.model.name):
            models.check_own(module, shape)
    different = set(image_shapes)
    if len(different) > 1 and len({str(models.shapes(module, shape)) for shape in different}) > 1:
        raise ConfigError(
            f"{config.model.name} has other parameters for images of another size, but "
            f"config.image_size and config.eval.image_size ask for {sorted(different)}"
        )
    return module


def batch_norm_group(config: ConfigDict) -> int | None:
    """The examples that BatchNorm takes its statistics of; None: all of the batch."""
    given = config.model.get("batch_norm_group")
    return None if given == "global" else given


def loss(config: ConfigDict, num_classes: int) -> LossSpec:
    """The loss, whose class weights and counts may still have to come from the data."""
    weights, beta = config.loss.class_weights, config.loss.effective_number_beta
    by_data = weights in ("balanced", "effective_number")
    if weights is not None and not by_data:
        if not options.fits(weights, tuple[float, ...]) or len(weights) != num_classes:
            raise ConfigError(
                "config.loss.class_weights must be 'balanced', 'effective_number' or "
                f"{num_classes} numbers, got {weights!r}"
            )
        weights = tuple(weights)
    if beta is not None and weights != "effective_number":
        raise ConfigError(
            "config.loss.effective_number_beta needs config.loss.class_weights = 'effective_number'"
        )
    counts = config.loss.get("class_counts")
    if counts is not None and not (
        options.fits(counts, tuple[float, ...]) and len(counts) == num_classes
    ):
        raise ConfigError(f"config.loss.class_counts must be {num_classes} numbers, got {counts!r}")
    given = options_of(config.loss, "class_weights", "effective_number_beta")
    spec = LossSpec(config.loss.name, weights, given, **({} if beta is None else {"beta": beta}))
    spec.with_weights(weights if isinstance(weights, tuple) else None)  # ConfigError for options
    return spec


def adversarial_training(config: ConfigDict) -> AdversarialMethod | None:
    """What config.adversarial names."""
    return adversarial.build(config.adversarial.name, options_of(config.adversarial))


def learning_rate(
    config: ConfigDict, run: Length, duration: str | None = None
) -> Callable[[Any], jax.Array]:
    """The learning rate as a function of the step.

    With a duration that of a run which is no longer, and 0 from then on.
    """
    if duration is not None:
        with about("optimizer.learning_rate_durations"):
            steps = min(run.to_steps(duration), run.total_steps)
        if steps < 1:
            raise ConfigError(
                "config.optimizer.learning_rate_durations must be at least a step each, got "
                f"{duration!r}"
            )
        rate = learning_rate(config, run._replace(total_steps=steps))
        return lambda step: jnp.where(step < steps, rate(step), 0.0)
    peak = config.optimizer.learning_rate
    if config.optimizer.learning_rate_batch:
        peak *= config.batch_size / config.optimizer.learning_rate_batch
    with about("schedule"):
        return schedules.build(
            config.schedule.name,
            learning_rate=peak,
            total_steps=run.total_steps,
            to_steps=run.to_steps,
            **options_of(config.schedule),
        )


def frozen(config: ConfigDict, network: nn.Module, params: Mapping[str, Any]) -> frozenset[str]:
    """The paths of the parameters that are not trained, by the network's or the config's wish."""
    patterns = {"`frozen` of the network": models.frozen(network)}
    patterns["config.finetune.freeze"] = config.finetune.freeze
    patterns = {field: pattern for field, pattern in patterns.items() if pattern is not None}
    if not patterns:
        return frozenset()
    paths = optim.paths_of(params)
    found = set().union(*(optim.found_in(*pattern, paths) for pattern in patterns.items()))
    if len(found) == len(paths):
        field, pattern = patterns.popitem()
        raise ConfigError(f"{field} leaves no parameter to train, got {pattern!r}")
    return frozenset(found)


def optimizer(
    config: ConfigDict,
    network: nn.Module,
    image_shape: tuple[int, int, int],
    params: Mapping[str, Any],
    frozen: frozenset[str],
    run: Length,
    mesh: Mesh | None = None,
) -> tuple[optax.GradientTransformation, str]:
    """The optimizer of the network's `params`, and what it does to which of them, in words."""
    decay = config.finetune.layer_decay
    return optim.build(
        config.optimizer.name,
        schedule=learning_rate(config, run),
        shortened=partial(learning_rate, config, run),
        params=params,
        frozen=frozen,
        layers=None if decay is None else (decay, layers_of(network, image_shape)),
        mesh=mesh,
        **options_of(config.optimizer, "learning_rate", "learning_rate_batch"),
    )


def augmentation(
    config: ConfigDict, image_shapes: Sequence[tuple[int, int, int]], num_classes: int
) -> tuple[Any, ...]:
    """config.augment; traced for these shapes, as some augmentations can't take every size."""
    specs = tuple(config.augment or ())
    for shape in image_shapes:
        ones = (1.0,) * shape[-1]
        count = config.batch_size
        batch = {
            "image": jax.ShapeDtypeStruct((count, *shape), jnp.uint8),
            "label": jax.ShapeDtypeStruct((count, num_classes), jnp.float32),
            "index": jax.ShapeDtypeStruct((count,), jnp.int32),
            "epoch": jax.ShapeDtypeStruct((count,), jnp.int32),
        }
        jax.eval_shape(augment.build(specs, mean=ones, std=ones), jax.random.key(0), batch)
    return specs


def test_time_augmentation(
    config: ConfigDict, network: nn.Module, image_shape: tuple[int, int, int]
) -> str | None:
    """config.eval.tta, whose views of images of this shape the network must take."""
    name = config.eval.tta
    for shape in sorted(view_shapes(name, image_shape) - {image_shape}):
        models.check_image_shape(network, shape)
        if str(models.shapes(network, shape)) != str(models.shapes(network, image_shape)):
            raise ConfigError(
                f"{config.model.name} has other parameters for images of another size, but the "
                f"views of config.eval.tta = {name!r} are {shape[0]} x {shape[1]} pixels of "
                f"{image_shape[0]} x {image_shape[1]}"
            )
    return name


def normalization(config: ConfigDict, channels: int) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation as config.data gives them; None: those of the data."""
    given = (config.data.mean, config.data.std)
    if given == (None, None):
        return None
    for values in given:
        if not options.fits(values, tuple[float, ...]) or len(values) != channels:
            raise ConfigError(
                f"config.data.mean and config.data.std must both be given, {channels} "
                f"number{'s' * (channels > 1)} each, got {given}"
            )
    mean, std = (list(map(float, values)) for values in given)
    if min(std) <= 0:
        raise ConfigError(f"config.data.std must be above 0, got {config.data.std}")
    return mean, std
