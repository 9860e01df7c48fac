"""Augmentations that move pixels."""

import dataclasses
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp

from flaxcls.augment.base import Augmentation, Batch, like, per_example
from flaxcls.errors import ConfigError
from flaxcls.options import Range


@dataclasses.dataclass(frozen=True)
class PadCrop(Augmentation):
    """Pads every side by `padding` pixels and crops a random H x W window back out.

    `mode` is what is padded with: "zeros" (He et al. 2015, arXiv:1512.03385) or "reflect" (the
    image mirrored at its border, Zagoruyko & Komodakis 2016, arXiv:1605.07146).
    """

    name: ClassVar[str] = "pad_crop"
    padding: Annotated[int, Range(0, 256)] = 4
    mode: Literal["zeros", "reflect"] = "reflect"

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["image"]
        size, height, width, channels = images.shape
        if self.padding >= min(height, width):
            raise ConfigError(
                f"`padding` of `pad_crop` must be smaller than the {height} x {width} image, "
                f"got {self.padding}"
            )
        sides = ((0, 0), (self.padding, self.padding), (self.padding, self.padding), (0, 0))
        padded = jnp.pad(images, sides, mode="constant" if self.mode == "zeros" else "reflect")
        corners = jax.random.randint(key, (size, 2), 0, 2 * self.padding + 1)

        def crop(image, corner):
            return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

        return {**batch, "image": jax.vmap(crop)(padded, corners)}


@dataclasses.dataclass(frozen=True)
class Flip(Augmentation):
    """Mirrors images left to right.

    `mode` "random" flips each with probability one half. "alternating" flips a pseudo-random half
    of the data set (by "index") in epoch 0 and from then on every example in every second epoch,
    so that two epochs see each image both ways (airbench, Jordan 2024, arXiv:2404.00498).
    """

    name: ClassVar[str] = "flip"
    mode: Literal["random", "alternating"] = "random"

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["image"]
        if self.mode == "random":
            flipped = jax.random.bernoulli(key, shape=images.shape[:1])
        else:
            flipped = (_hash(batch["index"]) + batch["epoch"].astype(jnp.uint32)) % 2 == 1
        return {**batch, "image": jnp.where(per_example(flipped), images[:, :, ::-1], images)}


def _hash(indices: jax.Array) -> jax.Array:
    """Integers -> pseudo-random uint32 (the finalizer of MurmurHash3)."""
    bits = indices.astype(jnp.uint32)
    bits = (bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ bits >> 13) * jnp.uint32(0xC2B2AE35)
    return bits ^ bits >> 16


@dataclasses.dataclass(frozen=True)
class Rotation(Augmentation):
    """Rotates each image about its centre by an angle uniform in [-degrees, degrees].

    Bilinear; outside the image there is `fill`, in the unit the images have at that point.
    """

    name: ClassVar[str] = "rotation"
    degrees: Annotated[float, Range(0, 180)] = 15.0
    fill: float = 0.0

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["image"]
        degrees = self.degrees * jax.random.uniform(key, images.shape[:1], minval=-1, maxval=1)
        return {**batch, "image": rotate(images, degrees, self.fill)}


def rotate(images: jax.Array, degrees: jax.Array, fill: float) -> jax.Array:
    """Images [B, H, W, C] turned counter-clockwise by `degrees` [B]."""
    _, height, width, _ = images.shape
    # The outermost ring stands for all of the plane outside the image.
    sides = ((0, 0), (1, 1), (1, 1), (0, 0))
    bordered = jnp.pad(images, sides, constant_values=like(jnp.float32(fill), images))

    radians = jnp.deg2rad(degrees)[:, None, None]
    cosine, sine = jnp.cos(radians), jnp.sin(radians)
    y = jnp.arange(height)[:, None] - (height - 1) / 2
    x = jnp.arange(width)[None, :] - (width - 1) / 2
    # Where each output pixel comes from in `bordered`, [B, H, W].
    row = jnp.clip(cosine * y + sine * x + (height + 1) / 2, 0, height + 1)
    column = jnp.clip(cosine * x - sine * y + (width + 1) / 2, 0, width + 1)
    top = jnp.minimum(row.astype(jnp.int32), height)
    left = jnp.minimum(column.astype(jnp.int32), width)
    down, right = (row - top)[..., None], (column - left)[..., None]

    def pixels(row: jax.Array, column: jax.Array) -> jax.Array:
        return jax.vmap(lambda image, row, column: image[row, column])(bordered, row, column)

    upper = pixels(top, left) * (1 - right) + pixels(top, left + 1) * right
    lower = pixels(top + 1, left) * (1 - right) + pixels(top + 1, left + 1) * right
    return like(upper * (1 - down) + lower * down, images)
