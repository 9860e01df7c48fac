"""Vision transformers: ViT, and DeiT III's with LayerScale."""

import functools
from collections.abc import Callable
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from flaxcls.config.options import BelowOne, Count, Positive, Range
from flaxcls.errors import ConfigError
from flaxcls.models.attention import attention_weights, by_heads, self_attention
from flaxcls.models.layers import (
    MLP_PARTITION_RULES,
    Mlp,
    PatchEmbedding,
    drop_path,
    drop_path_rates,
    patches,
    record,
    rematerialized,
    scale_channels,
    title,
    torch_bias_init,
    torch_kernel_init,
)

# timm's cuts the tails off at +-2, which is 100 deviations.
_normal = nn.initializers.normal(0.02)


def sincos2d(rows: int, columns: int, width: int) -> jax.Array:
    """Fixed position embeddings [rows * columns, width] (MoCo v3's, as big_vision has them).

    Sine and cosine of the column, then of the row, with width / 4 wavelengths from 2 pi to
    20,000 pi patches (Chen et al. 2021, arXiv:2104.02057).
    """
    frequencies = 1e-4 ** jnp.linspace(0, 1, width // 4)
    y, x = jnp.mgrid[:rows, :columns].reshape(2, -1, 1) * frequencies
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=-1)


class Attention(nn.Module):
    """Multi-head self-attention over [B,T,width]; the softmax is float32.

    Where the collection "attention" is asked for it has the weights, [B,heads,T,T].
    """

    heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=_normal)
        qkv = dense(3 * width, name="qkv")(x)
        if self.is_mutable_collection("attention") and not self.is_initializing():
            queries, keys, _ = by_heads(qkv, self.heads)
            self.put_variable("attention", "weights", attention_weights(queries, keys))
        return dense(width, name="proj")(self_attention(qkv, self.heads))


class LayerScale(nn.Module):
    """`scale_channels` with timm's name of the factors."""

    initial: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return scale_channels(self, "gamma", x, self.initial)


class Block(nn.Module):
    """Attention, then an MLP, each a residual branch that starts with a LayerNorm."""

    heads: int
    layer_scale: float | None
    dropout: float
    drop_path: float
    norm: Callable[..., nn.Module]
    dtype: jnp.dtype
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        attend = Attention(self.heads, self.dtype, name="attn")
        y = attend(self.norm(name="norm1")(x))
        y = nn.Dropout(self.dropout, deterministic=not self.train)(y)
        x = x + self._branch(y, "ls1")
        y = self.norm(name="norm2")(x)
        mlp = Mlp(
            4 * x.shape[-1], self.dtype, _normal, dropout=self.dropout, train=self.train, name="mlp"
        )
        return x + self._branch(mlp(y), "ls2")

    def _branch(self, y: jax.Array, name: str) -> jax.Array:
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, name=name)(y)
        return drop_path(y, self.drop_path, self.train)


class VisionTransformer(PatchEmbedding, nn.Module, kw_only=True):
    """ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): the weights of timm's networks fit.

    `pool` "token" classifies by a class token; "average" has none and takes the mean of the
    patches (Beyer et al. 2022, arXiv:2205.01580). `posemb` "learn" has an embedding for each
    position of the image size at init, and, without `no_embed_class`, for each added token; with
    "sincos2d" they are fixed, and added tokens have none. `registers` are more tokens that are not
    pooled (Darcet et al. 2023, arXiv:2309.16588). `layer_scale` is its initial value (DeiT III,
    Touvron et al. 2022, arXiv:2204.07118: 1e-4 in its code, 1e-6 in timm). `drop_path` is the last
    block's rate, or every block's with `drop_path_uniform`, as in DeiT III. `pre_logits` puts a
    tanh layer before the head, as big_vision's `rep_size`. `remat` computes blocks again in the
    backward pass: less memory, a third more time.

    Initial values are timm's; big_vision's differ, its head starts at zero.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    patch: Count = 16
    width: Count = 384
    depth: Count = 12
    heads: Count = 6
    pool: Literal["token", "average"] = "token"
    posemb: Literal["learn", "sincos2d"] = "learn"
    no_embed_class: bool = False
    registers: Annotated[int, Range(0)] = 0
    layer_scale: Positive | None = None
    dropout: BelowOne = 0.0
    drop_path: BelowOne = 0.0
    drop_path_uniform: bool = False
    pre_logits: bool = False
    remat: bool = False

    torch_names = (  # timm's
        (r"^block(\d+)", lambda match: f"blocks/{int(match[1]) - 1}"),
        (r"^patch_embed", "patch_embed/proj"),
    )

    partition_rules = (
        (r"/qkv/kernel$", PartitionSpec(None, "model")),
        (r"/qkv/bias$", PartitionSpec("model")),
        (r"/proj/kernel$", PartitionSpec("model", None)),
        *MLP_PARTITION_RULES,
    )

    @property
    def partition_units(self) -> tuple[str, int]:
        return "heads", self.heads

    @property
    def embedded_tokens(self) -> int:
        """How many tokens before the patches have a learned position embedding."""
        return 0 if self.no_embed_class else (self.pool == "token") + self.registers

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(
                f"`width` of {title(self)} must be a multiple of its {self.heads} `heads`, "
                f"got {self.width}"
            )
        if self.posemb == "sincos2d" and self.width % 4:
            raise ConfigError(
                f"`width` of {title(self)} must be a multiple of 4 for posemb='sincos2d', "
                f"got {self.width}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        norm = functools.partial(nn.LayerNorm, epsilon=1e-6, dtype=self.dtype)
        block = rematerialized(Block, self.remat)
        rows, columns = (side // self.patch for side in x.shape[1:3])
        x = self._embed(x)
        added = x.shape[1] - rows * columns
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for i, rate in enumerate(drop_path_rates(self.drop_path, self.depth)):
            x = block(
                heads=self.heads,
                layer_scale=self.layer_scale,
                dropout=self.dropout,
                drop_path=self.drop_path if self.drop_path_uniform else rate,
                norm=norm,
                dtype=self.dtype,
                train=train,
                name=f"block{i + 1}",
            )(x)
            x = record(
                self,
                f"block{i + 1}",
                x,
                lambda x: x[:, added:].reshape(x.shape[0], rows, columns, self.width),
            )
        x = norm(name="norm")(x)
        if self.pool == "token":
            x = x[:, 0].astype(jnp.float32)
        else:
            x = jnp.mean(x[:, self.registers :], axis=1, dtype=jnp.float32)
        if self.pre_logits:
            x = jnp.tanh(nn.Dense(self.width, name="pre_logits")(x))
        x = record(self, "pooled", x)
        return nn.Dense(self.num_classes, kernel_init=_normal, name="head")(x)

    def pooling_weights(self, tokens: int) -> jax.Array:
        """How much of each token of the last block is in what is pooled, [tokens]."""
        first, last = (0, 1) if self.pool == "token" else (self.registers, tokens)
        return jnp.zeros(tokens).at[first:last].set(1 / (last - first))

    def _embed(self, images: jax.Array) -> jax.Array:
        """Tokens [B, T, width]: the class token, registers, then patches row by row."""
        x = patches(images, self.patch)
        batch, rows, columns, inputs = x.shape
        x = nn.Dense(
            self.width,
            dtype=self.dtype,
            kernel_init=torch_kernel_init,
            bias_init=torch_bias_init(inputs),
            name="patch_embed",
        )(x.reshape(batch, rows * columns, inputs))
        added = {"cls_token": int(self.pool == "token"), "reg_token": self.registers}
        tokens = [
            self.param(name, nn.initializers.normal(1e-6), (1, count, self.width))
            for name, count in added.items()
            if count
        ]
        tokens = [jnp.broadcast_to(t, (batch, *t.shape[1:])).astype(x.dtype) for t in tokens]
        if self.posemb == "sincos2d":
            x = x + sincos2d(rows, columns, self.width).astype(x.dtype)
        elif self.no_embed_class:
            x = self._add_learned(x)
        x = jnp.concatenate([*tokens, x], axis=1)
        return x if self.posemb == "sincos2d" or self.no_embed_class else self._add_learned(x)

    def _add_learned(self, x: jax.Array) -> jax.Array:
        positions = self.param("pos_embed", _normal, (1, *x.shape[1:])).astype(x.dtype)
        if x.dtype.itemsize > 2:  # a product would round: float32's is TensorFloat-32 by default
            return x + positions
        return jax.lax.platform_dependent(
            x, positions, cuda=_add_by_product, rocm=_add_by_product, default=jnp.add
        )


def _add_by_product(x: jax.Array, positions: jax.Array) -> jax.Array:
    """x [B,T,width] + positions [1,T,width], which are repeated by a product with ones.

    So the gradient's sum over images is a product, too. For a sum, XLA:GPU wants the images to be
    innermost in memory, lays out all tokens so, [T,width,B], and transposes them before and after
    each layer: a fifth of what a training step reads and writes.
    """
    ones = jnp.ones((x.shape[0], 1), x.dtype)
    return x + (ones @ positions.reshape(1, -1)).reshape(x.shape)
