"""Attention, by a fused kernel where there is one for the device."""

import functools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from flaxcls.models.kernels import kernels_mesh


def self_attention(qkv: jax.Array, heads: int) -> jax.Array:
    """`attention` by queries, keys and values in a row, [B,T,3*heads*D] -> [B,T,heads*D].

    On TPUs, where a function of `kernels_for` is computed in bfloat16, `models.tpu_attention` does.
    """
    mesh = kernels_mesh("tpu")
    if mesh is not None:
        from flaxcls.models import tpu_attention  # Pallas takes 0.1 s to import

        if tpu_attention.can_attend(mesh, qkv, heads):
            return tpu_attention.attend(mesh, qkv, heads)
    return attention(*by_heads(qkv, heads)).reshape(*qkv.shape[:2], -1)


def by_heads(qkv: jax.Array, heads: int) -> Iterator[jax.Array]:
    """Queries, keys and values [B,T,heads,D] of [B,T,3*heads*D]."""
    return (x.reshape(*x.shape[:2], heads, -1) for x in jnp.split(qkv, 3, axis=-1))


def attention(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """softmax(q k' / sqrt(D)) v of [B,T,heads,D], for each head by itself; the softmax is float32.

    On NVIDIA GPUs in bfloat16 and float16 cuDNN computes it, which does not write the weights,
    [B,heads,T,T], to memory. With its gradient, that of 256 images and 12 heads of ViT-B/16 takes
    1.18 instead of 2.72 ms (H200, jax 0.11.2), and repeats to the last bit.
    """
    arguments = queries, keys, values
    by_cudnn = functools.partial(even_attention, implementation="cudnn")
    if not _is_possible(by_cudnn, *arguments):
        return jax.nn.dot_product_attention(*arguments)
    return jax.lax.platform_dependent(
        *arguments, cuda=by_cudnn, default=jax.nn.dot_product_attention
    )


def attention_weights(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """softmax(q k' / sqrt(D)) of [B,T,heads,D], by which `attention` weighs: float32 [B,heads,T,T].

    Element [b, h, i, j] is how much of token j goes into token i.
    """
    scores = jnp.einsum("bihd,bjhd->bhij", queries, keys, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores / queries.shape[-1] ** 0.5)


def even_attention(*arguments: jax.Array, implementation: Literal["xla", "cudnn"]) -> jax.Array:
    """`attention` of [B,T,heads,D] with one more token where T is odd.

    JAX refuses cuDNN's gradient of an odd number (0.11.2). The lengths tell what not to attend to,
    so that the result is the same.
    """
    batch, tokens = arguments[0].shape[:2]
    if tokens % 2 == 0:
        return jax.nn.dot_product_attention(*arguments, implementation=implementation)
    sides = (0, 0), (0, 1), (0, 0), (0, 0)
    lengths = jnp.full(batch, tokens, jnp.int32)
    y = jax.nn.dot_product_attention(
        *(jnp.pad(x, sides) for x in arguments),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return y[:, :tokens]


def _is_possible(function, *arguments: jax.Array) -> bool:
    """Whether JAX takes a function and its gradient: it finds out while tracing, not compiling."""

    def gradient(*arguments):
        y, pullback = jax.vjp(function, *arguments)
        return pullback(y)

    try:
        jax.eval_shape(gradient, *arguments)
    except (NotImplementedError, RuntimeError, ValueError):  # this device, its cuDNN, these types
        return False
    return True
