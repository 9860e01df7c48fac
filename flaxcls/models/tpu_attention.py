"""Self-attention on TPUs whose weights, [B,heads,T,T], are never in memory: kernels by Pallas.

XLA writes the float32 scores of all heads to memory, and reads them for each of the softmax, the
product with the values and the gradients: half of what a ViT's block moves. But an image's tokens
fit into a core's fast memory. So its queries, keys and values are read once, and its weights are
computed there, in the backward pass again. (FlashAttention, Dao et al. 2022, arXiv:2205.14135, goes
over the tokens in blocks, for rows that don't fit; here they do.)

Heads have 64 channels, vectors and the matrix unit 128 lanes. Moving a head's channels to the first
lanes would take longer than its products. So neighbouring heads are read together: in sums over
channels those of the others are zeros, in results they are overwritten. A product takes as long, as
64 channels are filled up to 128 anyway.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jax.experimental.pallas import tpu
from jax.sharding import Mesh

from flaxcls.runtime import sharding

_LANES = 128
_MEMORY = 32 * 2**20  # bytes of fast memory to ask for; v5e, v5p and v6e have at least 64 MiB
_MEMORY_OF_V4 = 16 * 2**20


def can_attend(mesh: Mesh, qkv: jax.Array, heads: int) -> bool:
    """Whether `attend` takes this [B,T,3*heads*D] on the mesh."""
    batch, tokens, channels = qkv.shape
    width = channels // 3
    rows = _filled_up(tokens)
    # Of the gradient, which needs more: qkv, the gradients by the result and by qkv, of the image
    # that is computed and of one that is copied; and some float32 arrays of a head's weights.
    blocks = 2 * qkv.dtype.itemsize * rows * (3 + 1 + 3) * width
    temporaries = 4 * 4 * rows**2
    is_old = mesh.devices.flat[0].device_kind in ("TPU v2", "TPU v3", "TPU v4")
    return (
        mesh.shape["model"] == 1
        and batch % sharding.batch_parts(mesh) == 0
        and qkv.dtype == jnp.bfloat16
        and width % _LANES == 0
        and _LANES % (width // heads) == 0
        and blocks + temporaries <= (_MEMORY_OF_V4 if is_old else _MEMORY)
    )


def attend(mesh: Mesh, qkv: jax.Array, heads: int) -> jax.Array:
    """softmax(q k' / sqrt(D)) v of each head: [B,T,3*heads*D] -> [B,T,heads*D].

    The softmax is float32, products are summed in float32. `can_attend` says what is possible on
    TPUs; on other devices it is interpreted, slowly.
    """
    return jax.shard_map(
        functools.partial(_self_attention, heads, sharding.platform(mesh) != "tpu"),
        mesh=mesh,
        in_specs=sharding.BATCH,
        out_specs=sharding.BATCH,
        check_vma=False,
    )(qkv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _self_attention(heads: int, interpret: bool, qkv: jax.Array) -> jax.Array:
    return _call(_attention, heads, interpret, qkv.shape[-1] // 3, 2, qkv)


def _forward(heads: int, interpret: bool, qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _self_attention(heads, interpret, qkv), qkv


def _backward(heads: int, interpret: bool, qkv: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (_call(_attention_gradient, heads, interpret, qkv.shape[-1], 5, qkv, gradient),)


_self_attention.defvjp(_forward, _backward)


def _call(
    kernel: Callable, heads: int, interpret: bool, width: int, products: int, *arrays: jax.Array
) -> jax.Array:
    """A kernel of [B,T,...] for one image after the other; its result is [B,T,width].

    `products` is the number of those that have B * T * T * heads * D multiplications.
    """
    qkv = arrays[0]
    batch, tokens, channels = qkv.shape
    result = jax.ShapeDtypeStruct((batch, tokens, width), qkv.dtype)

    def an_image(channels: int) -> pallas.BlockSpec:
        return pallas.BlockSpec((None, _filled_up(tokens), channels), lambda image: (image, 0, 0))

    return pallas.pallas_call(
        functools.partial(kernel, heads, tokens),
        grid=(batch,),
        in_specs=[an_image(x.shape[-1]) for x in arrays],
        out_specs=an_image(width),
        out_shape=result,
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=_MEMORY
        ),
        cost_estimate=pallas.CostEstimate(
            flops=2 * products * batch * tokens**2 * channels // 3,
            transcendentals=batch * heads * tokens**2,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, result)),
        ),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*arrays)


def _filled_up(tokens: int) -> int:
    """The rows of a block: what is after the last token is undefined, and dropped of a result.

    So it is for blocks that an array ends within ("partial blocks", docs.jax.dev/en/latest/pallas/
    grid_blockspec.html).
    """
    return -(-tokens // _LANES) * _LANES


def _attention(heads: int, tokens: int, qkv: Any, result: Any) -> None:
    """The kernel: qkv [rows,3*heads*D] -> result [rows,heads*D]."""
    width = result.shape[-1]

    def of_neighbours(lane: jax.Array, masks: list[jax.Array]) -> None:
        q, k, v = (_load(qkv, tokens, part * width + lane) for part in range(3))
        y = jnp.zeros(q.shape, jnp.float32)
        for mask in masks:
            exponentials, total = _softmax(_only(mask, q), k, tokens, width // heads)
            y = jnp.where(mask, _product(exponentials.astype(v.dtype), v, (1, 0)) / total, y)
        _store(result, lane, y)

    _each_neighbours(of_neighbours, heads, width)


def _attention_gradient(heads: int, tokens: int, qkv: Any, gradient: Any, result: Any) -> None:
    """The kernel: qkv, and the gradient [rows,heads*D] by `_attention`'s result -> by qkv."""
    width = gradient.shape[-1]

    def of_neighbours(lane: jax.Array, masks: list[jax.Array]) -> None:
        q, k, v = (_load(qkv, tokens, part * width + lane) for part in range(3))
        dy = _load(gradient, tokens, lane)
        dq = dk = dv = jnp.zeros(q.shape, jnp.float32)
        for mask in masks:
            exponentials, total = _softmax(_only(mask, q), k, tokens, width // heads)
            weights = exponentials / total
            by_weights = _product(_only(mask, dy), v, (1, 1))
            mean = jnp.sum(weights * by_weights, axis=1, keepdims=True)
            by_scores = weights * (by_weights - mean) / (width // heads) ** 0.5
            weights, by_scores = weights.astype(q.dtype), by_scores.astype(q.dtype)
            dq = jnp.where(mask, _product(by_scores, k, (1, 0)), dq)
            dk = jnp.where(mask, _product(by_scores, q, (0, 0)), dk)
            dv = jnp.where(mask, _product(weights, dy, (0, 0)), dv)
        for part, by_part in enumerate((dq, dk, dv)):
            _store(result, part * width + lane, by_part)

    _each_neighbours(of_neighbours, heads, width)


def _each_neighbours(body: Callable, heads: int, width: int) -> None:
    """Calls `body(lane, masks)` for each 128 channels, from `lane` on; a mask is of a head's."""
    size = width // heads
    lanes = jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
    masks = [(lanes >= first) & (lanes < first + size) for first in range(0, _LANES, size)]

    def step(index: jax.Array, nothing: None) -> None:
        body(pallas.multiple_of(index * _LANES, _LANES), masks)

    jax.lax.fori_loop(0, width // _LANES, step, None)


def _load(ref: Any, tokens: int, lane: jax.Array) -> jax.Array:
    """128 channels of all rows, zero in those that are no tokens."""
    x = ref[:, pallas.ds(lane, _LANES)]
    return _only(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < tokens, x)


def _store(ref: Any, lane: jax.Array, x: jax.Array) -> None:
    ref[:, pallas.ds(lane, _LANES)] = x.astype(ref.dtype)


def _only(mask: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(mask, x, jnp.zeros_like(x))


def _softmax(q: jax.Array, k: jax.Array, tokens: int, size: int) -> tuple[jax.Array, jax.Array]:
    """exp(q k' / sqrt(size)), but for a factor, and its sums over keys, which are to divide it."""
    scores = _product(q, k, (1, 1)) / size**0.5
    keys = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    scores = jnp.where(keys < tokens, scores, -jnp.inf)
    exponentials = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return exponentials, jnp.sum(exponentials, axis=1, keepdims=True)


def _product(x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Of matrices, over an axis of each, in float32."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
