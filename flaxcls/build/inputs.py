"""From the config to the input: what becomes of a picture, and how batches are made of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from flaxcls import augment
from flaxcls.config import options
from flaxcls.config.fields import options_of
from flaxcls.data.order import ClassOrder, Order
from flaxcls.data.pipeline import InputOptions, Pipeline, Sizes
from flaxcls.data.source import Source
from flaxcls.data.transform import TRANSFORMS, Augmented, Transform
from flaxcls.errors import ConfigError

# config.sampling: classes are drawn in proportion to this power of their number of examples.
SAMPLINGS = {"shuffle": 1.0, "balanced": 0.0, "square_root": 0.5}


def training(config: ConfigDict, source: Source, sizes: Sizes) -> Pipeline:
    """The batches to train on; ConfigError for what they can't be made of."""
    transform = train_transform(config, source)
    pipeline = Pipeline(source, transform, sizes, input_options(config), _order(config, source))
    if pipeline.options.mode == "resident" and pipeline.is_changing:
        raise ConfigError(
            "config.input.mode = 'resident' keeps one version of every image: it can't have "
            "random crops or several sizes"
        )
    return pipeline


def _order(config: ConfigDict, source: Source) -> Order:
    """Which examples come when; the labels are read with the first batch, where they matter."""
    same: Any = {name: config[name] for name in ("batch_size", "seed", "repeats")}
    if config.sampling == "shuffle":
        return Order(len(source), **same)
    classes, power = len(source.class_names), SAMPLINGS[config.sampling]
    return ClassOrder(len(source), source.labels, classes, power=power, **same)


def policies_on_host(
    pipeline: Pipeline, augmentations: tuple[Any, ...], platform: str
) -> tuple[Pipeline, tuple[Any, ...]]:
    """A training pipeline with those of the augmentations that the host does, and the others.

    Policies are computed on the host where the split is streamed, but for GPUs, which warp images
    fast, while the cores beside them are few. A TPU would move more memory for RandAugment than for
    a ResNet-50: 1 GB an image of 160 pixels, 0.2 GB.

    ConfigError where config.input.policies asks for what can't be.
    """
    where = pipeline.options.policies
    if pipeline.is_resident:
        if where == "host":
            raise ConfigError(
                "config.input.policies = 'host' needs streamed pictures: "
                "set config.input.mode = 'stream'"
            )
        return pipeline, augmentations
    if where == "device" or (where == "auto" and platform == "gpu"):
        return pipeline, augmentations
    on_host, others = augment.split(augmentations)
    if not on_host:
        return pipeline, augmentations
    transform = Augmented(pipeline.transform, on_host)
    return dataclasses.replace(pipeline, transform=transform), others


def steps_per_dispatch(config: ConfigDict, train: Pipeline) -> int | None:
    """config.steps_per_dispatch; ConfigError where batches can't be stacked."""
    count = config.steps_per_dispatch
    if count is not None and count > 1 and not train.is_resident:
        raise ConfigError(
            "config.steps_per_dispatch must be 1 or None where the training images are streamed, "
            f"got {count}"
        )
    return count


def evaluation(config: ConfigDict, source: Source) -> Pipeline:
    """Every example of a split once, as evaluation sees it."""
    sizes = Sizes((0,), (eval_image_size(config),))
    return Pipeline(source, eval_transform(config, source), sizes, input_options(config))


def input_options(config: ConfigDict) -> InputOptions:
    """config.input."""
    return InputOptions(**config.input)


def image_sizes(config: ConfigDict, to_steps: Callable[[str], int]) -> Sizes:
    """What config.image_size means in steps; None where the data's own size is kept."""
    given = config.image_size
    if given is None:
        return Sizes((0,), (None,))
    if options.fits(given, options.Count):
        return Sizes((0,), (given,))
    if not options.fits(given, Sequence[tuple[str, options.Count]]) or not given:
        raise ConfigError(
            "config.image_size must be a number of pixels, or a schedule such as "
            f"(('0 epochs', 128), ('6 epochs', 160)), got {given!r}"
        )
    begins = tuple(to_steps(begin) for begin, _ in given)
    if begins[0] != 0 or list(begins) != sorted(set(begins)):
        raise ConfigError(
            f"config.image_size must begin at '0 epochs' and go forward, got {given!r}"
        )
    return Sizes(begins, tuple(size for _, size in given))


def eval_image_size(config: ConfigDict) -> int | None:
    """The side of the images in evaluation: its own, or the last one of training."""
    given = config.image_size
    sides = [side for _, side in given] if isinstance(given, (list, tuple)) else [given]
    return config.eval.image_size or (sides[-1] if sides else None)


def train_transform(config: ConfigDict, source: Source) -> Transform | None:
    """What becomes of a training picture; None where the images are taken as they are."""
    fixed = None not in source.image_shape
    if config.image_size is None:
        if not fixed:
            raise ConfigError(
                f"config.image_size is missing: the images of {source.name} have different sizes"
            )
        for option, value in config.crop.items():
            if value is not None:
                raise ConfigError(f"config.image_size is missing: config.crop.{option} needs it")
    name = config.crop.name or ("resize" if fixed else "random_resized_crop")
    transform = _transform("config.crop", name, options_of(config.crop))
    return None if config.image_size is None else transform


def eval_transform(config: ConfigDict, source: Source) -> Transform | None:
    """What becomes of a picture in evaluation, and in everything that uses a trained network."""
    training = train_transform(config, source)
    if training is None and config.eval.image_size is None:
        for option, value in config.eval.crop.items():
            if value is not None:
                raise ConfigError(
                    f"config.eval.image_size is missing: config.eval.crop.{option} needs it"
                )
        return None
    before = config.crop.name or ("resize" if None not in source.image_shape else None)
    name = config.eval.crop.name or (before if before in ("resize", "pad") else "center_crop")
    known = options.accepted(options.look_up("config.eval.crop.name", name, TRANSFORMS))
    inherited = {key: value for key, value in options_of(config.crop).items() if key in known}
    given = {**inherited, **options_of(config.eval.crop)}
    transform = _transform("config.eval.crop", name, given)
    if transform.draws:
        raise ConfigError(f"config.eval.crop.name must not be random, got {name!r}")
    return transform


def _transform(where: str, name: str, given: dict[str, Any]) -> Transform:
    kind = options.look_up(f"{where}.name", name, TRANSFORMS)
    return kind(**options.check(where, name, given, options.accepted(kind)))
