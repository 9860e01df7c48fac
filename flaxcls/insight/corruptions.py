"""The fifteen common corruptions of CIFAR-10-C and ImageNet-C (Hendrycks & Dietterich 2019).

Pure functions of a key for each image, with the constants of the published generators
(arXiv:1903.12261): CIFAR-10-C's up to 64 pixels a side, else ImageNet-C's, whose images are 224
pixels. They are new images, not the published ones: random numbers differ; frost is synthetic, as
its photographs are not ours to ship; JPEG is Pillow's, on the host; and ImageNet-C's images were
stored as JPEG once more. docs/knowing.md has what else differs.
"""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from flaxcls.insight import resampling

SEVERITIES = (1, 2, 3, 4, 5)
_SMALL = 64  # pixels a side that CIFAR-10-C's constants are for

Images = Any  # float32 [B, H, W, C] in [0, 1]
Function = Callable[[jax.Array, Images, Any], Images]  # keys [B], images, constants


def gaussian_noise(keys: jax.Array, images: Images, scale: float) -> Images:
    return images + scale * _draw(jax.random.normal, keys, images)


def shot_noise(keys: jax.Array, images: Images, photons: float) -> Images:
    def poisson(key: jax.Array, image: jax.Array) -> jax.Array:
        return jax.random.poisson(key, image * photons).astype(jnp.float32)

    return jax.vmap(poisson)(keys, images) / photons


def impulse_noise(keys: jax.Array, images: Images, share: float) -> Images:
    """Channels, each on its own, become 0 or 1."""
    chance = _draw(jax.random.uniform, keys, images)
    return jnp.where(chance < share, jnp.where(chance < share / 2, 0.0, 1.0), images)


def defocus_blur(keys: jax.Array, images: Images, disk: tuple[float, float]) -> Images:
    kernel = disk_kernel(*disk)
    reach = len(kernel) // 2
    count, height, width, channels = images.shape
    planes = images.transpose(0, 3, 1, 2).reshape(-1, 1, height, width)
    sides = ((0, 0), (0, 0), (reach, reach), (reach, reach))
    padded = jnp.pad(planes, sides, mode="reflect")
    kernel = jnp.asarray(kernel[None, None], jnp.float32)
    blurred = jax.lax.conv(padded, kernel, (1, 1), "VALID", jax.lax.Precision.HIGHEST)
    return blurred.reshape(count, channels, height, width).transpose(0, 2, 3, 1)


def glass_blur(keys: jax.Array, images: Images, how: tuple[float, int, int]) -> Images:
    sigma, reach, times = how
    height, width = images.shape[1:3]
    blur = partial(
        resampling.along_axes,
        rows=resampling.gaussian(height, sigma, 4, "nearest"),
        columns=resampling.gaussian(width, sigma, 4, "nearest"),
    )
    return blur(resampling.scattered(_floor(blur(images)), keys, reach, times))


def motion_blur(keys: jax.Array, images: Images, how: tuple[int, float]) -> Images:
    degrees = _each(keys, -45, 45)
    return resampling.streaks(images, *how, degrees)


def zoom_blur(keys: jax.Array, images: Images, factors: np.ndarray) -> Images:
    height, width = images.shape[1:3]
    total = images
    for factor in factors:
        rows, columns = (resampling.zoom(size, factor) for size in (height, width))
        total = total + resampling.along_axes(images, rows, columns)
    return total / (len(factors) + 1)


def snow(keys: jax.Array, images: Images, how: tuple[float, ...]) -> Images:
    mean, deviation, factor, least, radius, sigma, keep = how
    height, width = images.shape[1:3]
    flakes = mean + deviation * _draw(jax.random.normal, keys, images[..., :1])
    rows, columns = (resampling.zoom(size, factor) for size in (height, width))
    flakes = resampling.along_axes(flakes, rows, columns)
    flakes = _floor(jnp.clip(jnp.where(flakes < least, 0, flakes), 0, 1))
    degrees = _each(_more(keys), -135, -45)
    flakes = _floor(resampling.streaks(flakes, int(radius), sigma, degrees))
    pale = jnp.maximum(images, _grey(images) * 1.5 + 0.5)
    return keep * images + (1 - keep) * pale + flakes + flakes[:, ::-1, ::-1]


def frost(keys: jax.Array, images: Images, weights: tuple[float, float]) -> Images:
    """Ice of our own: bright ridges and patches of two plasma clouds, a little blue."""
    size = max(images.shape[1:3])
    ridges, patches = (
        resampling.plasma(key, size, decay)[:, : images.shape[1], : images.shape[2], None]
        for key, decay in ((keys, 1.8), (_more(keys), 2.2))
    )
    ice = 0.6 * (1 - jnp.abs(2 * ridges - 1)) ** 4 + 0.6 * patches**2
    tint = np.array([0.85, 0.93, 1.0], np.float32)[: images.shape[-1]]
    return weights[0] * images + weights[1] * jnp.clip(ice * tint, 0, 1)


def fog(keys: jax.Array, images: Images, how: tuple[float, float]) -> Images:
    amount, decay = how
    height, width = images.shape[1:3]
    clouds = resampling.plasma(keys, max(height, width), decay)[:, :height, :width, None]
    brightest = images.max(axis=(1, 2, 3), keepdims=True)
    return (images + amount * clouds) * brightest / (brightest + amount)


def brightness(keys: jax.Array, images: Images, amount: float) -> Images:
    """Adds to the value of HSV: a pixel's channels keep their ratios."""
    value = images.max(axis=-1, keepdims=True)
    brighter = jnp.minimum(value + amount, 1)
    return jnp.where(value > 0, images * (brighter / jnp.maximum(value, 1e-6)), brighter)


def contrast(keys: jax.Array, images: Images, factor: float) -> Images:
    means = images.mean(axis=(1, 2), keepdims=True)
    return (images - means) * factor + means


def elastic_transform(keys: jax.Array, images: Images, how: tuple[float, ...]) -> Images:
    """An affine map of three points moved at random, then a smooth field; `how` is of the side."""
    height, width = images.shape[1:3]
    strength, sigma, shift = (min(height, width) * share for share in how)
    middle = np.array([width // 2, height // 2], np.float32)
    reach = min(height, width) // 3
    points = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]], np.float32)
    shifts = jax.vmap(partial(jax.random.uniform, shape=(3, 2), minval=-shift, maxval=shift))(keys)
    # The map from the moved points, (x, y, 1), back to where they were.
    moved = jnp.concatenate([points + shifts, jnp.ones((len(images), 3, 1))], axis=2)
    matrix = jnp.linalg.solve(moved, jnp.broadcast_to(points, shifts.shape))  # [B, 3, 2]
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    x, y = (
        columns * matrix[:, 0, axis, None, None]
        + rows * matrix[:, 1, axis, None, None]
        + matrix[:, 2, axis, None, None]
        for axis in (0, 1)
    )
    images = resampling.sample(images, y, x, edge=False)
    if not strength:
        return images
    noise = _draw(partial(jax.random.uniform, minval=-1.0), _more(keys), images[..., :1], 2)
    smooth = (resampling.gaussian(size, sigma, 3, "reflect") for size in (height, width))
    field = strength * resampling.along_axes(noise, *smooth)
    return resampling.sample(images, rows + field[..., 0], columns + field[..., 1], edge=True)


def pixelate(keys: jax.Array, images: Images, factor: float) -> Images:
    """Fewer pixels by Pillow's box filter, and back; each pass is rounded to 8 bits, as there."""
    height, width = images.shape[1:3]
    for rows, columns in ((int(height * factor), int(width * factor)), (height, width)):
        same = np.eye(images.shape[1])
        images = _round(
            resampling.along_axes(images, same, resampling.box(images.shape[2], columns))
        )
        same = np.eye(images.shape[2])
        images = _round(resampling.along_axes(images, resampling.box(images.shape[1], rows), same))
    return images


def jpeg_compression(images: np.ndarray, quality: int) -> np.ndarray:
    """uint8 [B, H, W, C], on the host."""
    result = np.empty_like(images)
    for index, image in enumerate(images):
        file = io.BytesIO()
        picture = image[..., 0] if image.shape[-1] == 1 else image
        Image.fromarray(picture).save(file, "JPEG", quality=quality)
        result[index] = np.asarray(Image.open(file)).reshape(image.shape)
    return result


def disk_kernel(radius: float, deviation: float) -> np.ndarray:
    """A disk of pixels, blurred over its 3 or 5 neighbours by a Gaussian; sums up to 1."""
    reach, taps = (8, 1) if radius <= 8 else (int(radius), 2)
    across = np.arange(-reach, reach + 1)
    disk = (across[:, None] ** 2 + across**2 <= radius**2).astype(np.float64)
    disk = np.pad(disk / disk.sum(), taps, mode="reflect")
    weights = np.exp(-0.5 * (np.arange(-taps, taps + 1) / deviation) ** 2)
    window = np.lib.stride_tricks.sliding_window_view(disk, (2 * taps + 1,) * 2)
    return np.einsum("ijkl,k,l->ij", window, *[weights / weights.sum()] * 2)


def _ranges(*rows: tuple[float, float]) -> tuple[np.ndarray, ...]:
    return tuple(np.arange(1, stop, step) for stop, step in rows)


_ELASTIC = 244 / 224  # the published code has 244 where its images have 224 pixels

# Of each corruption its constants at the five severities, of CIFAR-10-C and of ImageNet-C.
_CONSTANTS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500.0, 250.0, 100.0, 75.0, 50.0), (60.0, 25.0, 12.0, 5.0, 3.0)),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (
        _ranges((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        _ranges((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (
        ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": (
        ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
        ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
    ),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        tuple(
            tuple(share * _ELASTIC for share in shares)
            for shares in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
    ),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
CORRUPTIONS = tuple(_CONSTANTS)

_FUNCTIONS: dict[str, Function] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "snow": snow,
    "frost": frost,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "elastic_transform": elastic_transform,
    "pixelate": pixelate,
}
# Whose constants are not needed to compile them: one program serves all severities.
_ONE_PROGRAM = {gaussian_noise, shot_noise, impulse_noise, frost, fog, brightness, contrast}


def corrupt(name: str, severity: int, keys: jax.Array, images: Any) -> Any:
    """Images uint8 [B, H, W, C] with a corruption of CORRUPTIONS, at a severity from 1 to 5.

    `keys` [B] are what is random about each image. As in the published data, 8 bits are cut off,
    not rounded.
    """
    if not 1 <= severity <= 5:
        raise ValueError(f"severity must be from 1 to 5, got {severity}")
    constants = _CONSTANTS[name][max(images.shape[1:3]) > _SMALL][severity - 1]
    if name == "jpeg_compression":
        return jpeg_compression(np.asarray(images), constants)
    if _FUNCTIONS[name] in _ONE_PROGRAM:
        return _any_severity(name, keys, images, constants)
    return _one_severity(name, severity, keys, images)


@partial(jax.jit, static_argnums=0)
def _any_severity(name: str, keys: jax.Array, images: jax.Array, constants: Any) -> jax.Array:
    changed = _FUNCTIONS[name](keys, images.astype(jnp.float32) / 255, constants)
    return (_floor(jnp.clip(changed, 0, 1)) * 255 + 0.5).astype(jnp.uint8)


@partial(jax.jit, static_argnums=(0, 1))
def _one_severity(name: str, severity: int, keys: jax.Array, images: jax.Array) -> jax.Array:
    constants = _CONSTANTS[name][max(images.shape[1:3]) > _SMALL][severity - 1]
    return _any_severity.__wrapped__(name, keys, images, constants)


def _floor(images: Images) -> Images:
    """As 8 bits that are cut off would have it; 1e-3 keeps whole numbers what they are."""
    return jnp.floor(images * 255 + 1e-3) / 255


def _round(images: Images) -> Images:
    return jnp.floor(images * 255 + 0.5) / 255


def _grey(images: Images) -> Images:
    """The luma, [B, H, W, 1], of 3 channels, or the one that there is."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    return (images * weights).sum(axis=-1, keepdims=True) if images.shape[-1] == 3 else images


def _draw(function: Callable, keys: jax.Array, images: Images, channels: int = 0) -> jax.Array:
    """Random numbers in the shape of the images, each image's by its key."""
    shape = (*images.shape[1:3], channels or images.shape[3])
    return jax.vmap(lambda key: function(key, shape))(keys)


def _each(keys: jax.Array, minval: float, maxval: float) -> jax.Array:
    """A random number for each image, [B]."""
    return jax.vmap(lambda key: jax.random.uniform(key, (), minval=minval, maxval=maxval))(keys)


def _more(keys: jax.Array) -> jax.Array:
    """Other keys, for what else is random."""
    return jax.vmap(lambda key: jax.random.fold_in(key, 2**31))(keys)
