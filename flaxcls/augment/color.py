"""Colour augmentations, and normalisation."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from flaxcls.augment import ops
from flaxcls.augment.base import Augmentation, Batch, OnBytes, like, per_example
from flaxcls.config.options import Range, UpToOne
from flaxcls.errors import ConfigError


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Images in [0, 255] -> float32 `(images / 255 - mean) / std`.

    `mean` and `std` hold one number per channel, in units of [0, 1].
    """
    channels = images.shape[-1]
    if len(mean) != channels or len(std) != channels:
        raise ConfigError(
            f"the normalisation has {len(mean)} means and {len(std)} standard deviations, "
            f"the images have {channels} channels"
        )
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255 - mean) / std


@dataclasses.dataclass(frozen=True)
class ColorJitter(Augmentation):
    """Random brightness, contrast, saturation and hue, always in this order.

    The meaning of the fields is torchvision's: the first three are drawn as a factor from
    [max(0, 1 - field), 1 + field], the hue is shifted by a part of the colour circle from
    [-hue, hue]. torchvision also shuffles the order of the four. Saturation and hue leave
    images with one channel as they are.
    """

    name: ClassVar[str] = "color_jitter"
    domain: ClassVar[str] = "pixels"
    brightness: Annotated[float, Range(0, 10)] = 0.0
    contrast: Annotated[float, Range(0, 10)] = 0.0
    saturation: Annotated[float, Range(0, 10)] = 0.0
    hue: Annotated[float, Range(0, 0.5)] = 0.0

    def __post_init__(self):
        if not any(dataclasses.astuple(self)):
            fields = ", ".join(f"`{field.name}`" for field in dataclasses.fields(self))
            raise ConfigError(f"`color_jitter` needs at least one of {fields} above 0")

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        original = batch["image"]
        size, *_, channels = original.shape
        keys = jax.random.split(key, 4)

        def factor(key: jax.Array, strength: float) -> jax.Array:
            low, high = max(0.0, 1 - strength), 1 + strength
            return jax.random.uniform(key, (size,), minval=low, maxval=high)

        images = original.astype(jnp.float32)
        if self.brightness:
            images = adjust_brightness(images, factor(keys[0], self.brightness))
        if self.contrast:
            images = adjust_contrast(images, factor(keys[1], self.contrast))
        if self.saturation and channels > 1:
            images = adjust_saturation(images, factor(keys[2], self.saturation))
        if self.hue and channels > 1:
            turns = jax.random.uniform(keys[3], (size,), minval=-self.hue, maxval=self.hue)
            images = shift_hue(images, turns)
        return {**batch, "image": like(images, original)}


def adjust_brightness(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Scales float images [B, H, W, C] in [0, 255] by `factor` [B]; 0 is black."""
    return _clip(images * per_example(factor))


def adjust_contrast(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Moves images away from, or towards, their mean grey; factor 0 is all grey."""
    mean = _grey(images).mean(axis=(1, 2), keepdims=True)
    return _clip(mean + per_example(factor) * (images - mean))


def adjust_saturation(images: jax.Array, factor: jax.Array) -> jax.Array:
    """Moves pixels away from, or towards, their own grey; factor 0 is a grey image."""
    grey = _grey(images)
    return _clip(grey + per_example(factor) * (images - grey))


def shift_hue(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Turns the hue of RGB images by `turns` [B] of the colour circle (HSV)."""
    red, green, blue = _rgb(images)
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    scale = 1 / jnp.where(chroma == 0, 1, chroma)
    # In sixths of the circle, from red over green (2) to blue (4).
    hue = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    hue = hue + 6 * turns[:, None, None]

    def channel(offset: int) -> jax.Array:
        sixth = (hue + offset) / 6
        sixth = 6 * (sixth - jnp.floor(sixth))  # not `% 6`: several times slower on CPU
        return value - chroma * jnp.clip(jnp.minimum(sixth, 4 - sixth), 0, 1)

    return jnp.stack([channel(5), channel(3), channel(1)], axis=-1)


def _grey(images: jax.Array) -> jax.Array:
    """Luma (ITU-R 601), [B, H, W, 1]."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = _rgb(images)
    return (0.299 * red + 0.587 * green + 0.114 * blue)[..., None]


def _rgb(images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    if images.shape[-1] != 3:
        raise ConfigError(f"`color_jitter` needs images of 1 or 3 channels, got {images.shape[-1]}")
    return images[..., 0], images[..., 1], images[..., 2]


def _clip(images: jax.Array) -> jax.Array:
    return jnp.clip(images, 0, 255)


@dataclasses.dataclass(frozen=True)
class Grayscale(OnBytes):
    """With `probability`, takes the colours out of an image; it keeps its channels."""

    name: ClassVar[str] = "grayscale"
    probability: UpToOne = 0.2

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return ops.maybe(key, self.probability, images, "color", 0)


@dataclasses.dataclass(frozen=True)
class Solarize(OnBytes):
    """With `probability`, inverts the values from `threshold` on."""

    name: ClassVar[str] = "solarize"
    threshold: Annotated[int, Range(0, 256)] = 128
    probability: UpToOne = 0.2

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return ops.maybe(key, self.probability, images, "solarize", self.threshold)


@dataclasses.dataclass(frozen=True)
class Posterize(OnBytes):
    """With `probability`, keeps the highest `bits` of each value and sets the others to zero."""

    name: ClassVar[str] = "posterize"
    bits: Annotated[int, Range(1, 8)] = 4
    probability: UpToOne = 0.5

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return ops.maybe(key, self.probability, images, "posterize", self.bits)


@dataclasses.dataclass(frozen=True)
class Equalize(OnBytes):
    """With `probability`, makes all values of a channel about equally frequent."""

    name: ClassVar[str] = "equalize"
    probability: UpToOne = 0.5

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        return ops.maybe(key, self.probability, images, "equalize")
