"""A network for reaching a good accuracy in little time.

After airbench94 (Jordan 2024, arXiv:2404.00498), itself after hlb-CIFAR10.
"""

import functools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne, Positive
from flaxcls.models.layers import (
    Conv,
    FixedConv,
    Widths,
    batch_norm,
    exact_gelu,
    record,
    torch_bias_init,
    torch_kernel_init,
)
from flaxcls.models.pooling import max_pool


class Quick(nn.Module, kw_only=True):
    """A fixed whitening convolution, then blocks of conv, pool, norm, gelu, conv, norm, gelu.

    The first convolution (2x2) decorrelates the pixels: `initialize_from_data` sets its kernel
    from training images, and it is not trained (`frozen`). The other convolutions start as the
    identity on their first input channels. BatchNorm has no scale. `gelu` "tanh" is the usual
    approximation, and "exact", by the error function, PyTorch's default.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    widths: Widths = (32, 64, 128)
    batch_norm_momentum: BelowOne = 0.6
    batch_norm_epsilon: Positive = 1e-5
    gelu: Literal["tanh", "exact"] = "tanh"

    frozen = r"^whiten/kernel$"

    @property
    def minimum_image_size(self) -> int:
        return 2 ** len(self.widths) + 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        conv = functools.partial(
            Conv, kernel_size=(3, 3), use_bias=False, dtype=self.dtype, kernel_init=dirac_init
        )
        norm = functools.partial(
            batch_norm(train, self.dtype, self.batch_norm_momentum, self.batch_norm_epsilon),
            use_scale=False,
        )
        gelu = exact_gelu if self.gelu == "exact" else nn.gelu
        whitening = FixedConv(
            8 * x.shape[-1],
            (2, 2),
            padding="VALID",
            dtype=self.dtype,
            bias_init=torch_bias_init(4 * x.shape[-1]),
            name="whiten",
        )
        x = gelu(whitening(x))
        for i, width in enumerate(self.widths):
            name = f"block{i + 1}"
            x = max_pool(conv(width, name=f"{name}_conv1")(x))
            x = gelu(norm(name=f"{name}_norm1")(x))
            x = conv(width, name=f"{name}_conv2")(x)
            x = gelu(norm(name=f"{name}_norm2")(x))
            x = record(self, f"stage{i + 1}", x)
        x = x.max(axis=(1, 2))
        x = record(self, "pooled", x)
        # Unit-variance head weights and small logits: the head then trains at the pace of the rest.
        head_init = nn.initializers.variance_scaling(x.shape[-1], "fan_in", "uniform")
        head = nn.Dense(
            self.num_classes, use_bias=False, dtype=jnp.float32, kernel_init=head_init, name="head"
        )
        return head(x) / x.shape[-1]

    def initialize_from_data(self, variables: dict, images: jax.Array) -> dict:
        """The variables with the whitening kernel of `images` (see `whiten`)."""
        return whiten(variables, images)


def whiten(variables: dict, images: jax.Array, epsilon: float = 5e-4) -> dict:
    """Sets the kernel of the layer `whiten` so that its first half of outputs is white.

    `images` are normalised as for training, float32 [N,H,W,C]; some thousands are enough. The
    kernel is [V / sqrt(lambda + epsilon), -the same], with V and lambda the eigenvectors and
    eigenvalues of the second moment of 2x2 patches.
    """
    channels = images.shape[-1]
    patches = jnp.concatenate(
        [images[:, :-1, :-1], images[:, :-1, 1:], images[:, 1:, :-1], images[:, 1:, 1:]], axis=-1
    ).reshape(-1, 4 * channels)
    values, vectors = jnp.linalg.eigh(patches.T @ patches / len(patches))
    white = vectors / jnp.sqrt(values + epsilon)
    kernel = jnp.concatenate([white, -white], axis=1).reshape(2, 2, channels, 8 * channels)
    params = variables["params"]
    return {**variables, "params": {**params, "whiten": {**params["whiten"], "kernel": kernel}}}


def dirac_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Identity from input channel i to output channel i; outputs without an input are random."""
    height, width, inputs, outputs = shape
    kernel = torch_kernel_init(key, shape, dtype)
    identity = jnp.eye(inputs, min(inputs, outputs), dtype=dtype)
    dirac = jnp.zeros((height, width, *identity.shape), dtype)
    dirac = dirac.at[height // 2, width // 2].set(identity)
    return kernel.at[..., : identity.shape[1]].set(dirac)
