"""The ball around an image that adversarial images stay in, and the ascent inside it.

Images are floats [B, H, W, C] in [0, 1], before the normalisation, and so are radii and steps.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.errors import ConfigError

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = ("linf", "l2")
_TINY = 1e-12  # a gradient of zeros has no direction


def parse_eps(field: str, eps: str | float) -> float:
    """A radius or step in units of [0, 1]: 0.5, "0.5" or "8/255"; ConfigError unless above 0."""
    try:
        number, _, divisor = str(eps).partition("/")
        value = float(number) / float(divisor or 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if isinstance(eps, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{field} must be a number above 0 or text such as '8/255', got {eps!r}")
    return value


@dataclasses.dataclass(frozen=True)
class Ball:
    """All images in [0, 1] whose distance to an image is at most `eps`, by a norm.

    `linf` is the largest change of a channel of a pixel, `l2` the Euclidean length of the change.
    """

    norm: Norm
    eps: float

    def project(self, images: jax.Array, candidates: jax.Array) -> jax.Array:
        """The nearest images in the ball around `images`, or just inside of it; both [B, H, W, C].

        By linf they are inside to the last bit: the limits are rounded inwards. By l2 the radius is
        smaller by what rounding can add, some 1e-6 of it; `inside` looks again at the result. What
        is not a number becomes what it was in `images`.
        """
        candidates = jnp.where(jnp.isnan(candidates), images, candidates)
        if self.norm == "linf":
            low, high = self._limits(images)
            return jnp.clip(candidates, low, high)
        offset = candidates - images
        rounding = float(jnp.finfo(images.dtype).eps)
        radius = self.eps * (1 - 32 * rounding) - rounding / 4 * math.sqrt(images[0].size)
        factor = jnp.minimum(1, max(radius, 0) / jnp.maximum(length(offset), _TINY))
        return jnp.clip(images + offset * factor, 0, 1)

    def _limits(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The least and the largest value of each channel, exactly within eps of the image's."""
        eps = np.asarray(self.eps, images.dtype)
        if float(eps) > self.eps:
            eps = np.nextafter(eps, np.zeros_like(eps))
        low, low_error = _exact_sum(images, -eps)
        high, high_error = _exact_sum(images, eps)
        low = jnp.where(low_error > 0, jnp.nextafter(low, jnp.inf), low)
        high = jnp.where(high_error < 0, jnp.nextafter(high, -jnp.inf), high)
        return jnp.clip(low, 0, 1), jnp.clip(high, 0, 1)

    def inside(self, images: np.ndarray, adversarial: np.ndarray) -> np.ndarray:
        """`adversarial` with what is out of the ball shrunk: float32, checked in float64."""
        shrunk = adversarial.astype(np.float32)
        for _ in range(8):
            offset = shrunk.astype(np.float64) - images
            out = distance(self.norm, offset) > self.eps
            if not out.any():
                return shrunk
            closer = images + offset * (1 - 1e-6)
            shrunk = np.where(out[:, None, None, None], closer, shrunk).astype(np.float32)
        return np.where(out[:, None, None, None], images, shrunk)

    def direction(self, gradient: jax.Array) -> jax.Array:
        """The unit of steepest ascent: by linf the gradient's sign, by l2 its direction."""
        if self.norm == "linf":
            return jnp.sign(gradient)
        return gradient / (length(gradient) + _TINY)

    def ascend(
        self, images: jax.Array, adversarial: jax.Array, gradient: jax.Array, step_size: float
    ) -> jax.Array:
        """A step of projected gradient ascent from `adversarial`."""
        return self.project(images, adversarial + step_size * self.direction(gradient))

    def random_start(self, keys: jax.Array, images: jax.Array) -> jax.Array:
        """Uniform in the ball, by a key of its own for each image, and in [0, 1]."""
        shape, dtype = images.shape[1:], images.dtype
        if self.norm == "linf":
            offset = jax.vmap(lambda key: jax.random.uniform(key, shape, dtype, -1, 1))(keys)
        else:  # Muller's: a normal direction, with the radius that volumes grow by
            offset = self.direction(
                jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
            )
            share = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
            offset *= (share ** (1 / math.prod(shape)))[:, None, None, None].astype(dtype)
        return self.project(images, images + self.eps * offset)


def length(arrays: jax.Array) -> jax.Array:
    """The Euclidean lengths of [B, H, W, C], as [B, 1, 1, 1]."""
    return jnp.sqrt(jnp.sum(jnp.square(arrays), axis=(1, 2, 3), keepdims=True))


def distance(norm: Norm, offset: np.ndarray) -> np.ndarray:
    """The lengths, [N], of changes of images, [N, H, W, C], by a norm."""
    flat = np.abs(offset.astype(np.float64)).reshape(len(offset), -1)
    return flat.max(axis=1) if norm == "linf" else np.sqrt(np.square(flat).sum(axis=1))


def pgd(
    ball: Ball,
    gradient: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    start: jax.Array,
    *,
    steps: int,
    step_size: float,
    platform: str,
) -> jax.Array:
    """The images after `steps` of projected gradient ascent (Madry et al. 2018, arXiv:1706.06083).

    `gradient` is that of what is to grow, by the images; all to be jitted for a `platform`.
    """

    def step(adversarial: jax.Array, _: None) -> tuple[jax.Array, None]:
        return ball.ascend(images, adversarial, gradient(adversarial), step_size), None

    # XLA:CPU runs convolutions inside a loop on one thread: there, no loop.
    return jax.lax.scan(step, start, length=steps, unroll=platform == "cpu")[0]


def _exact_sum(first: jax.Array, second: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The rounded sum and what the exact one has more, which is a float, too (Knuth's TwoSum)."""
    total = first + second
    part = total - first
    return total, (first - (total - part)) + (second - part)
