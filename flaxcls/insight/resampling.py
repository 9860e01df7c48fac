"""What corruptions are made of: linear maps along an axis, sampling, streaks and plasma clouds.

The maps are matrices of NumPy, [out, in], made once for a size; images are float32 [B, H, W, C].
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def along_axes(images: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """[B, H, W, C] with matrices applied to the rows and the columns."""
    rows, columns = rows.astype(np.float32), columns.astype(np.float32)
    exact = jax.lax.Precision.HIGHEST
    images = jnp.einsum("ij,bjwc->biwc", rows, images, precision=exact)
    return jnp.einsum("ij,bhjc->bhic", columns, images, precision=exact)


def gaussian(size: int, sigma: float, truncate: float, mode: str) -> np.ndarray:
    """Blurs a line as SciPy does; over the border it goes on by "nearest" or "reflect"."""
    if sigma == 0:
        return np.eye(size)
    radius = int(truncate * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    matrix = np.zeros((size, size))
    for offset, weight in zip(range(-radius, radius + 1), weights / weights.sum(), strict=True):
        place = np.arange(size) + offset
        if mode == "nearest":
            place = np.clip(place, 0, size - 1)
        else:  # the edge itself is mirrored, too
            place = place % (2 * size)
            place = np.where(place < size, place, 2 * size - 1 - place)
        np.add.at(matrix, (np.arange(size), place), weight)
    return matrix


def zoom(size: int, factor: float) -> np.ndarray:
    """Enlarges the middle of a line, linearly, as scipy.ndimage.zoom and a crop do."""
    middle = math.ceil(size / factor)
    top, enlarged = (size - middle) // 2, round(middle * factor)
    start = (enlarged - size) // 2
    place = (np.arange(size) + start) * (middle - 1) / max(enlarged - 1, 1)
    low = np.minimum(place.astype(int), max(middle - 2, 0))
    high, matrix = np.minimum(low + 1, middle - 1), np.zeros((size, size))
    np.add.at(matrix, (np.arange(size), top + low), 1 - (place - low))
    np.add.at(matrix, (np.arange(size), top + high), place - low)
    return matrix


def box(size: int, out: int) -> np.ndarray:
    """Resizes a line to `out` pixels as Pillow's box filter does."""
    scale = size / out
    support, matrix = max(scale, 1) / 2, np.zeros((out, size))
    for row in range(out):
        centre = (row + 0.5) * scale
        first = max(int(centre - support + 0.5), 0)
        last = min(int(centre + support + 0.5), size)
        distance = (np.arange(first, last) + 0.5 - centre) / max(scale, 1)
        matrix[row, first:last] = (distance > -0.5) & (distance <= 0.5)
    return matrix / matrix.sum(axis=1, keepdims=True)


def streaks(images: jax.Array, radius: int, sigma: float, degrees: jax.Array) -> jax.Array:
    """Blurs by one half of a Gaussian along a line, at an angle [B], as ImageMagick's motion blur.

    Of 2 radius + 1 whole pixels; over the border the outermost pixels go on.
    """
    count, height, width, _ = images.shape
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    angle = jnp.deg2rad(degrees)[:, None]
    down = jnp.ceil(taps * jnp.sin(angle) - 0.5).astype(jnp.int32)
    right = jnp.ceil(taps * jnp.cos(angle) - 0.5).astype(jnp.int32)
    example = jnp.arange(count)[:, None, None]
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)

    def add(tap: int, total: jax.Array) -> jax.Array:
        row = jnp.clip(rows + down[:, tap, None, None], 0, height - 1)
        column = jnp.clip(columns + right[:, tap, None, None], 0, width - 1)
        return total + jnp.float32(weights / weights.sum())[tap] * images[example, row, column]

    return jax.lax.fori_loop(0, len(taps), add, jnp.zeros_like(images))


def sample(images: jax.Array, rows: jax.Array, columns: jax.Array, edge: bool) -> jax.Array:
    """Bilinear, at places [B, H, W]; over the border mirrored, with the `edge` twice or once."""
    example = jnp.arange(len(images))[:, None, None]
    top, left = jnp.floor(rows), jnp.floor(columns)
    down, right = (rows - top)[..., None], (columns - left)[..., None]

    def at(row: jax.Array, column: jax.Array) -> jax.Array:
        row, column = (
            _mirrored(place.astype(jnp.int32), size, edge)
            for place, size in zip((row, column), images.shape[1:3], strict=True)
        )
        return images[example, row, column]

    upper = at(top, left) * (1 - right) + at(top, left + 1) * right
    lower = at(top + 1, left) * (1 - right) + at(top + 1, left + 1) * right
    return upper * (1 - down) + lower * down


def _mirrored(place: jax.Array, size: int, edge: bool) -> jax.Array:
    period = 2 * size if edge else max(2 * size - 2, 1)
    place = place % period
    return jnp.where(place < size, place, period - place - edge)


def scattered(images: jax.Array, keys: jax.Array, reach: int, times: int) -> jax.Array:
    """Each pixel, from the last to the first, becomes one beside it, up to `reach` away.

    So the published data were made: the line that was to swap two pixels copies the one.
    """
    count, height, width, channels = images.shape
    rows, columns = np.mgrid[height - reach : reach : -1, width - reach : reach : -1]
    places = jnp.asarray(np.tile((rows * width + columns).ravel(), times))
    shape = (len(places), 2)
    moves = jax.vmap(lambda key: jax.random.randint(key, shape, -reach, reach))(keys)
    sources = places + moves[..., 0] * width + moves[..., 1]
    example = jnp.arange(count)

    def copy(index: int, origin: jax.Array) -> jax.Array:
        return origin.at[:, places[index]].set(origin[example, sources[:, index]])

    origin = jnp.tile(jnp.arange(height * width), (count, 1))
    origin = jax.lax.fori_loop(0, len(places), copy, origin)
    flat = images.reshape(count, -1, channels)
    return jnp.take_along_axis(flat, origin[..., None], axis=1).reshape(images.shape)


def plasma(keys: jax.Array, size: int, decay: float) -> jax.Array:
    """Clouds in [0, 1], [B, size, size], by diamonds and squares on a torus.

    The noise shrinks by `decay` at each halving of the distance. `size` is cut from the next power
    of two.
    """
    side = 2 ** max(math.ceil(math.log2(size)), 1)
    field, step, amplitude = jnp.zeros((len(keys), side, side)), side, 100.0
    draws = jax.vmap(lambda key: jax.random.uniform(key, (side**2,), minval=-1.0))(keys)
    used = 0

    def moved(total: jax.Array) -> jax.Array:
        nonlocal used
        count = math.prod(total.shape[1:])
        noise, used = draws[:, used : used + count], used + count
        return total / 4 + amplitude**2 * noise.reshape(total.shape)

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        total = corners + jnp.roll(corners, -1, 1)
        middles = moved(total + jnp.roll(total, -1, 2))
        field = field.at[:, half::step, half::step].set(middles)
        across = middles + jnp.roll(middles, 1, 1) + corners + jnp.roll(corners, -1, 2)
        field = field.at[:, ::step, half::step].set(moved(across))
        along = middles + jnp.roll(middles, 1, 2) + corners + jnp.roll(corners, -1, 1)
        field = field.at[:, half::step, ::step].set(moved(along))
        step, amplitude = half, amplitude / decay
    field = field - field.min(axis=(1, 2), keepdims=True)
    return (field / field.max(axis=(1, 2), keepdims=True))[:, :size, :size]
