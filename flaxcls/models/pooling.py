"""Pooling of pixels: maxima and means."""

import functools
import itertools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """The maximum of each non-overlapping `window` x `window` square of [B,H,W,C].

    Equals `nn.max_pool` with VALID padding: rows and columns that fill no window are cut off, and
    the first of equal maxima has the gradient. Which that is is kept as a number: XLA:CPU may
    compute what is pooled anew for the gradient, with other roundings, which equal no maximum then.
    On CPU a training step of keras_cnn or torch_convnet takes 2/3 of the time (jax 0.10.2).
    """
    return _gathered_max_pool(x, window, window, 0)


def overlapping_max_pool(
    x: jax.Array, window: int = 3, stride: int = 2, padding: int = 1
) -> jax.Array:
    """The maximum of each `window` x `window` square, `stride` apart, of [B,H,W,C].

    Equals `nn.max_pool` with that padding on each side. On GPUs the gradient is not scattered, as
    XLA does it, by additions in an order that may change, but gathered: 1.63 instead of 2.25 ms for
    256 images of 112 pixels and 64 channels in bfloat16 (H200, jax 0.11.2).
    """
    options = {"window": window, "stride": stride, "padding": padding}
    gathered = functools.partial(_gathered_max_pool, **options)

    def scattered(x: jax.Array) -> jax.Array:
        sides = (padding, padding)
        return nn.max_pool(x, (window, window), (stride, stride), padding=(sides, sides))

    return lax.platform_dependent(x, cuda=gathered, rocm=gathered, default=scattered)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered_max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    return _max_and_position(x, window, stride, padding)[0]


def _max_and_position(
    x: jax.Array, window: int, stride: int, padding: int
) -> tuple[jax.Array, jax.Array]:
    """The maxima, and which pixel of its window each is, uint8: the first of equal ones."""
    sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(x, sides, constant_values=-jnp.inf)
    rows, columns = (-(-(size - window + 1) // stride) for size in padded.shape[1:3])
    # One after the other: the window's pixels meet in one fused loop.
    best = position = None
    for number, (i, j) in enumerate(itertools.product(range(window), repeat=2)):
        stop = i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1
        pixel = padded[:, i : stop[0] : stride, j : stop[1] : stride]
        if best is None:
            best, position = pixel, jnp.zeros(pixel.shape, jnp.uint8)
        else:
            position = jnp.where(pixel > best, jnp.uint8(number), position)
            best = jnp.maximum(best, pixel)
    return best, position


def _gathered_max_pool_forward(x: jax.Array, window: int, stride: int, padding: int):
    best, position = _max_and_position(x, window, stride, padding)
    return best, (position, jnp.zeros((0, *x.shape[1:3])))  # the second for its shape alone


def _gathered_max_pool_backward(window: int, stride: int, padding: int, saved, gradient: jax.Array):
    """Each pixel adds up the gradients of the windows, at most four, whose maximum it is."""
    position, image = saved
    zero = jnp.zeros((), gradient.dtype)
    total = None
    for number, start in enumerate(itertools.product(range(window), repeat=2)):
        own = jnp.where(position == number, gradient, zero)
        sides = [
            (i - padding, size - (i - padding) - (count - 1) * stride - 1, stride - 1)
            for i, size, count in zip(start, image.shape[1:], own.shape[1:3], strict=True)
        ]
        own = lax.pad(own, zero, [(0, 0, 0), *sides, (0, 0, 0)])
        total = own if total is None else total + own
    return (total,)


_gathered_max_pool.defvjp(_gathered_max_pool_forward, _gathered_max_pool_backward)


def average_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """The mean of each non-overlapping `window` x `window` square of [B,H,W,C]."""
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x[:, : rows * window, : columns * window]
    return x.reshape(batch, rows, window, columns, window, channels).mean(axis=(2, 4))


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """[B,H,W,C] -> [B,size,size,C], as PyTorch's AdaptiveAvgPool2d.

    The mean i of a side of H pixels spans floor(i * H / size) to ceil((i + 1) * H / size): where
    `size` does not divide H they overlap, and where it is larger pixels are repeated.
    """
    for axis in (1, 2):
        pixels = x.shape[axis]
        if pixels == size:
            continue
        spans = [(i * pixels // size, -(-(i + 1) * pixels // size)) for i in range(size)]
        parts = [lax.slice_in_dim(x, start, stop, axis=axis) for start, stop in spans]
        x = jnp.concatenate([part.mean(axis, keepdims=True) for part in parts], axis)
    return x


def global_average(x: jax.Array) -> jax.Array:
    """The mean over the pixels of [B,H,W,C], at least in float32: [B,C]."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


POOLS = {"max": max_pool, "average": average_pool}
Pool = Literal[*POOLS]  # the type of networks' option `pool`
