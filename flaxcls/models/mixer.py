"""MLP-Mixer: multilayer perceptrons over patches, then over channels."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne, Count
from flaxcls.models.layers import (
    MLP_PARTITION_RULES,
    Mlp,
    PatchEmbedding,
    drop_path,
    drop_path_rates,
    patches,
    record,
    rematerialized,
)


class Block(nn.Module):
    """A residual MLP across the patches, then one across the channels of each."""

    dropout: float
    drop_path: float
    dtype: jnp.dtype
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        mlp = functools.partial(
            Mlp,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(1e-6),
            dropout=self.dropout,
            train=self.train,
        )
        y = norm(name="norm1")(x).swapaxes(1, 2)
        y = mlp(width // 2, name="mlp_tokens")(y).swapaxes(1, 2)
        x = x + drop_path(y, self.drop_path, self.train)
        y = mlp(width * 4, name="mlp_channels")(norm(name="norm2")(x))
        return x + drop_path(y, self.drop_path, self.train)


class Mixer(PatchEmbedding, nn.Module, kw_only=True):
    """MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601): the weights of timm's networks fit.

    It has a weight for each position, so that it takes images of the size at init only.
    `drop_path` is the last block's rate and rises linearly, as in the paper; timm's is the same in
    all blocks. Initial values are timm's: the head starts at zero.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    patch: Count = 16
    width: Count = 768
    depth: Count = 12
    dropout: BelowOne = 0.0
    drop_path: BelowOne = 0.0
    remat: bool = False

    torch_names = (  # timm's
        (r"^block(\d+)", lambda match: f"blocks/{int(match[1]) - 1}"),
        (r"^patch_embed", "stem/proj"),
    )

    partition_rules = MLP_PARTITION_RULES

    @property
    def partition_units(self) -> tuple[str, int]:
        return "hidden channels over the patches", self.width // 2

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        block = rematerialized(Block, self.remat)
        x = nn.Dense(self.width, dtype=self.dtype, name="patch_embed")(patches(x, self.patch))
        map_shape = x.shape
        x = x.reshape(x.shape[0], -1, self.width)
        for i, rate in enumerate(drop_path_rates(self.drop_path, self.depth)):
            x = block(self.dropout, rate, self.dtype, train, name=f"block{i + 1}")(x)
            x = record(self, f"block{i + 1}", x, lambda x: x.reshape(map_shape))
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        x = jnp.mean(x, axis=1, dtype=jnp.float32)
        x = record(self, "pooled", x)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(x)
