"""Test-time augmentation: the mean of what a network says of several views of the same images.

An augmentation in VIEWS is `views(images uint8 [B, H, W, C], /) -> [(weight, view), ...]`. A view
is of the same B images, uint8 or float32 in 0 to 255, and may have another height and width; the
weights add up to 1.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flaxcls.config.options import look_up
from flaxcls.config.user_code import file_of, in_user_code, is_path
from flaxcls.errors import ConfigError

Weighted = Sequence[tuple[float, jax.Array]]
Views = Callable[[jax.Array], Weighted]


def flip(images: jax.Array, /) -> Weighted:
    """Each image and its mirror image, left to right."""
    return _equal([images, _mirrored(images)])


def flip_shift(images: jax.Array, /) -> Weighted:
    """Airbench's six: the image, half of the weight, and moved by a pixel both ways; each mirrored.

    It is moved down and to the right, and up and to the left, a quarter of the weight each; what
    comes in at the border is reflected (Jordan 2024, arXiv:2404.00498).
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shown = [(0.5, images), (0.25, padded[:, :height, :width]), (0.25, padded[:, 2:, 2:])]
    return [(share * weight, view) for share, x in shown for weight, view in flip(x)]


def five_crop(images: jax.Array, /) -> Weighted:
    """The four corners and the centre, 7/8 of the image high and wide: 224 of 256 pixels."""
    return _equal(_crops(images))


def ten_crop(images: jax.Array, /) -> Weighted:
    """Those of `five_crop`, and each of them mirrored (Krizhevsky et al. 2012)."""
    return _equal([view for x in _crops(images) for view in (x, _mirrored(x))])


VIEWS: dict[str, Views] = {
    "flip": flip,
    "flip_shift": flip_shift,
    "five_crop": five_crop,
    "ten_crop": ten_crop,
}


def mean_over_views(
    name: str | None, function: Callable[[jax.Array], Any]
) -> Callable[[jax.Array], Any]:
    """Returns `function`, of images [B, H, W, C], as its weighted mean over their views.

    Args:
      name: of VIEWS, or a user's own; None: the function itself.
      function: a tree of arrays [B, ...], such as logits. Its mean is not that of what is computed
        from it, such as probabilities. It is compiled once for each view.
    """
    if name is None:
        return function
    views = look_up("config.eval.tta", name, VIEWS)

    def mean(images: jax.Array) -> Any:
        terms = [
            jax.tree.map(functools.partial(jnp.multiply, float(weight)), function(view))
            for weight, view in views(images)
        ]
        return functools.reduce(lambda total, term: jax.tree.map(jnp.add, total, term), terms)

    return mean


def view_shapes(name: str | None, image_shape: tuple[int, int, int]) -> set[tuple[int, int, int]]:
    """The shapes (H, W, C) of the images that a network is given for images of `image_shape`.

    Raises ConfigError for a name that is not known, and for a user's own that does not return views
    as described above.
    """
    if name is None:
        return {image_shape}
    views = look_up("config.eval.tta", name, VIEWS)
    weights: list[float] = []

    def traced(images: jax.Array) -> list[jax.Array]:
        pairs = [*views(images)]
        weights.extend(float(weight) for weight, _ in pairs)
        return [view for _, view in pairs]

    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.uint8)
    with in_user_code(file_of(views)):
        found = jax.eval_shape(traced, images)
    if is_path(name) and not (
        math.isclose(sum(weights), 1, rel_tol=1e-6)
        and all(x.ndim == 4 and (x.shape[0], x.shape[3]) == (2, image_shape[2]) for x in found)
        and all(x.dtype in (jnp.uint8, jnp.float32) for x in found)
    ):
        raise ConfigError(
            f"{name} must return pairs of a weight and images of the same number and channels, "
            f"uint8 or float32, with weights that add up to 1, got for images {images.shape} the "
            f"weights {weights} and {', '.join(f'{x.dtype}{[*x.shape]}' for x in found)}"
        )
    return {view.shape[1:] for view in found}


def _equal(views: Sequence[jax.Array]) -> Weighted:
    return [(1 / len(views), view) for view in views]


def _mirrored(images: jax.Array) -> jax.Array:
    return images[:, :, ::-1]


def _crops(images: jax.Array) -> list[jax.Array]:
    height, width = images.shape[1:3]
    rows, columns = max(1, height * 7 // 8), max(1, width * 7 // 8)
    bottom, right = height - rows, width - columns
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    return [images[:, top : top + rows, left : left + columns] for top, left in corners]
