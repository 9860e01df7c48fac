"""Residual networks: ImageNet's (v1.5, ResNeXt, D), CIFAR's of the first paper, Wide ResNets."""

import functools
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne, Count
from flaxcls.errors import ConfigError
from flaxcls.models.layers import (
    Conv,
    batch_norm,
    drop_path,
    drop_path_rates,
    he_normal_fan_out,
    record,
    rematerialized,
    require_depth,
    title,
    torch_kernel_init,
)
from flaxcls.models.pooling import average_pool, global_average, overlapping_max_pool

Factory = Callable[..., nn.Module]


def _conv(dtype: jnp.dtype) -> Factory:
    """Convolutions without bias. Callers say the padding, as in PyTorch: SAME would put the odd
    pixel of a stride-2 window on the other side, and weights couldn't be exchanged."""
    return functools.partial(Conv, use_bias=False, dtype=dtype, kernel_init=he_normal_fan_out)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (He et al. 2015, arXiv:1512.03385)."""

    width: int
    strides: int
    conv: Factory
    norm: Factory
    zero_init_residual: bool
    pooled_shortcut: bool
    drop: Callable[[jax.Array], jax.Array]

    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.conv(self.width, (3, 3), self.strides, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.width, (3, 3), padding=1, name="conv2")(y)
        y = self.norm(name="norm2", scale_init=_last_scale(self.zero_init_residual))(y)
        return nn.relu(self.drop(y) + _shortcut(self, x, self.width))


class BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 with 4 x `width` channels out; the 3x3 has the stride ("v1.5")."""

    width: int
    strides: int
    conv: Factory
    norm: Factory
    zero_init_residual: bool
    pooled_shortcut: bool
    drop: Callable[[jax.Array], jax.Array]

    expansion = 4
    widening = 1  # channels of the 3x3 against `width`
    groups = 1  # of these channels

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner, features = self.width * self.widening, self.width * self.expansion
        grouped = functools.partial(self.conv, feature_group_count=self.groups)
        y = self.conv(inner, (1, 1), name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = grouped(inner, (3, 3), self.strides, padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(features, (1, 1), name="conv3")(y)
        y = self.norm(name="norm3", scale_init=_last_scale(self.zero_init_residual))(y)
        return nn.relu(self.drop(y) + _shortcut(self, x, features))


class WideBottleneckBlock(BottleneckBlock):
    """A bottleneck twice as wide (Zagoruyko & Komodakis 2016, arXiv:1605.07146)."""

    widening = 2


class ResNeXtBlock(BottleneckBlock):
    """A bottleneck twice as wide, of 32 groups (Xie et al. 2016, arXiv:1611.05431)."""

    widening = 2
    groups = 32


def _last_scale(zero: bool) -> Callable[..., jax.Array]:
    return nn.initializers.zeros if zero else nn.initializers.ones


def _shortcut(block: nn.Module, x: jax.Array, features: int) -> jax.Array:
    """The identity, or a projection where the shape changes."""
    if block.strides == 1 and x.shape[-1] == features:
        return x
    if block.pooled_shortcut:
        if block.strides == 2:
            x = average_pool(_even(x))
        x = block.conv(features, (1, 1), name="pooled_shortcut_conv")(x)
        return block.norm(name="pooled_shortcut_norm")(x)
    x = block.conv(features, (1, 1), block.strides, padding=0, name="shortcut_conv")(x)
    return block.norm(name="shortcut_norm")(x)


def _even(x: jax.Array) -> jax.Array:
    """[B,H,W,C] of even H and W: an odd last row or column is there twice, so averaged alone."""
    for axis in (1, 2):
        if x.shape[axis] % 2:  # `jnp.pad` can't, where a network is exported for any batch size
            last = jax.lax.slice_in_dim(x, x.shape[axis] - 1, x.shape[axis], axis=axis)
            x = jnp.concatenate([x, last], axis)
    return x


class ResNet(nn.Module, kw_only=True):
    """ResNet v1.5: the weights of torchvision's networks of the same names fit, timm's of ResNet-D.

    `stem` "imagenet" is 7x7 with stride 2, then a 3x3 max-pool with stride 2; "deep" has three 3x3
    for the 7x7; "cifar", for images of about 32 pixels, is 3x3 with stride 1. `pooled_shortcut`
    averages 2x2 pixels in a shortcut with stride, where else three of four are lost: this and the
    deep stem are ResNet-D (He et al. 2018, arXiv:1812.01187). `zero_init_residual`, timm's default,
    starts each block as the identity (Goyal et al. 2017, arXiv:1706.02677). `width` is that of the
    first stage, `drop_path` the last block's rate. The head's bias starts at zero; torchvision's
    and timm's is uniform. `remat` computes blocks again in the backward pass: less memory, a third
    more time.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    stage_sizes: tuple[int, ...]
    block: type[nn.Module]
    stem: Literal["imagenet", "deep", "cifar"] = "imagenet"
    width: Count = 64
    zero_init_residual: bool = False
    pooled_shortcut: bool = False
    drop_path: BelowOne = 0.0
    remat: bool = False

    torch_names = (  # torchvision's; timm's of the deep stem and the pooled shortcut
        (r"^stem_conv(\d)", lambda match: f"conv1/{3 * int(match[1]) - 3}"),
        (r"^stem_norm(\d)", lambda match: f"conv1/{3 * int(match[1]) - 2}"),
        (r"stage(\d+)_block(\d+)", lambda match: f"layer{match[1]}/{int(match[2]) - 1}"),
        (r"pooled_shortcut_conv", "downsample/1"),
        (r"pooled_shortcut_norm", "downsample/2"),
        (r"shortcut_conv", "downsample/0"),
        (r"shortcut_norm", "downsample/1"),
        (r"norm(\d)", r"bn\1"),
        (r"^head", "fc"),
    )

    def __post_init__(self):
        if self.block is ResNeXtBlock and self.width % 16:
            raise ConfigError(
                f"`width` of {title(self)} must be a multiple of 16, got {self.width}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        conv = _conv(self.dtype)
        norm = batch_norm(train, self.dtype)
        if self.stem == "imagenet":
            x = conv(self.width, (7, 7), 2, padding=3, name="conv1")(x)
        elif self.stem == "deep":
            half = functools.partial(conv, (self.width + 1) // 2, (3, 3), padding=1)
            x = nn.relu(norm(name="stem_norm1")(half(strides=2, name="stem_conv1")(x)))
            x = nn.relu(norm(name="stem_norm2")(half(name="stem_conv2")(x)))
            x = conv(self.width, (3, 3), padding=1, name="stem_conv3")(x)
        else:
            x = conv(self.width, (3, 3), padding=1, name="conv1")(x)
        x = nn.relu(norm(name="norm1")(x))
        if self.stem != "cifar":
            x = overlapping_max_pool(x)
        block = rematerialized(self.block, self.remat)
        rates = iter(drop_path_rates(self.drop_path, sum(self.stage_sizes)))
        for stage, size in enumerate(self.stage_sizes):
            for i in range(size):
                x = block(
                    width=self.width * 2**stage,
                    strides=2 if stage > 0 and i == 0 else 1,
                    conv=conv,
                    norm=norm,
                    zero_init_residual=self.zero_init_residual,
                    pooled_shortcut=self.pooled_shortcut,
                    drop=functools.partial(drop_path, rate=next(rates), train=train),
                    name=f"stage{stage + 1}_block{i + 1}",
                )(x)
            x = record(self, f"stage{stage + 1}", x)
        return _head(self, x)


def _head(network: nn.Module, x: jax.Array) -> jax.Array:
    """Global average and logits, in float32."""
    x = global_average(x)
    x = record(network, "pooled", x)
    return nn.Dense(network.num_classes, kernel_init=torch_kernel_init, name="head")(x)


class CifarResNet(nn.Module, kw_only=True):
    """The CIFAR ResNets of He et al. 2015 (arXiv:1512.03385, 4.2): depth 6n + 2, 16-32-64 wide.

    Shortcuts have no parameters ("option A"): every other pixel, new channels zero.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    depth: int

    def __post_init__(self):
        require_depth(self, 2)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        conv = functools.partial(_conv(self.dtype), kernel_size=(3, 3), padding=1)
        norm = batch_norm(train, self.dtype)
        x = nn.relu(norm(name="norm1")(conv(16, name="conv1")(x)))
        for stage, width in enumerate((16, 32, 64)):
            for i in range((self.depth - 2) // 6):
                strides = 2 if stage > 0 and i == 0 else 1
                name = f"stage{stage + 1}_block{i + 1}"
                y = conv(width, strides=strides, name=f"{name}_conv1")(x)
                y = nn.relu(norm(name=f"{name}_norm1")(y))
                y = norm(name=f"{name}_norm2")(conv(width, name=f"{name}_conv2")(y))
                x = nn.relu(y + _subsample(x, width, strides))
            x = record(self, f"stage{stage + 1}", x)
        return _head(self, x)


def _subsample(x: jax.Array, features: int, strides: int) -> jax.Array:
    """Every `strides`-th pixel, with zero channels on both sides up to `features`."""
    before = (features - x.shape[-1]) // 2
    after = features - x.shape[-1] - before
    return jnp.pad(x[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (before, after)))


class WideResNet(nn.Module, kw_only=True):
    """Wide ResNet (Zagoruyko & Komodakis 2016, arXiv:1605.07146): depth 6n + 4, pre-activation.

    `remat` computes blocks again in the backward pass: less memory, a third more time.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    depth: int = 28
    width: Count = 10
    dropout: BelowOne = 0.0
    remat: bool = False

    def __post_init__(self):
        require_depth(self, 4)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        conv = _conv(self.dtype)
        norm = batch_norm(train, self.dtype)
        dropout = functools.partial(nn.Dropout, self.dropout, deterministic=not train)
        block = rematerialized(WideBlock, self.remat)
        x = conv(16, (3, 3), padding=1, name="conv1")(x)
        for stage in range(3):
            for i in range((self.depth - 4) // 6):
                x = block(
                    width=16 * self.width * 2**stage,
                    strides=2 if stage > 0 and i == 0 else 1,
                    conv=conv,
                    norm=norm,
                    dropout=dropout,
                    name=f"stage{stage + 1}_block{i + 1}",
                )(x)
            if stage == 2:
                x = nn.relu(norm(name="norm1")(x))  # what is pooled
            x = record(self, f"stage{stage + 1}", x)
        return _head(self, x)


class WideBlock(nn.Module):
    """norm-relu-3x3-norm-relu-dropout-3x3; a projection sees the first activation."""

    width: int
    strides: int
    conv: Factory
    norm: Factory
    dropout: Factory

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm(name="norm1")(x))
        if self.strides != 1 or x.shape[-1] != self.width:
            x = self.conv(self.width, (1, 1), self.strides, padding=0, name="shortcut_conv")(y)
        y = self.conv(self.width, (3, 3), self.strides, padding=1, name="conv1")(y)
        y = self.dropout()(nn.relu(self.norm(name="norm2")(y)))
        return x + self.conv(self.width, (3, 3), padding=1, name="conv2")(y)
