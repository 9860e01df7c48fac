"""Weights for images of another size or with other channels, as timm adapts them."""

import math

import jax
import numpy as np


def resample_positions(
    embedding: np.ndarray, rows: int, columns: int, prefix: int
) -> np.ndarray | None:
    """Position embeddings [1, prefix + N, D] for rows x columns patches.

    Those of N = n * n patches are resized as a picture, by antialiased bicubic interpolation; those
    of the `prefix` tokens before them, such as the class token, stay. None where N is no square.
    Equals timm's `resample_abs_pos_embed`.
    """
    count = embedding.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if not count or side * side != count:
        return None
    tokens, patches = embedding[:, :prefix], embedding[:, prefix:]
    picture = patches.reshape(1, side, side, -1)
    shape = (1, rows, columns, picture.shape[-1])
    resized = np.asarray(jax.image.resize(picture, shape, "cubic", antialias=True))
    return np.concatenate([tokens, resized.reshape(1, rows * columns, -1)], axis=1)


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A first convolution [H, W, C, D] for images of another number of channels.

    For one channel its kernels are summed over the C that they have; for others they are repeated
    and scaled by C / channels, so that equal channels give the same as before. Equals timm's
    `adapt_input_conv`.
    """
    given = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, -(-channels // given), 1))[:, :, :channels]
    return repeated * np.float32(given / channels)
