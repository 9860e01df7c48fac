"""What every augmentation is: a frozen dataclass whose fields are its options."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.errors import ConfigError

Batch = dict[str, jax.Array]


class Augmentation:
    """Base of the augmentations, which are frozen dataclasses; `build` checks their fields' types.

    Calling one, `augmentation(key, batch)`, returns a new batch: "image" is [B, H, W, C], uint8
    or float32, and keeps its dtype; "label" is float32 [B, K]; random parameters are drawn
    independently for every example unless the op says otherwise. It is pure and can be jitted.
    """

    name: ClassVar[str]

    # The images an op can take: "any", "pixels" (in [0, 255]) or "normalized".
    domain: ClassVar[str] = "any"

    # How many uniform random numbers `on_host` needs; 0: a host can't do it.
    draws: ClassVar[int] = 0

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if not hasattr(cls, "name"):  # a user's own need not have thought of one
            cls.name = cls.__name__

    def check_order(self, normalized: bool) -> None:
        """Raises `ConfigError` if the op can't take images that are, or aren't, normalized."""
        if normalized and self.domain == "pixels":
            raise ConfigError(f"`{self.name}` needs images in [0, 255]: list it before `normalize`")
        if not normalized and self.domain == "normalized":
            raise ConfigError(f"{self} needs normalized images: list `normalize` before it")
        fill = getattr(self, "fill", 0)
        if not normalized and not 0 <= fill <= 255:
            raise ConfigError(
                f"`fill` of `{self.name}` before `normalize` must be a number between 0 and 255, "
                f"got {fill:g}"
            )

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        raise NotImplementedError

    def on_host(self, image: np.ndarray, draws: Sequence[float]) -> np.ndarray:
        """The same to one uint8 image [H, W, C], by `self.draws` random numbers in [0, 1)."""
        raise NotImplementedError


class OnBytes(Augmentation):
    """An augmentation of whole numbers, as Pillow's are: float images are rounded first.

    The images have 1 or 3 channels; what concerns colours alone leaves those with one as they are.
    """

    domain: ClassVar[str] = "pixels"

    def __call__(self, key: jax.Array, batch: Batch) -> Batch:
        original = batch["image"]
        if original.shape[-1] not in (1, 3):
            raise ConfigError(
                f"`{self.name}` needs images of 1 or 3 channels, got {original.shape[-1]}"
            )
        images = self.change(key, like(original, jnp.zeros((), jnp.uint8)))
        return {**batch, "image": like(images, original)}

    def change(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, C] -> new ones, uint8 or float in [0, 255]."""
        raise NotImplementedError


def check_pair(augmentation: Augmentation, option: str) -> None:
    """Raises `ConfigError` unless `option` is a pair in ascending order."""
    low, high = getattr(augmentation, option)
    if low > high:
        raise ConfigError(
            f"`{option}` of `{augmentation.name}` must be (low, high), got ({low:g}, {high:g})"
        )


def unfused(change: Callable[[jax.Array], jax.Array], value: jax.Array) -> jax.Array:
    """`change(value)`, which XLA's CPU compiler does not mix with what comes before and after.

    It would fuse a step into everything that reads the result, and so compute each pixel many
    times over. `jax.lax.optimization_barrier` around the step has no such effect: it is gone before
    the compiler fuses. But it hides until then that a condition is always true, and so the branch
    that it takes stays one. A condition on the examples would need an all-reduce.
    """

    def branch(value: jax.Array) -> jax.Array:
        always = jax.lax.optimization_barrier(jnp.bool_(True))
        return jax.lax.cond(always, change, lambda value: value, value)

    return jax.lax.platform_dependent(value, cpu=branch, default=change)


def per_example(values: jax.Array) -> jax.Array:
    """[B] -> [B, 1, 1, 1], to broadcast against images."""
    return values[:, None, None, None]


def like(images: jax.Array, original: jax.Array) -> jax.Array:
    """Float `images` in the dtype of `original`; uint8 is rounded and clipped to [0, 255]."""
    if original.dtype == jnp.uint8:
        images = jnp.clip(jnp.round(images), 0, 255)
    return images.astype(original.dtype)


def box_mask(
    shape: tuple[int, int], top: jax.Array, left: jax.Array, height: jax.Array, width: jax.Array
) -> jax.Array:
    """True inside boxes: [..., H, W] for `shape` (H, W) and boxes given as integers [...].

    A box may reach over the border; what is outside is cut off.
    """
    rows, columns = jnp.arange(shape[0]), jnp.arange(shape[1])
    top, left, height, width = (side[..., None] for side in (top, left, height, width))
    inside_rows = (rows >= top) & (rows < top + height)
    inside_columns = (columns >= left) & (columns < left + width)
    return inside_rows[..., :, None] & inside_columns[..., None, :]
