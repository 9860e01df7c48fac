"""Swin: a transformer whose attention stays within windows, which shift from block to block."""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.config.options import BelowOne, Count
from flaxcls.errors import ConfigError
from flaxcls.models.layers import (
    Mlp,
    Widths,
    drop_path,
    patches,
    pyramid,
    record,
    rematerialized,
    title,
    torch_bias_init,
    torch_kernel_init,
)
from flaxcls.models.pooling import global_average

# torchvision cuts the tails off at +-2, which is 100 deviations.
_normal = nn.initializers.normal(0.02)


class WindowAttention(nn.Module):
    """Self-attention in each `window` x `window` square of [B,H,W,C], with a bias by distance.

    `shift` moves the squares down and right, around the edges; pixels that meet across an edge
    don't see each other.
    """

    heads: int
    window: int
    shift: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        size = self.window
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_normal)
        x = jnp.pad(x, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
        _, rows, columns, _ = x.shape
        shift = tuple(self.shift if side > size else 0 for side in (rows, columns))
        x = jnp.roll(x, (-shift[0], -shift[1]), (1, 2))
        windows = patches(x, size).reshape(batch, -1, size**2, channels)
        qkv = jnp.split(dense(3 * channels, name="qkv")(windows), 3, axis=-1)
        qkv = (y.reshape(-1, size**2, self.heads, channels // self.heads) for y in qkv)
        distances = ((2 * size - 1) ** 2, self.heads)
        table = self.param("relative_position_bias_table", _normal, distances)
        bias = table[_distances(size)].transpose(2, 0, 1)[None]
        if any(shift):
            meet = _same_region(rows, columns, size, shift)[:, None]
            bias = bias + jnp.where(meet, 0, -100.0)  # [windows, heads, pixels, pixels]
            bias = jnp.broadcast_to(bias, (batch, *bias.shape)).reshape(-1, *bias.shape[1:])
        y = jax.nn.dot_product_attention(*qkv, bias=bias.astype(x.dtype))
        y = dense(channels, name="proj")(y.reshape(batch, -1, size**2, channels))
        y = y.reshape(batch, rows // size, columns // size, size, size, channels)
        y = jnp.roll(y.swapaxes(2, 3).reshape(x.shape), shift, (1, 2))
        return y[:, :height, :width]


def _distances(size: int) -> np.ndarray:
    """The row of the bias table for each pair of pixels of a window, [size**2, size**2]."""
    pixels = np.indices((size, size)).reshape(2, -1)
    down, right = pixels[:, :, None] - pixels[:, None, :] + size - 1
    return down * (2 * size - 1) + right


def _same_region(rows: int, columns: int, size: int, shift: tuple[int, int]) -> np.ndarray:
    """Whether two pixels of a shifted window were not apart, [windows, size**2, size**2]."""
    down, right = (
        (np.arange(side) >= side - moved) if moved else np.zeros(side, bool)
        for side, moved in zip((rows, columns), shift, strict=True)
    )
    region = 2 * down[:, None] + right
    region = region.reshape(rows // size, size, columns // size, size).swapaxes(1, 2)
    region = region.reshape(-1, size**2)
    return region[:, :, None] == region[:, None, :]


class Block(nn.Module):
    """Attention within windows, then an MLP, each a residual branch."""

    heads: int
    window: int
    shift: int
    drop_path: float
    norm: Callable[..., nn.Module]
    dtype: jnp.dtype
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attention = WindowAttention(self.heads, self.window, self.shift, self.dtype, name="attn")
        x = x + drop_path(attention(self.norm(name="norm1")(x)), self.drop_path, self.train)
        mlp = Mlp(4 * x.shape[-1], self.dtype, _normal, name="mlp")
        return x + drop_path(mlp(self.norm(name="norm2")(x)), self.drop_path, self.train)


class Swin(nn.Module, kw_only=True):
    """Swin (Liu et al. 2021, arXiv:2103.14030): the weights of torchvision's networks fit.

    Stages of `depths` blocks, each half as large as the one before and twice as wide. `drop_path`
    is the last block's rate: the paper's on ImageNet is 0.2 (T). `remat` computes blocks again in
    the backward pass: less memory, a third more time.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    depths: Widths = (2, 2, 6, 2)
    width: Count = 96
    head_width: Count = 32
    window: Count = 7
    drop_path: BelowOne = 0.0
    remat: bool = False

    minimum_image_size = 4
    torch_names = (  # torchvision's: a stem or merging, then a stage, and so on
        (r"^stem_conv", "features/0/0"),
        (r"^stem_norm", "features/0/2"),
        (r"^merge(\d)_", lambda match: f"features/{2 * int(match[1]) - 2}/"),
        (
            r"^stage(\d)_block(\d+)",
            lambda match: f"features/{2 * int(match[1]) - 1}/{int(match[2]) - 1}",
        ),
        (r"/mlp/fc1$", "/mlp/0"),
        (r"/mlp/fc2$", "/mlp/3"),
    )

    def __post_init__(self):
        if self.width % self.head_width:
            raise ConfigError(
                f"`width` of {title(self)} must be a multiple of its `head_width`, "
                f"{self.head_width}, got {self.width}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype)

        def begin(x: jax.Array, stage: int, width: int) -> jax.Array:
            if stage == 1:
                conv = nn.Conv(
                    width,
                    (4, 4),
                    4,
                    padding="VALID",
                    dtype=self.dtype,
                    kernel_init=torch_kernel_init,
                    bias_init=torch_bias_init(16 * x.shape[-1]),
                    name="stem_conv",
                )
                return norm(name="stem_norm")(conv(x))
            dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_normal)
            x = norm(name=f"merge{stage}_norm")(_merge(x))
            return dense(width, use_bias=False, name=f"merge{stage}_reduction")(x)

        def block(width: int, i: int, **options) -> nn.Module:
            return rematerialized(Block, self.remat)(
                heads=width // self.head_width,
                window=self.window,
                shift=self.window // 2 if i % 2 else 0,
                norm=norm,
                dtype=self.dtype,
                train=train,
                **options,
            )

        x = global_average(pyramid(self, x, begin, block, end=norm(name="norm")))
        x = record(self, "pooled", x)
        return nn.Dense(self.num_classes, kernel_init=_normal, name="head")(x)


def _merge(x: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B,H/2,W/2,4C], rounded up: each 2x2 pixels, column by column."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    return jnp.concatenate([x[:, i::2, j::2] for j, i in itertools.product(range(2), repeat=2)], -1)
