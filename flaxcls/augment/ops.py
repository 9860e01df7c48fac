"""The ops of the augmentation policies, whole batches at once, each example with an op of its own.

Computing every op for every example and selecting would be slow. But each op is one of three: a
warp, that is a matrix; a lookup, that is a table of 256 values a channel; or a blend with another
version of the image. `apply` chooses matrix, table and blend for each example first, so that a
layer of a policy costs one warp, one lookup and one blend, whatever was drawn.

As in Pillow, images are uint8 [B, H, W, C] with C = 1 or 3. Warps round where Pillow truncates, and
at the border of the image they interpolate with the fill value where Pillow cuts sharply; the rest
follows its arithmetic to the last rounding (`flaxcls.augment.enhance`).
"""

from collections.abc import Callable, Mapping
from typing import Literal

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.augment.base import box_mask, like, per_example, unfused
from flaxcls.augment.enhance import BLENDS, TABLES, Array, blend, look_up

Interpolation = Literal["nearest", "bilinear"]


def apply(
    images: jax.Array,
    arguments: Mapping[str, jax.Array],
    drawn: jax.Array,
    interpolation: Interpolation = "bilinear",
    fill: float = 0.0,
) -> jax.Array:
    """Applies one op to each of the uint8 `images` [B, H, W, C].

    Args:
      images: the batch.
      arguments: for the name of each op that can be drawn its argument for every example, [B]:
        the factor of a shear, the pixels of a translation, the degrees of a rotation, the
        threshold, addition or number of bits, the factor of an enhancement. "cutout" takes
        [B, 3], the row and the column of a square's centre and half its side; "identity" takes
        anything and changes nothing.
      drawn: int32 [B], the position of each example's op among the sorted names; -1 for none.
      interpolation: of the warps.
      fill: what the warps show outside of the image, and the colour of "cutout".
    """
    chosen = {name: drawn == position for position, name in enumerate(sorted(arguments))}

    def choose(options: Mapping[str, jax.Array], default: jax.Array | np.ndarray) -> jax.Array:
        """For each example the option whose op was drawn, or the default."""
        for name, option in options.items():
            mask = chosen[name].reshape(-1, *[1] * (option.ndim - 1))
            default = jnp.where(mask, option, default)
        return default

    count, *shape, channels = images.shape
    if names := [name for name in arguments if name in WARPS]:
        matrices = {name: WARPS[name](shape, arguments[name]) for name in names}
        matrix = choose(matrices, np.eye(2, 3, dtype=np.float32))
        images = unfused(lambda x: warp(x, matrix, interpolation, fill), images)

    if names := [name for name in arguments if name in TABLES]:

        def fill_in(same: jax.Array) -> jax.Array:
            return choose({name: TABLES[name](images, arguments[name]) for name in names}, same)

        same = jnp.broadcast_to(np.arange(256, dtype=np.uint8), (count, channels, 256))
        tables = unfused(fill_in, same)
        images = unfused(lambda x: look_up(x, tables), images)

    if names := [name for name in arguments if name in BLENDS]:

        def blended(images: jax.Array) -> jax.Array:
            factor = choose({name: arguments[name] for name in names}, np.float32(1))
            others = {name: BLENDS[name](images) for name in names}
            return blend(choose(others, images), images, per_example(factor))

        images = unfused(blended, images)

    if "cutout" in arguments:
        row, column, half = arguments["cutout"].astype(jnp.int32).T
        hole = box_mask(images.shape[1:3], row - half, column - half, 2 * half, 2 * half)
        hole = hole & chosen["cutout"][:, None, None]
        images = jnp.where(hole[..., None], like(jnp.float32(fill), images), images)
    return images


def apply_on_host(
    image: np.ndarray, name: str, argument: np.ndarray, interpolation: Interpolation, fill: float
) -> np.ndarray:
    """What `apply` does to one uint8 image [H, W, C] whose op is drawn; `argument` is float32 [1].

    OpenCV warps: it knows 32 positions between two pixels.
    """
    height, width, channels = image.shape
    if name in WARPS:
        matrix = WARPS[name]((height, width), argument)[0].astype(np.float64)
        matrix[:, 2] += (
            matrix[:, :2].sum(axis=1) / 2 - 0.5
        )  # OpenCV's first pixel has its centre at 0
        method = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR}[interpolation]
        image = cv2.warpAffine(
            image,
            matrix,
            (width, height),
            flags=method | cv2.WARP_INVERSE_MAP,
            borderValue=(round(fill),) * channels,
        )
    elif name in TABLES:
        (tables,) = TABLES[name](image[None], argument)  # one, or one a channel
        image = cv2.LUT(image, np.ascontiguousarray(tables.T)[None])
    elif name in BLENDS:
        image = blend(BLENDS[name](image[None]), image[None], per_example(argument))[0]
    elif name == "cutout":
        row, column, half = argument[0].astype(int).tolist()
        image = image.copy()
        image[
            max(row - half, 0) : max(row + half, 0), max(column - half, 0) : max(column + half, 0)
        ] = round(fill)
    return image.reshape(height, width, channels)  # OpenCV drops the axis of a single channel


def maybe(
    key: jax.Array, probability: float, images: jax.Array, name: str, argument: float = 0
) -> jax.Array:
    """Applies the op `name` with `argument` to each of the uint8 `images` with `probability`."""
    applied = jax.random.bernoulli(key, probability, images.shape[:1])
    arguments = {name: jnp.full(images.shape[:1], argument, jnp.float32)}
    return apply(images, arguments, jnp.where(applied, 0, -1))


# Warps: a matrix [B, 2, 3] from the argument [B], the rows being the six numbers of Pillow's
# `Image.transform(..., AFFINE)`: they say from which point (x, y) of the image an output pixel
# comes, where the first pixel reaches from 0 to 1 and has its centre at 0.5.


def warp(
    images: jax.Array, matrix: jax.Array, interpolation: Interpolation, fill: float
) -> jax.Array:
    """Images [B, H, W, C], uint8 or float32, resampled by `matrix` [B, 2, 3]."""
    _, height, width, _ = images.shape
    # The outermost ring stands for all of the plane outside the image.
    sides = ((0, 0), (1, 1), (1, 1), (0, 0))
    bordered = jnp.pad(images, sides, constant_values=like(jnp.float32(fill), images))

    x, y = jnp.arange(width) + 0.5, jnp.arange(height)[:, None] + 0.5
    a, b, c, d, e, f = jnp.moveaxis(matrix.reshape(-1, 6, 1, 1), 1, 0)
    # Where each output pixel comes from, [B, H, W], as a point of `bordered`.
    column, row = a * x + b * y + c + 1, d * x + e * y + f + 1

    def pixels(row: jax.Array, column: jax.Array) -> jax.Array:
        return jax.vmap(lambda image, row, column: image[row, column])(bordered, row, column)

    if interpolation == "nearest":
        row, column = jnp.clip(row, 0, height + 1), jnp.clip(column, 0, width + 1)
        return pixels(row.astype(jnp.int32), column.astype(jnp.int32))

    row, column = jnp.clip(row - 0.5, 0, height + 1), jnp.clip(column - 0.5, 0, width + 1)
    top = jnp.minimum(row.astype(jnp.int32), height)
    left = jnp.minimum(column.astype(jnp.int32), width)
    down, right = (row - top)[..., None], (column - left)[..., None]
    upper = pixels(top, left) * (1 - right) + pixels(top, left + 1) * right
    lower = pixels(top + 1, left) * (1 - right) + pixels(top + 1, left + 1) * right
    return like(upper * (1 - down) + lower * down, images)


def about_centre(shape: tuple[int, int], linear: Array, offset: Array | float = 0.0) -> Array:
    """The matrix [B, 2, 3] that is `linear` [B, 2, 2] about the centre of images of `shape` (H, W).

    The output's centre comes from `offset` [B, 2], (x, y), beside that of the image.
    """
    height, width = shape
    xp = linear.__array_namespace__()
    centre = xp.asarray([width / 2, height / 2], dtype=xp.float32)
    # Not `linear @ centre`, which would be in bfloat16 on a TPU.
    constant = offset + centre - (linear * centre).sum(axis=-1)
    return xp.concatenate([linear, constant[..., None]], axis=-1)


def rotation(degrees: Array) -> Array:
    """[B] -> [B, 2, 2], for `about_centre`: turns images counter-clockwise."""
    xp = degrees.__array_namespace__()
    radians = xp.deg2rad(degrees)
    cosine, sine = xp.cos(radians), xp.sin(radians)
    return xp.stack([cosine, -sine, sine, cosine], axis=-1).reshape(-1, 2, 2)


def _rotate(shape: tuple[int, int], degrees: Array) -> Array:
    return about_centre(shape, rotation(degrees))


def _one_entry(row: int, column: int) -> Callable[..., jax.Array]:
    """The op whose argument is added to one entry of the identity."""
    entry = np.zeros((2, 3), np.float32)
    entry[row, column] = 1
    return lambda shape, argument: np.eye(2, 3, dtype=np.float32) + argument[:, None, None] * entry


WARPS: dict[str, Callable[[tuple[int, int], Array], Array]] = {
    "shear_x": _one_entry(0, 1),
    "shear_y": _one_entry(1, 0),
    "translate_x": _one_entry(0, 2),
    "translate_y": _one_entry(1, 2),
    "rotate": _rotate,
}
