"""Densely connected networks (Huang et al. 2016, arXiv:1608.06993), of ImageNet and of CIFAR."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne, Count
from flaxcls.models.layers import (
    Conv,
    batch_norm,
    record,
    require_depth,
    torch_kernel_init,
)
from flaxcls.models.pooling import average_pool, global_average, overlapping_max_pool

# torchvision's, for both; old checkpoints have norm.1 for norm1, and so on.
_TORCH_NAMES = (
    (r"^block(\d+)_layer(\d+)_(\w+)", r"features/denseblock\1/denselayer\2/\3"),
    (r"^transition(\d+)_(\w+)", r"features/transition\1/\2"),
    (r"^(conv0|norm0|norm5)", r"features/\1"),
    ("^head", "classifier"),
)


class DenseNet(nn.Module, kw_only=True):
    """DenseNet (Huang et al. 2016, arXiv:1608.06993): torchvision's weights fit.

    A layer adds `growth` channels to all those before it in its block; `dropout` acts on them.
    `remat` keeps these for the backward pass and not what each layer makes of all before it, whose
    size is quadratic in the depth of a block (Pleiss et al. 2017, arXiv:1707.06990).
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    block_sizes: tuple[int, ...]
    growth: Count = 32
    stem_width: Count = 64
    dropout: BelowOne = 0.0
    remat: bool = False

    minimum_image_size = 29
    torch_names = _TORCH_NAMES

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        conv, norm = _conv(self.dtype), batch_norm(train, self.dtype)
        x = conv(self.stem_width, (7, 7), 2, padding=3, name="conv0")(x)
        x = overlapping_max_pool(nn.relu(norm(name="norm0")(x)))
        return _blocks_and_head(self, x, self.block_sizes, train)


class DenseNetBC(nn.Module, kw_only=True):
    """DenseNet-BC of CIFAR (Huang et al. 2016, arXiv:1608.06993): 3 blocks, depth 6n + 4.

    The paper's have depth 100, growth 12 (4.5 % error on CIFAR-10), 250, 24 and 190, 40. Its code
    drops out after every convolution but the first; here `dropout` acts after a layer's 3x3.
    `remat` is DenseNet's.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    depth: int = 100
    growth: Count = 12
    dropout: BelowOne = 0.0
    remat: bool = False

    minimum_image_size = 4
    torch_names = _TORCH_NAMES

    def __post_init__(self):
        require_depth(self, 4)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        x = _conv(self.dtype)(2 * self.growth, (3, 3), padding=1, name="conv0")(x)
        return _blocks_and_head(self, x, ((self.depth - 4) // 6,) * 3, train)


def _conv(dtype: jnp.dtype):
    init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")  # torchvision's
    return functools.partial(Conv, use_bias=False, dtype=dtype, kernel_init=init)


def _blocks_and_head(
    network: nn.Module, x: jax.Array, block_sizes: Sequence[int], train: bool
) -> jax.Array:
    """Dense blocks, with transitions that halve pixels and channels between them, then logits."""
    conv, norm = _conv(network.dtype), batch_norm(train, network.dtype)
    dropout = functools.partial(nn.Dropout, network.dropout, deterministic=not train)

    def bottleneck(network: nn.Module, parts: Sequence[jax.Array], name: str) -> jax.Array:
        y = nn.relu(norm(name=f"{name}_norm1")(_concatenate(parts)))
        return conv(4 * network.growth, (1, 1), name=f"{name}_conv1")(y)

    if network.remat:
        bottleneck = nn.remat(bottleneck, static_argnums=2)
    for block, size in enumerate(block_sizes, start=1):
        parts = [x]
        for layer in range(1, size + 1):
            name = f"block{block}_layer{layer}"
            y = bottleneck(network, parts, name)
            y = nn.relu(norm(name=f"{name}_norm2")(y))
            y = conv(network.growth, (3, 3), padding=1, name=f"{name}_conv2")(y)
            parts = [*parts, dropout()(y)]
            if not network.remat:  # what all later layers share; with remat none keeps it
                parts = [_concatenate(parts)]
        x = _concatenate(parts)
        if block < len(block_sizes):
            x = record(network, f"stage{block}", x)
            y = nn.relu(norm(name=f"transition{block}_norm")(x))
            y = conv(x.shape[-1] // 2, (1, 1), name=f"transition{block}_conv")(y)
            x = average_pool(y)
    x = nn.relu(norm(name="norm5")(x))
    x = record(network, f"stage{len(block_sizes)}", x)
    x = global_average(x)
    x = record(network, "pooled", x)
    return nn.Dense(network.num_classes, kernel_init=torch_kernel_init, name="head")(x)


def _concatenate(parts: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts, axis=-1)
