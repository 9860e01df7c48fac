"""Augmentations that move pixels."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.augment.base import Augmentation, Batch, check_pair, per_example
from flaxcls.augment.ops import Interpolation, about_centre, rotation, warp
from flaxcls.config.options import Range, UpToOne
from flaxcls.errors import ConfigError


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

    @property
    def draws(self) -> int:
        return 1 if self.mode == "random" else 0

    def on_host(self, image: np.ndarray, draws: Sequence[float]) -> np.ndarray:
        return image[:, ::-1] if draws[0] < 0.5 else image


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
        matrix = about_centre(images.shape[1:3], rotation(degrees))
        return {**batch, "image": warp(images, matrix, "bilinear", self.fill)}


@dataclasses.dataclass(frozen=True)
class Affine(Augmentation):
    """Scales, shears, rotates and moves each image, about its centre and in this order.

    Each is drawn uniformly: a factor from `scale`, a shear along x from [-shear, shear] and an
    angle from [-degrees, degrees], both in degrees, and shifts along x and y of up to `translate`
    of the width and the height. Outside the image there is `fill`, in the unit the images have at
    that point.
    """

    name: ClassVar[str] = "affine"
    degrees: Annotated[float, Range(0, 180)] = 0.0
    translate: UpToOne = 0.0
    scale: Annotated[tuple[float, float], Range(0.01, 100)] = (1.0, 1.0)
    shear: Annotated[float, Range(0, below=90)] = 0.0
    interpolation: Interpolation = "bilinear"
    fill: float = 0.0

    def __post_init__(self):
        check_pair(self, "scale")
        if not (self.degrees or self.translate or self.shear) and self.scale == (1, 1):
            raise ConfigError(
                "`affine` needs at least one of `degrees`, `translate`, `scale`, `shear`"
            )

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["image"]
        shape, count = images.shape[1:3], len(images)
        turn_key, shear_key, scale_key, shift_key = jax.random.split(key, 4)

        def symmetric(key: jax.Array, *dimensions: int) -> jax.Array:
            return jax.random.uniform(key, (count, *dimensions), minval=-1, maxval=1)

        low, high = self.scale
        matrix = affine_matrix(
            shape,
            degrees=self.degrees * symmetric(turn_key),
            shear=self.shear * symmetric(shear_key),
            scale=jax.random.uniform(scale_key, (count,), minval=low, maxval=high),
            shift=self.translate * jnp.array(shape[::-1]) * symmetric(shift_key, 2),
        )
        return {**batch, "image": warp(images, matrix, self.interpolation, self.fill)}


def affine_matrix(
    shape: tuple[int, int],
    *,
    degrees: jax.Array,
    shear: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
) -> jax.Array:
    """The matrices [B, 2, 3] for `warp`, by images of `shape` (H, W).

    They shear along x by `shear` [B] degrees, multiply lengths by `scale` [B], turn
    counter-clockwise by `degrees` [B], all about the centre, and move by `shift` [B, 2] pixels,
    (x, y).
    """
    x, y = jnp.moveaxis(rotation(degrees), 1, 0)
    linear = jnp.stack([x - jnp.tan(jnp.deg2rad(shear))[:, None] * y, y], axis=1)
    linear = linear / scale[:, None, None]
    return about_centre(shape, linear, -(linear * shift[:, None]).sum(axis=-1))
