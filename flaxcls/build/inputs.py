"""From the config to the input: what becomes of a picture, and how batches are made of them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from ml_collections import ConfigDict

from flaxcls import models
from flaxcls.config import options
from flaxcls.data.loader import BrokenImages, Loader, materialize
from flaxcls.data.order import Order, evenly_spaced
from flaxcls.data.resident import Resident
from flaxcls.data.source import Source
from flaxcls.data.statistics import channel_statistics
from flaxcls.data.stream import Stream, Workers, default_workers
from flaxcls.data.transform import TRANSFORMS, Transform
from flaxcls.errors import ConfigError, DataError
from flaxcls.runtime import output

Input = Resident | Stream
Rows = Callable[[int], np.ndarray]  # from a batch's size to those of its rows that one reads

RESIDENT_BYTES = 2**30  # a split that is larger, decoded, is streamed unless the config says else
FIRST_IMAGES = 2000  # for the networks whose first weights depend on the data
SAMPLE = 1000  # images that the normalisation is taken from, where not all are decoded


class Sizes(NamedTuple):
    """The side of the training images, in pixels: `sizes[i]` from step `begins[i]` on."""

    begins: tuple[int, ...]
    sizes: tuple[int | None, ...]

    def __call__(self, step: int) -> int | None:
        return self.sizes[np.searchsorted(self.begins, step, side="right") - 1]

    def describe(self) -> str:
        """The end of a sentence about the input."""
        if self.sizes == (None,):
            return ""
        later = zip(self.sizes[1:], self.begins[1:], strict=True)
        changes = "".join(f", {size} from step {begin:,} on" for size, begin in later)
        compiled = " (the step is compiled for each)" if changes else ""
        return f"; images of {self.sizes[0]} pixels a side{changes}{compiled}"


class Survey(NamedTuple):
    """What one sees of a split at a glance."""

    images: int
    classes: int
    short_side: int  # the median of the pictures' shorter sides, in pixels


def survey(source: Source, count: int = 300) -> Survey:
    """Looks at the headers of some pictures; for the recipes that adapt to their data."""
    loader, sides = Loader(source), []
    for index in evenly_spaced(len(source), count):
        try:
            picture = loader.picture(source[index].image, index)
        except DataError:  # whoever reads it tells
            continue
        sides.append(min(picture.height, picture.width))
    if not sides:
        raise DataError(f"none of the images of {source.name} that were tried can be read")
    return Survey(len(source), len(source.class_names), int(np.median(sides)))


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


def last_image_size(config: ConfigDict) -> int | None:
    """The side of the images that evaluation sees, unless config.eval.image_size says else."""
    given = config.image_size
    return given[-1][1] if isinstance(given, (list, tuple)) and given else given


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
    transform = _transform("config.crop", name, config.crop)
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
    inherited = {
        key: value
        for key, value in config.crop.items()
        if key in known and key != "name" and config.eval.crop.get(key) is None
    }
    transform = _transform("config.eval.crop", name, {**config.eval.crop, **inherited})
    if transform.draws:
        raise ConfigError(f"config.eval.crop.name must not be random, got {name!r}")
    return transform


def _transform(where: str, name: str, section: Any) -> Transform:
    given = {key: value for key, value in section.items() if key != "name" and value is not None}
    kind = options.look_up(f"{where}.name", name, TRANSFORMS)
    return kind(**options.check(where, name, given, options.accepted(kind)))


def image_shape(source: Source, size: int | None) -> tuple[int, int, int]:
    """Height, width and channels of the images made of a source's pictures."""
    return (size, size, source.image_shape[2]) if size else source.image_shape


def _is_resident(config: ConfigDict, source: Source, size: int | None) -> bool:
    mode = config.input.mode
    if mode != "auto":
        return mode == "resident"
    return len(source) * int(np.prod(image_shape(source, size))) <= RESIDENT_BYTES


def check(config: ConfigDict, source: Source, sizes: Sizes) -> None:
    """Raises ConfigError for what `training` and `evaluation` could not make."""
    eval_transform(config, source)
    if config.input.mode == "resident" and _is_changing(train_transform(config, source), sizes):
        raise ConfigError(
            "config.input.mode = 'resident' keeps one version of every image: it can't have "
            "random crops or several sizes"
        )


def _is_changing(transform: Transform | None, sizes: Sizes) -> bool:
    """Whether an image is not the same every time."""
    return len(sizes.sizes) > 1 or bool(transform and transform.draws)


def training(
    config: ConfigDict,
    source: Source,
    sizes: Sizes,
    report: Callable[[str], None] = print,
    rows: Rows | None = None,
) -> Input:
    """The batches to train on, or some `rows` of each; `report` is told about broken images."""
    transform = train_transform(config, source)
    order = Order(
        len(source), batch_size=config.batch_size, seed=config.seed, repeats=config.repeats
    )
    broken = BrokenImages(len(source), config.input.max_broken, report)
    if not _is_changing(transform, sizes) and _is_resident(config, source, sizes(0)):
        images, labels = materialize(
            source,
            transform,
            sizes(0),
            max_pixels=config.input.max_pixels,
            broken=broken,
            progress=_progress(source),
        )
        return Resident(images, labels, order, rows)
    return Stream(
        Loader(source, transform, config.input.max_pixels),
        order,
        image_size=sizes,
        workers=_workers(config),
        rows=rows,
        broken=broken,
    )


def evaluation(config: ConfigDict, source: Source, rows: Rows | None = None) -> Input:
    """Every example of a split once, or some `rows` of each batch."""
    transform = eval_transform(config, source)
    size = eval_image_size(config)
    if _is_resident(config, source, size):
        loaded = materialize(source, transform, size, max_pixels=config.input.max_pixels)
        return Resident(*loaded, rows=rows)
    return Stream(
        Loader(source, transform, config.input.max_pixels),
        image_size=lambda step: size,
        workers=_workers(config),
        rows=rows,
    )


def eval_image_size(config: ConfigDict) -> int | None:
    """The side of the images in evaluation."""
    return config.eval.image_size or last_image_size(config)


def _workers(config: ConfigDict) -> Workers:
    default = default_workers(config.input.read_ahead)
    threads, processes = config.input.threads, config.input.processes
    return default._replace(
        threads=threads or default.threads,
        processes=default.processes if processes is None else processes,
    )


def _progress(source: Source) -> Callable[[int, int], None] | None:
    """A line about decoding that overwrites itself, on a terminal."""
    if not output.Guarded(error=True).isatty():
        return None

    def progress(done: int, count: int) -> None:
        end = "\r" if done < count else "\r\033[K"
        output.say(f"decoding {source.name}: {done:,} of {count:,}", end=end, error=True)

    return progress


def sample(config: ConfigDict, source: Source, count: int) -> np.ndarray:
    """Some training images, evenly spaced over the split, as evaluation would see them."""
    images, _ = materialize(
        source,
        eval_transform(config, source),
        eval_image_size(config),
        indices=np.array(evenly_spaced(len(source), count)),
        max_pixels=config.input.max_pixels,
        broken=BrokenImages(len(source), 1.0, lambda sentence: None),
    )
    return images


def first_images(
    config: ConfigDict, source: Source, pipeline: Input, network: nn.Module
) -> np.ndarray:
    """What a network may look at before its first step, uint8: many images or, mostly, one."""
    count = FIRST_IMAGES if models.needs_images(network) else 1
    if "image" in pipeline.arrays:
        return pipeline.arrays["image"][:count]
    return sample(config, source, min(count, len(source)))


def normalization(
    config: ConfigDict, source: Source, pipeline: Input
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel, as given or those of the training images.

    A streamed split is not decoded only for that: SAMPLE of its images stand for it.
    """
    mean, std = config.data.mean, config.data.std
    if mean is None or std is None:
        images = pipeline.arrays.get("image")
        if images is None:
            images = sample(config, source, SAMPLE)
        mean, std = channel_statistics(images)
    return list(map(float, mean)), list(map(float, std))
