"""ConvNeXt: a convolutional network in the shape of a transformer."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne, Count, Positive
from flaxcls.models.layers import (
    Conv,
    Mlp,
    Widths,
    drop_path,
    pyramid,
    record,
    rematerialized,
    scale_channels,
)
from flaxcls.models.pooling import global_average

# torchvision cuts the tails off at +-2, which is 100 deviations.
_normal = nn.initializers.normal(0.02)
Factory = Callable[..., nn.Module]


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm and an MLP over the channels; the branch is scaled by channel."""

    layer_scale: float
    drop_path: float
    conv: Factory
    norm: Factory
    dtype: jnp.dtype
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = self.conv(width, (7, 7), padding=3, feature_group_count=width, name="conv")(x)
        y = Mlp(4 * width, self.dtype, _normal, name="mlp")(self.norm(name="norm")(y))
        y = scale_channels(self, "layer_scale", y, self.layer_scale)
        return x + drop_path(y, self.drop_path, self.train)


class ConvNeXt(nn.Module, kw_only=True):
    """ConvNeXt (Liu et al. 2022, arXiv:2201.03545): the weights of torchvision's networks fit.

    Stages of `depths` blocks, each half as large as the one before and twice as wide.
    `drop_path` is the last block's rate: the paper's on ImageNet are 0.1 (T), 0.4 (S), 0.5 (B).
    `layer_scale` is its initial value. `remat` computes blocks again in the backward pass: less
    memory, a third more time.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    depths: Widths = (3, 3, 9, 3)
    width: Count = 96
    layer_scale: Positive = 1e-6
    drop_path: BelowOne = 0.0
    remat: bool = False

    torch_names = (  # torchvision's: a stem or downsampling, then a stage, and so on
        (r"^stem_conv", "features/0/0"),
        (r"^stem_norm", "features/0/1"),
        (r"^downsample(\d)_norm", lambda match: f"features/{2 * int(match[1]) - 2}/0"),
        (r"^downsample(\d)_conv", lambda match: f"features/{2 * int(match[1]) - 2}/1"),
        (
            r"^stage(\d)_block(\d+)",
            lambda match: f"features/{2 * int(match[1]) - 1}/{int(match[2]) - 1}",
        ),
        (r"/conv$", "/block/0"),
        (r"/norm$", "/block/2"),
        (r"/mlp/fc1$", "/block/3"),
        (r"/mlp/fc2$", "/block/5"),
        (r"^norm$", "classifier/0"),
        (r"^head$", "classifier/2"),
    )
    torch_shapes = ((r"layer_scale$", (-1, 1, 1)),)

    @property
    def minimum_image_size(self) -> int:
        return 4 * 2 ** (len(self.depths) - 1)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        conv = functools.partial(Conv, dtype=self.dtype, kernel_init=_normal)
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)

        def begin(x: jax.Array, stage: int, width: int) -> jax.Array:
            if stage == 1:
                x = conv(width, (4, 4), 4, padding="VALID", name="stem_conv")(x)
                return norm(name="stem_norm")(x)
            x = norm(name=f"downsample{stage}_norm")(x)
            return conv(width, (2, 2), 2, padding="VALID", name=f"downsample{stage}_conv")(x)

        def block(width: int, i: int, **options) -> nn.Module:
            return rematerialized(Block, self.remat)(
                layer_scale=self.layer_scale,
                conv=conv,
                norm=norm,
                dtype=self.dtype,
                train=train,
                **options,
            )

        x = global_average(pyramid(self, x, begin, block))
        x = nn.LayerNorm(epsilon=1e-6, name="norm")(x)
        x = record(self, "pooled", x)
        return nn.Dense(self.num_classes, kernel_init=_normal, name="head")(x)
