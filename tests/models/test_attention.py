"""Attention: what a fused kernel is given means the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls.models.attention import attention, even_attention


def example(tokens):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(0, 2, (2, tokens, 3, 8)), jnp.float32) for _ in range(4)]


def reference(q, k, v):
    weights = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("tokens", [5, 6])
def test_another_token_changes_neither_output_nor_gradients(tokens):
    *inputs, cotangent = example(tokens)
    expected, pullback = jax.vjp(attention, *inputs)
    np.testing.assert_allclose(expected, reference(*map(np.float64, inputs)), atol=1e-5)

    y, even = jax.vjp(lambda *x: even_attention(*x, implementation="xla"), *inputs)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for actual, gradient in zip(even(cotangent), pullback(cotangent), strict=True):
        np.testing.assert_allclose(actual, gradient, rtol=1e-5, atol=3e-5)
