"""Attention: what a fused kernel is given means the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls.models.attention import TOKENS, attention, padded_attention


def example(tokens, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(0, 2, (2, tokens, 3, 8)), dtype) for _ in range(4)]


def reference(q, k, v):
    weights = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("tokens", [5, TOKENS, TOKENS + 1])
def test_filled_up_tokens_change_neither_output_nor_gradients(tokens):
    *inputs, cotangent = example(tokens)
    expected, pullback = jax.vjp(attention, *inputs)
    np.testing.assert_allclose(expected, reference(*map(np.float64, inputs)), atol=1e-5)

    y, padded = jax.vjp(lambda *x: padded_attention(*x, implementation="xla"), *inputs)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for actual, gradient in zip(padded(cotangent), pullback(cotangent), strict=True):
        np.testing.assert_allclose(actual, gradient, rtol=1e-5, atol=3e-5)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="of machines without a GPU")
def test_where_there_is_no_fused_kernel_it_changes_nothing():
    *inputs, _ = example(5, jnp.bfloat16)
    np.testing.assert_array_equal(attention(*inputs, fused=True), attention(*inputs))
