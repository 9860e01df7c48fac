"""What Pillow's ImageOps and ImageEnhance do, to the last rounding, as tables of values and blends.

Images are uint8 [B, H, W, C] with C = 1 or 3, of JAX or, for the host, of NumPy.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # of JAX or NumPy

_VALUES = np.arange(256, dtype=np.int16)  # 16 bits: NumPy keeps what meets float32 in float32


# Lookups: a table, uint8 [B, 1 or C, 256], from the images and the argument [B].


def look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """`tables[b, c, images[b, h, w, c]]` for uint8 images and tables [B, C, 256].

    A TPU compares with all 256 values and adds up: 3.3 MB of memory traffic an image of 160 pixels,
    where gathering takes 167 MB (XLA's count for a v5e, jax 0.10.2).
    """

    def gathered(images: jax.Array, tables: jax.Array) -> jax.Array:
        one_channel = jax.vmap(lambda image, table: table[image], in_axes=(-1, 0), out_axes=-1)
        return jax.vmap(one_channel)(images, tables)

    def compared(images: jax.Array, tables: jax.Array) -> jax.Array:
        values = jnp.where(_is_value(images), tables[..., None].astype(jnp.int32), 0).sum(axis=2)
        count, height, width, channels = images.shape
        planes = values.astype(jnp.uint8).reshape(count, channels, height, width)
        return planes.transpose(0, 2, 3, 1)

    return jax.lax.platform_dependent(images, tables, tpu=compared, default=gathered)


def _is_value(images: jax.Array) -> jax.Array:
    """For each channel and value which pixels have it, bool [B, C, 256, H * W]; to be reduced."""
    count, *_, channels = images.shape
    pixels = images.transpose(0, 3, 1, 2).reshape(count, channels, 1, -1)
    return pixels.astype(jnp.int32) == np.arange(256)[:, None]


def _brightness(images: Array, factor: Array) -> Array:
    return blend(0, _VALUES, factor[:, None, None])


def _contrast(images: Array, factor: Array) -> Array:
    count = images.shape[1] * images.shape[2]
    total = grey(images).astype(np.int32).sum(axis=(1, 2, 3))
    mean = (2 * total + count) // (2 * count)  # rounded half up
    return blend(mean[:, None, None], _VALUES, factor[:, None, None])


def _posterize(images: Array, bits: Array) -> Array:
    step = 2 ** (8 - bits.astype(np.int32))[:, None, None]
    return (_VALUES // step * step).astype(np.uint8)


def _solarize(images: Array, threshold: Array) -> Array:
    xp = threshold.__array_namespace__()
    kept = threshold[:, None, None] > _VALUES
    return xp.where(kept, _VALUES, 255 - _VALUES).astype(np.uint8)


def _solarize_add(images: Array, addition: Array) -> Array:
    xp = addition.__array_namespace__()
    added = xp.minimum(_VALUES + addition[:, None, None], 255)
    return xp.where(_VALUES < 128, added, _VALUES).astype(np.uint8)


def _invert(images: Array, argument: Array) -> Array:
    xp = images.__array_namespace__()
    return xp.asarray((255 - _VALUES).astype(np.uint8))[None, None]


def _autocontrast(images: Array, argument: Array) -> Array:
    # Exact, rounded down. Pillow's floating point is one below where it just misses an integer.
    xp = images.__array_namespace__()
    count, height, *_, channels = images.shape

    def extreme(of: Callable[..., Array]) -> Array:
        """Over whole rows first, which is faster on CPU; [B, C, 1]."""
        of_column = of(images.reshape(count, height, -1), axis=1)
        return of(of_column.reshape(count, -1, channels), axis=1).astype(np.int32)[..., None]

    low, high = extreme(xp.min), extreme(xp.max)
    stretched = (_VALUES - low) * 255 // xp.maximum(high - low, 1)
    return xp.where(high > low, xp.clip(stretched, 0, 255), _VALUES).astype(np.uint8)


def _equalize(images: Array, argument: Array) -> Array:
    xp = images.__array_namespace__()
    counts = _histogram(images)
    up_to = xp.cumsum(counts, axis=-1)
    below_brightest = xp.where(counts > 0, up_to - counts, 0).max(axis=-1, keepdims=True)
    step = below_brightest // 255
    table = (step // 2 + up_to - counts) // xp.maximum(step, 1)
    return xp.where(step > 0, xp.minimum(table, 255), _VALUES).astype(np.uint8)


def _histogram(images: Array) -> Array:
    """How often each value occurs in each channel, int32 [B, C, 256].

    A TPU compares with all 256 values, in a tenth of the memory traffic of its scatter.
    """
    count, *_, channels = images.shape
    if isinstance(images, np.ndarray):
        lines = 256 * np.arange(count * channels).reshape(count, 1, 1, channels)
        counts = np.bincount((images + lines).ravel(), minlength=count * channels * 256)
        return counts.reshape(count, channels, 256)

    def scattered(images: jax.Array) -> jax.Array:
        bins = (images + 256 * jnp.arange(channels)).reshape(count, -1)

        def counted(bins: jax.Array) -> jax.Array:
            return jnp.zeros(channels * 256, jnp.int32).at[bins].add(1, mode="promise_in_bounds")

        return jax.vmap(counted)(bins).reshape(count, channels, 256)

    def compared(images: jax.Array) -> jax.Array:
        return _is_value(images).sum(axis=3, dtype=jnp.int32)

    return jax.lax.platform_dependent(images, tpu=compared, default=scattered)


TABLES: dict[str, Callable[[Array, Array], Array]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "invert": _invert,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}


# Blends: the image that an argument of 0 stands for; at 1 there is no change.


def blend(other: Array, images: Array, factor: Array) -> Array:
    """`other` and `factor` times what `images` differ from it, as uint8: Pillow's `Image.blend`."""
    xp = factor.__array_namespace__()
    other = xp.asarray(other).astype(np.float32)
    difference = images - other
    # Pillow rounds the product before it is added. A compiler may fuse both into one operation that
    # does not; but the products with 12 bits of the factor are exact, either way.
    coarse = factor if xp is np else jax.lax.reduce_precision(factor, 8, mantissa_bits=11)
    product = coarse * difference + (factor - coarse) * difference
    return xp.clip(other + product, 0, 255).astype(np.uint8)


def grey(images: Array) -> Array:
    """Luma (ITU-R 601) as Pillow's mode L has it, uint8 [B, H, W, 1]."""
    if images.shape[-1] == 1:
        return images
    red, green, blue = (images[..., channel, None].astype(np.int32) for channel in range(3))
    weighted = 19595 * red + 38470 * green + 7471 * blue
    return ((weighted + 2**15) >> 16).astype(np.uint8)


def _smooth(images: Array) -> Array:
    """Pillow's filter SMOOTH: the mean of 3 x 3 pixels, the middle counting five times."""
    xp = images.__array_namespace__()
    count, height, width, channels = images.shape
    # Whole rows as vectors, and 16 bits: on CPU many times faster.
    rows = images.reshape(count, height, width * channels).astype(np.int16)
    padded = xp.pad(rows, ((0, 0), (1, 1), (channels, channels)))
    three = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    nine = three[..., : -2 * channels] + three[..., channels:-channels] + three[..., 2 * channels :]
    mean = ((nine + 4 * rows).astype(np.float32) / 13 + 0.5).astype(np.uint8)
    inside = np.zeros((height, width, channels), bool)
    inside[1:-1, 1:-1] = True  # Pillow leaves the border as it is
    return xp.where(inside, mean.reshape(images.shape), images)


BLENDS: dict[str, Callable[[Array], Array]] = {
    "color": lambda images: images.__array_namespace__().broadcast_to(grey(images), images.shape),
    "sharpness": _smooth,
}
