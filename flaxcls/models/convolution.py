"""Convolution, by another algorithm than XLA's where that is faster."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from flaxcls.models import onednn

Sides = Sequence[tuple[int, int]]


def convolve(x: jax.Array, kernel: jax.Array, strides, padding, **options) -> jax.Array:
    """`lax.conv_general_dilated`, by another algorithm where that is faster.

    On CPU what XLA does by a naive loop, at 2 to 25 GFLOP/s, is written otherwise. Times of the
    gradients, batch 64, against XLA's convolution (jax 0.10.2, 2 cores without AMX, other jobs
    running):
      matrix product of patches  1x1, 96 -> 48 channels at 32 pixels 1/5, ResNet-50's 1/1 to 1/2.5;
          a kernel larger than the image: 3x3 at 2 pixels 1/18 to 1/80, 5x5 at 4 pixels 1/20
      sum of shifted images      depthwise 3x3 1/2 to 1/9, 5x5 1/1.4 to 1/7, 7x7 1/1.2 to 1/75
    A stride-1 convolution of at most 3 channels into at most 32 (the first one of a small network)
    is a product of patches as well: 3x3 of 3 -> 32 channels takes 1/1.4 to 1/2.0, 2x2 of 3 -> 24
    1/2.3 to 1/2.7. Those of many channels would take 1.1 to 2.5 times as long; they are oneDNN's,
    where that is installed and the step is for this machine (`models.onednn`), or XLA's.

    On GPU the 7x7 stem of an ImageNet ResNet in bfloat16 works on blocks of 2x2 pixels. Forward and
    kernel gradient of 256 images of 224 pixels take 1.64 instead of 3.04 ms (H200, jax 0.11.2).
    """
    convolution = functools.partial(lax.conv_general_dilated, **options)
    as_given = functools.partial(convolution, window_strides=strides, padding=padding)
    window = kernel.shape[:2]
    if {*options["lhs_dilation"], *options["rhs_dilation"]} != {1}:
        return as_given(x, kernel)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    padding = tuple(map(tuple, padding))
    algorithm = _on_cpu(x.shape, kernel.shape, strides, padding)
    if algorithm is None and options.get("feature_group_count", 1) == 1:
        y = onednn.convolve(x, kernel, strides, padding)
        if y is not None:
            return y
    if algorithm:
        cpu = functools.partial(algorithm, strides=strides, padding=padding)
        return lax.platform_dependent(x, kernel, cpu=cpu, default=as_given)
    is_stem = (*window, *strides) == (7, 7, 2, 2) and {*padding} == {(3, 3)} and x.shape[-1] <= 3
    if is_stem and x.dtype == jnp.bfloat16 and not (x.shape[1] % 2 or x.shape[2] % 2):
        blocks = functools.partial(_convolve_blocks, convolution)
        return lax.platform_dependent(x, kernel, cuda=blocks, rocm=blocks, default=as_given)
    return as_given(x, kernel)


def convolve_fixed(x: jax.Array, kernel: jax.Array, *args, **options) -> jax.Array:
    """`convolve` with a kernel that is not trained: its gradient is zero and costs nothing."""
    return convolve(x, lax.stop_gradient(kernel), *args, **options)


def _on_cpu(
    images: Sequence[int], kernel: Sequence[int], strides: Sequence[int], padding: Sides
) -> Callable[..., jax.Array] | None:
    """The algorithm for these shapes on CPU; None for XLA's."""
    _, rows, columns, channels = images
    height, width, inputs, outputs = kernel
    if inputs != channels:
        is_depthwise = inputs == 1 and outputs == channels
        is_short = height * width <= 25 or rows * columns <= 64  # else it takes long to compile
        return _convolve_by_shifts if is_depthwise and is_short else None
    overlaps = height > strides[0] or width > strides[1] or {*padding} != {(0, 0)}
    is_small_first = {*strides} == {1} and inputs <= 3 and outputs <= 32
    if not overlaps or is_small_first or height > rows or width > columns:
        return _convolve_by_matmul
    return None


def _windows(
    x: jax.Array, window: Sequence[int], strides: Sequence[int], padding: Sides
) -> list[jax.Array]:
    """The pixels that each number of a kernel meets, row by row: [B,H,W,C] of the result's size."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    (height, width), (down, across) = window, strides
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    return [
        x[:, i : i + rows : down, j : j + columns : across]
        for i in range(height)
        for j in range(width)
    ]


def _convolve_by_matmul(x: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    patches = jnp.concatenate(_windows(x, kernel.shape[:2], strides, padding), axis=-1)
    # Two dimensions, because XLA:CPU is faster at the gradient of that than of a batched product.
    y = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(*patches.shape[:-1], -1)


def _convolve_by_shifts(x: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    """A depthwise convolution; kernel [H,W,1,C]."""
    windows = _windows(x, kernel.shape[:2], strides, padding)
    factors = kernel.reshape(-1, kernel.shape[-1])
    return sum(window * factor for window, factor in zip(windows, factors, strict=True))


def _convolve_blocks(convolution: Callable[..., jax.Array], x: jax.Array, kernel: jax.Array):
    """7x7 with stride 2 and padding 3 as 4x4 with stride 1 on blocks of 2x2 pixels.

    The blocks' pixels are channels: four times as many, which fill the matrix units better. The
    first block reaches a pixel further than the window; its weights there are zero.
    """
    batch, rows, columns, channels = x.shape
    x = x.reshape(batch, rows // 2, 2, columns // 2, 2, channels).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(batch, rows // 2, columns // 2, 4 * channels)
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).reshape(4, 2, 4, 2, channels, -1)
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(4, 4, 4 * channels, -1)
    return convolution(x, kernel, window_strides=(1, 1), padding=((2, 1), (2, 1)))
