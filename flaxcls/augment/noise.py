"""Augmentations that destroy pixels or blur them."""

import dataclasses
import functools
import math
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.augment.base import (
    Augmentation,
    Batch,
    box_mask,
    check_pair,
    like,
    per_example,
    unfused,
)
from flaxcls.config.options import Range, UpToOne


@dataclasses.dataclass(frozen=True)
class SaltAndPepper(Augmentation):
    """Makes a `fraction` of the pixels (all their channels) white or black, half and half."""

    name: ClassVar[str] = "salt_and_pepper"
    domain: ClassVar[str] = "pixels"
    fraction: UpToOne = 0.05

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["image"]
        chance = jax.random.uniform(key, (*images.shape[:3], 1))
        noisy = jnp.where(chance < self.fraction / 2, 255, images)
        noisy = jnp.where(chance >= 1 - self.fraction / 2, 0, noisy)
        return {**batch, "image": noisy.astype(images.dtype)}


@dataclasses.dataclass(frozen=True)
class Cutout(Augmentation):
    """Zeroes a square of `size` pixels (DeVries & Taylor 2017, arXiv:1708.04552).

    As in the paper its centre may be any pixel, so that parts of it can fall outside the image.
    The zero is black before `normalize` and, as in the paper, the mean after it.
    """

    name: ClassVar[str] = "cutout"
    size: Annotated[int, Range(1, 1024)] = 16

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["image"]
        count, *shape, _ = images.shape
        centre = jax.random.randint(key, (count, 2), 0, jnp.array(shape))
        top, left = (centre - self.size // 2).T
        size = jnp.full((count,), self.size)
        hole = box_mask(shape, top, left, size, size)[..., None]
        return {**batch, "image": jnp.where(hole, 0, images).astype(images.dtype)}


@dataclasses.dataclass(frozen=True)
class RandomErasing(Augmentation):
    """Erases a random rectangle with `probability` (Zhong et al. 2017, arXiv:1708.04896).

    Its `area` is uniform in that range of parts of the image, its `aspect` (height over width)
    log-uniform; of ten draws the first that fits is taken, and if none does the image stays, as
    in torchvision and timm. It is filled with a number, in the unit the images have at that
    point, or after `normalize` with "noise": independent normal values of mean 0 and deviation 1.
    """

    name: ClassVar[str] = "random_erasing"
    probability: UpToOne = 0.5
    area: Annotated[tuple[float, float], Range(0, 1)] = (0.02, 1 / 3)
    aspect: Annotated[tuple[float, float], Range(0.01, 100)] = (0.3, 3.3)
    fill: float | Literal["noise"] = 0.0

    def __post_init__(self):
        check_pair(self, "area")
        check_pair(self, "aspect")

    @property
    def domain(self) -> str:
        return "normalized" if self.fill == "noise" else "any"

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["image"]
        count, height, width, _ = images.shape
        erase_key, box_key, noise_key = jax.random.split(key, 3)
        erased = jax.random.bernoulli(erase_key, self.probability, (count,))
        box = self._box(box_key, count, height, width)
        hole = box_mask((height, width), *box)[..., None] & per_example(erased)
        if self.fill == "noise":
            fill = jax.random.normal(noise_key, images.shape)
        else:
            fill = jnp.float32(self.fill)
        return {**batch, "image": jnp.where(hole, like(fill, images), images)}

    def _box(self, key: jax.Array, count: int, height: int, width: int) -> tuple[jax.Array, ...]:
        """Top, left, height and width, int32 [count] each; of no size where nothing fits."""
        attempts = 10
        size_key, position_key = jax.random.split(key)
        random_area, random_aspect = jax.random.uniform(size_key, (2, attempts, count))
        low, high = self.area
        side = jnp.sqrt((low + (high - low) * random_area) * height * width)
        low, high = math.log(self.aspect[0]), math.log(self.aspect[1])
        root = jnp.exp((low + (high - low) * random_aspect) / 2)
        tall, wide = jnp.round(side * root), jnp.round(side / root)

        fits = (tall < height) & (wide < width)
        first = jnp.argmax(fits, axis=0)
        sizes = jnp.where(fits, jnp.stack([tall, wide]), 0).astype(jnp.int32)
        tall, wide = jnp.take_along_axis(sizes, first[None, None], axis=1)[:, 0]
        room = jnp.stack([height - tall, width - wide]) + 1
        top, left = (jax.random.uniform(position_key, (2, count)) * room).astype(jnp.int32)
        return top, left, tall, wide


@dataclasses.dataclass(frozen=True)
class GaussianBlur(Augmentation):
    """With `probability`, blurs by a Gaussian whose sigma, in pixels, is uniform in that range."""

    name: ClassVar[str] = "gaussian_blur"
    sigma: Annotated[tuple[float, float], Range(0.01, 20)] = (0.1, 2.0)
    probability: UpToOne = 0.5

    def __post_init__(self):
        check_pair(self, "sigma")

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        images = batch["image"]
        apply_key, sigma_key = jax.random.split(key)
        low, high = self.sigma
        sigma = jax.random.uniform(sigma_key, images.shape[:1], minval=low, maxval=high)
        applied = jax.random.bernoulli(apply_key, self.probability, images.shape[:1])
        blurred = blur(images, jnp.where(applied, sigma, 0), high)
        return {**batch, "image": like(blurred, images)}


def blur(images: jax.Array, sigma: jax.Array, largest: float) -> jax.Array:
    """Images [B, H, W, C] blurred by Gaussians of `sigma` [B] pixels, from 0 to `largest`; float32.

    The kernels reach three times `largest` to each side; over the border the outermost pixels go
    on.
    """
    radius = math.ceil(3 * largest)
    distances = np.arange(-radius, radius + 1)
    weights = jnp.exp(-0.5 * (distances / jnp.maximum(sigma, 1e-3)[:, None]) ** 2)
    weights = (weights / weights.sum(axis=1, keepdims=True)).T[..., None, None]

    def along(axis: int, images: jax.Array) -> jax.Array:
        sides = [(radius, radius) if position == axis else (0, 0) for position in range(4)]
        padded = jnp.pad(images, sides, mode="edge")
        # The axis and what comes after it as one: on CPU several times faster.
        size, step = images.shape[axis], math.prod(images.shape[axis + 1 :])
        lines = padded.reshape(len(images), -1, (size + 2 * radius) * step)
        shifted = (lines[..., i * step : (i + size) * step] for i in range(2 * radius + 1))
        blurred = sum(weight * line for weight, line in zip(weights, shifted, strict=True))
        return blurred.reshape(images.shape)

    images = images.astype(jnp.float32)
    for axis in (1, 2):
        images = unfused(functools.partial(along, axis), images)
    return images
