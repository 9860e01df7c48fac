"""Policies: RandAugment, TrivialAugment, AutoAugment, AugMix and 3-Augment.

Each draws for every example one op of a list, some times over. How strong it is follows from a
level in [0, 1] and a random sign, as `policy_data` says.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.augment import ops, policy_data
from flaxcls.augment.base import OnBytes, per_example
from flaxcls.augment.noise import blur
from flaxcls.augment.ops import Interpolation
from flaxcls.config.options import Count, NonNegative, Range, UpToOne


class Policy(OnBytes):
    """One op after the other for each example; on the devices, or one image at a time on a host."""

    interpolation: Interpolation
    fill: float

    def layers(
        self, draws: Any, shape: tuple[int, int]
    ) -> Iterator[tuple[policy_data.Arguments, Any]]:
        """What `ops.apply` takes as `arguments` and `drawn`, one time after the other.

        `draws` are `self.draws` uniform random numbers for each example, float32 [draws, B] of JAX
        or NumPy; `shape` is (H, W).
        """
        raise NotImplementedError

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        count, *shape, _ = images.shape
        draws = jax.random.uniform(key, (self.draws, count))
        for arguments, drawn in self.layers(draws, shape):
            images = ops.apply(images, arguments, drawn, self.interpolation, self.fill)
        return images

    def on_host(self, image: np.ndarray, draws: Sequence[float]) -> np.ndarray:
        for arguments, drawn in self.layers(np.array(draws, np.float32)[:, None], image.shape[:2]):
            position = int(drawn[0])
            if position >= 0:
                name = sorted(arguments)[position]
                argument = np.asarray(arguments[name], np.float32)
                image = ops.apply_on_host(image, name, argument, self.interpolation, self.fill)
        return image


@dataclasses.dataclass(frozen=True)
class RandAugment(Policy):
    """`num_ops` times over one of 15 ops, all at about the same magnitude from 0 to 10.

    Cubuk et al. 2019, arXiv:1909.13719, in the convention of timm's `auto_augment.py`: the
    magnitude is normally distributed with `magnitude_std` and clipped to [0, 10], each op drawn is
    applied with `probability`, translations reach 0.45 of the side. With `increasing` a greater
    magnitude always is a greater change. Without it, as in the paper's code, posterize and solarize
    are strongest at 0, and the enhancements go from a factor of 0.1 over none at 5 to 1.9 at 10.
    `cutout` adds that code's 16th op, a square of up to 80/224 of the shorter side.

    The default is timm's `rand-m9-mstd0.5-inc1`; without `-inc1` it would not be increasing. The
    paper's code, and big_vision's `randaug(2, 10)`, is magnitude 10, magnitude_std 0, probability
    1, not increasing, cutout and nearest. timm also interpolates by bicubic, which is not here.
    """

    name: ClassVar[str] = "rand_augment"
    num_ops: Count = 2
    magnitude: Annotated[float, Range(0, 10)] = 9.0
    magnitude_std: NonNegative = 0.5
    probability: UpToOne = 0.5
    increasing: bool = True
    cutout: bool = False
    interpolation: Interpolation = "bilinear"
    fill: float = 128.0

    @property
    def draws(self) -> int:
        return 7 * self.num_ops

    def layers(self, draws, shape):
        xp = draws.__array_namespace__()
        for op, sign, active, row, column, *pair in draws.reshape(self.num_ops, 7, -1):
            magnitude = self.magnitude + self.magnitude_std * _normal(*pair)
            level = xp.clip(magnitude, 0, 10) / 10
            arguments = policy_data.rand_arguments(level, _sign(sign), shape, self.increasing)
            if self.cutout:
                half = xp.floor(40 / 224 * min(shape) * level)
                square = row * shape[0], column * shape[1], half
                arguments["cutout"] = xp.stack(square, axis=-1)
            applied = active < self.probability
            yield arguments, xp.where(applied, _integers(op, len(arguments)), -1)


@dataclasses.dataclass(frozen=True)
class TrivialAugment(Policy):
    """One of 14 ops (one of which changes nothing), at one of 31 magnitudes, all equally likely.

    Müller & Hutter 2021, arXiv:2103.10158, with the wide ranges of torchvision's
    `TrivialAugmentWide`.
    """

    name: ClassVar[str] = "trivial_augment"
    interpolation: Interpolation = "bilinear"
    fill: float = 0.0

    draws: ClassVar[int] = 3

    def layers(self, draws, shape):
        op, level, sign = draws
        arguments = policy_data.wide_arguments(_integers(level, 31) / 30, _sign(sign), shape)
        yield arguments, _integers(op, len(arguments))


@dataclasses.dataclass(frozen=True)
class AutoAugment(Policy):
    """One of 25 pairs of ops, each op with a probability and a magnitude of its own.

    The pairs are those found for ImageNet or CIFAR-10 in Cubuk et al. 2018, arXiv:1805.09501; what
    their magnitudes from 0 to 9 mean is torchvision's `AutoAugment`.
    """

    name: ClassVar[str] = "auto_augment"
    policy: Literal["imagenet", "cifar10"] = "imagenet"
    interpolation: Interpolation = "bilinear"
    fill: float = 128.0

    draws: ClassVar[int] = 5

    def layers(self, draws, shape):
        xp = draws.__array_namespace__()
        pairs = policy_data.AUTO_AUGMENT[self.policy]
        pair = _integers(draws[0], len(pairs))
        for layer, sign, active in zip(
            zip(*pairs, strict=True), draws[1:3], draws[3:], strict=True
        ):
            names, probabilities, magnitudes = zip(*layer, strict=True)
            level = xp.asarray(magnitudes, dtype=xp.float32)[pair] / 9
            arguments = policy_data.auto_arguments(level, _sign(sign), shape)
            arguments = {name: arguments[name] for name in sorted(set(names))}
            drawn = xp.asarray([sorted(arguments).index(name) for name in names])[pair]
            applied = active < xp.asarray(probabilities, dtype=xp.float32)[pair]
            yield arguments, xp.where(applied, drawn, -1)


@dataclasses.dataclass(frozen=True)
class AugMix(OnBytes):
    """The image mixed with `width` others, each of them changed by a chain of 1 to `depth` ops.

    The weights of the chains are Dirichlet(alpha), that of their sum Beta(alpha, alpha); an op's
    magnitude is uniform in [0.1, severity], of 10. Hendrycks et al. 2019, arXiv:1912.02781, and
    its code; the consistency loss of that paper is not part of this.
    """

    name: ClassVar[str] = "augmix"
    severity: Annotated[float, Range(0.1, 10)] = 3.0
    width: Count = 3
    depth: Count = 3
    alpha: Annotated[float, Range(0.01, 1000)] = 1.0
    interpolation: Interpolation = "bilinear"
    fill: float = 0.0

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        weight_key, depth_key, uniform_key = jax.random.split(key, 3)
        count, shape = len(images) * self.width, images.shape[1:3]
        chains = jnp.repeat(images, self.width, axis=0)
        depth = jax.random.randint(depth_key, (count,), 1, self.depth + 1)
        draws = jax.random.uniform(uniform_key, (self.depth, 3, count))
        for position, (op, sign, level) in enumerate(draws):
            level = (0.1 + (self.severity - 0.1) * level) / 10
            arguments = policy_data.augmix_arguments(level, _sign(sign), shape)
            drawn = jnp.where(position < depth, _integers(op, len(arguments)), -1)
            chains = ops.apply(chains, arguments, drawn, self.interpolation, self.fill)
        chains = chains.reshape(-1, self.width, *images.shape[1:])
        # A normalised sum of gamma variates is a Dirichlet, or a beta, variate.
        logs = jax.random.loggamma(weight_key, self.alpha, (len(images), self.width + 2))
        weights = jax.nn.softmax(logs[:, :-2])
        mixed = sum(per_example(weights[:, i]) * chains[:, i] for i in range(self.width))
        share = per_example(jax.nn.softmax(logs[:, -2:])[:, 0])
        return (1 - share) * images + share * mixed


@dataclasses.dataclass(frozen=True)
class ThreeAugment(OnBytes):
    """Greyscale, solarize at 128 or Gaussian blur (sigma from 0.1 to 2), one for each example.

    Touvron et al. 2022 (DeiT III), arXiv:2204.07118, which lists `color_jitter` with 0.3 for
    brightness, contrast and saturation after it.
    """

    name: ClassVar[str] = "three_augment"

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        count = len(images)
        choice, sigma = jax.random.uniform(key, (2, count))
        drawn = _integers(choice, 3)
        arguments = {"color": jnp.zeros(count), "solarize": jnp.full(count, 128)}
        images = ops.apply(images, arguments, drawn)  # of which the third is none
        return blur(images, jnp.where(drawn == 2, 0.1 + 1.9 * sigma, 0), 2)


def _integers(uniform: Any, below: int) -> Any:
    """Uniform numbers in [0, 1) -> integers, int32, from 0 to `below` - 1."""
    return (uniform * below).astype(np.int32)


def _sign(uniform: Any) -> Any:
    return uniform.__array_namespace__().where(uniform < 0.5, np.float32(-1), np.float32(1))


def _normal(first: Any, second: Any) -> Any:
    """Uniform numbers in [0, 1) -> normal ones (Box & Muller 1958)."""
    xp = first.__array_namespace__()
    return xp.sqrt(-2 * xp.log1p(-first)) * xp.cos(2 * math.pi * second)
