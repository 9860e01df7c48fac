"""AlexNet and VGG: convolutions, then fully connected layers; of ImageNet and of CIFAR."""

import functools
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne, Count
from flaxcls.models.layers import (
    Conv,
    batch_norm,
    flatten,
    he_normal_fan_out,
    record,
    torch_bias_init,
    torch_kernel_init,
)
from flaxcls.models.pooling import (
    adaptive_average_pool,
    global_average,
    max_pool,
    overlapping_max_pool,
)


class AlexNet(nn.Module, kw_only=True):
    """AlexNet of one tower (Krizhevsky 2014, arXiv:1404.5997): torchvision's weights fit.

    `hidden` is the width of the two fully connected layers, each after a `dropout`.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    hidden: Count = 4096
    dropout: BelowOne = 0.5

    minimum_image_size = 63
    torch_names = (  # torchvision's
        ("^conv1", "features/0"),
        ("^conv2", "features/3"),
        ("^conv3", "features/6"),
        ("^conv4", "features/8"),
        ("^conv5", "features/10"),
        ("^hidden1", "classifier/1"),
        ("^hidden2", "classifier/4"),
        ("^head", "classifier/6"),
    )

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        pool = functools.partial(overlapping_max_pool, padding=0)
        x = pool(_alexnet_convolutions(self, x, pool, padding=2))
        x = _flatten_channels_first(adaptive_average_pool(x, 6))
        for name in ("hidden1", "hidden2"):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.relu(_torch_dense(x, self.hidden, self.dtype, name))
        x = record(self, "pooled", x)
        return _torch_dense(x, self.num_classes, jnp.float32, "head")


class CifarAlexNet(nn.Module, kw_only=True):
    """AlexNet for images of 32 pixels, as in bearpaw's pytorch-classification: 77.2 % on CIFAR-10.

    https://github.com/bearpaw/pytorch-classification: its pools don't overlap, and the logits
    follow the last of them, whose single pixel is here a global average: 2,472,266 parameters.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32

    minimum_image_size = 29
    torch_names = (  # bearpaw's
        ("^conv1", "features/0"),
        ("^conv2", "features/3"),
        ("^conv3", "features/6"),
        ("^conv4", "features/8"),
        ("^conv5", "features/10"),
        ("^head", "classifier"),
    )

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        x = global_average(max_pool(_alexnet_convolutions(self, x, max_pool, padding=5)))
        x = record(self, "pooled", x)
        return _torch_dense(x, self.num_classes, jnp.float32, "head")


def _alexnet_convolutions(
    network: nn.Module, x: jax.Array, pool: Callable[..., jax.Array], padding: int
) -> jax.Array:
    """The five convolutions, each with ReLU; `padding` is that of the first, 11x11."""

    def conv(x: jax.Array, width: int, window: int, name: str, **options) -> jax.Array:
        init = {
            "kernel_init": torch_kernel_init,
            "bias_init": torch_bias_init(window * window * x.shape[-1]),
        }
        options = {"padding": window // 2, "dtype": network.dtype, **init, **options}
        return nn.relu(Conv(width, (window, window), name=name, **options)(x))

    x = conv(x, 64, 11, "conv1", strides=4, padding=padding)
    x = record(network, "stage1", x)
    x = conv(pool(x), 192, 5, "conv2")
    x = record(network, "stage2", x)
    x = conv(pool(x), 384, 3, "conv3")
    x = conv(conv(x, 256, 3, "conv4"), 256, 3, "conv5")
    x = record(network, "stage3", x)
    return x


def _torch_dense(x: jax.Array, width: int, dtype: jnp.dtype, name: str) -> jax.Array:
    init = {"kernel_init": torch_kernel_init, "bias_init": torch_bias_init(x.shape[-1])}
    return nn.Dense(width, dtype=dtype, name=name, **init)(x)


def _flatten_channels_first(x: jax.Array) -> jax.Array:
    """[B,H,W,C] -> [B,C*H*W]: in PyTorch's order, so that weights of the next layer carry over."""
    return flatten(x.transpose(0, 3, 1, 2))


class VGG(nn.Module, kw_only=True):
    """VGG (Simonyan & Zisserman 2014, arXiv:1409.1556): torchvision's weights fit.

    Stages of 3x3 convolutions, each ended by a max-pool, an average pool to `pool_size` pixels,
    and two fully connected layers of `hidden` width, each followed by a `dropout`. The networks
    for CIFAR are those of https://github.com/chenyaofo/pytorch-cifar-models: one pixel, 512 wide.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    stage_sizes: tuple[int, ...]
    norm: bool = False
    pool_size: Count = 7
    hidden: Count = 4096
    dropout: BelowOne = 0.5

    minimum_image_size = 32

    @property
    def torch_names(self):
        """torchvision's, which number convolutions, norms, ReLUs and pools in one row."""

        def number(match: re.Match) -> str:
            stage, convolution = int(match[1]), int(match[3])
            before = sum(self.stage_sizes[: stage - 1]) + convolution - 1
            pools, is_norm = stage - 1, match[2] == "norm"
            return f"features/{before * (3 if self.norm else 2) + pools + is_norm}"

        return (
            (r"^stage(\d+)_(conv|norm)(\d+)", number),
            ("^hidden1", "classifier/0"),
            ("^hidden2", "classifier/3"),
            ("^head", "classifier/6"),
        )

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        conv = functools.partial(Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype)
        norm = batch_norm(train, self.dtype)
        for stage, size in enumerate(self.stage_sizes, start=1):
            width = min(64 * 2 ** (stage - 1), 512)
            for i in range(1, size + 1):
                x = conv(width, kernel_init=he_normal_fan_out, name=f"stage{stage}_conv{i}")(x)
                x = nn.relu(norm(name=f"stage{stage}_norm{i}")(x) if self.norm else x)
            x = record(self, f"stage{stage}", x)
            x = max_pool(x)
        x = _flatten_channels_first(adaptive_average_pool(x, self.pool_size))
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))
        for name in ("hidden1", "hidden2"):
            x = nn.relu(dense(self.hidden, dtype=self.dtype, name=name)(x))
            x = record(self, "pooled", x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(self.num_classes, dtype=jnp.float32, name="head")(x)
