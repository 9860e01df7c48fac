"""Attention by Pallas for TPUs, interpreted here: the numbers of XLA's, split over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from flaxcls import models
from flaxcls.models import attention, tpu_attention
from flaxcls.models.kernels import kernels_for
from flaxcls.runtime import compilation_cache, sharding, topologies


def mesh_of(devices) -> Mesh:
    return sharding.make_mesh(devices=jax.devices()[:devices])


def example(tokens, heads, size, dtype=jnp.float32, batch=2):
    """Queries, keys and values, and a gradient by the result."""
    rng = np.random.default_rng(0)
    width = heads * size
    return [
        jnp.asarray(rng.normal(0, 2, (batch, tokens, channels)), dtype)
        for channels in (3 * width, width)
    ]


def reference(qkv, gradient, heads):
    """Result and gradient by qkv, in float64."""
    batch, tokens, width = gradient.shape
    arrays = *np.split(np.float64(qkv), 3, axis=-1), np.float64(gradient)
    q, k, v, dy = (x.reshape(batch, tokens, heads, -1) for x in arrays)
    factor = q.shape[-1] ** -0.5
    scores = np.einsum("bihd,bjhd->bhij", q, k) * factor
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    by_weights = np.einsum("bihd,bjhd->bhij", dy, v)
    by_scores = weights * (by_weights - (weights * by_weights).sum(-1, keepdims=True)) * factor
    y = np.einsum("bhij,bjhd->bihd", weights, v)
    parts = (
        np.einsum("bhij,bjhd->bihd", by_scores, k),
        np.einsum("bhij,bihd->bjhd", by_scores, q),
        np.einsum("bhij,bihd->bjhd", weights, dy),
    )
    shape = batch, tokens, width
    return y.reshape(shape), np.concatenate([part.reshape(shape) for part in parts], axis=-1)


def jitted_run(mesh, heads):
    def result_and_gradient(qkv, gradient):
        y, pullback = jax.vjp(lambda x: tpu_attention.attend(mesh, x, heads), qkv)
        return y, *pullback(gradient)

    return jax.jit(result_and_gradient)


def run(qkv, gradient, heads, devices=1):
    return jitted_run(mesh_of(devices), heads)(qkv, gradient)


# A token more than a block of rows, many filled up, none; four heads of 128 lanes, two and one.
@pytest.mark.parametrize(("tokens", "heads", "size"), [(129, 4, 64), (5, 4, 32), (128, 1, 128)])
def test_result_and_gradient_are_those_of_float64(tokens, heads, size):
    qkv, gradient = example(tokens, heads, size)
    for actual, expected in zip(
        run(qkv, gradient, heads), reference(qkv, gradient, heads), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=5e-5)


def test_bfloat16_is_no_further_from_float64_than_xlas():
    qkv, gradient = example(65, 2, 64, jnp.bfloat16)
    y, pullback = jax.vjp(lambda x: attention.self_attention(x, 2), qkv)
    expected = reference(qkv, gradient, 2)

    def errors(*actual):
        return [np.abs(np.float64(x) - y).mean() for x, y in zip(actual, expected, strict=True)]

    ours, xlas = errors(*run(qkv, gradient, 2)), errors(y, *pullback(gradient))
    assert all(one < 1.05 * other for one, other in zip(ours, xlas, strict=True))


def test_devices_attend_to_their_own_images():
    qkv, gradient = example(5, 2, 64, batch=8)
    for one, four in zip(run(qkv, gradient, 2), run(qkv, gradient, 2, devices=4), strict=True):
        np.testing.assert_array_equal(one, four)


def test_lowered_for_tpus_it_is_a_kernel_of_one_image_after_the_other(monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda mesh: "tpu")
    vit = models.build("vit", num_classes=2, width=128, depth=2, heads=2, patch=4)
    images = jnp.ones((2, 8, 8, 3))
    variables = vit.init(jax.random.key(0), images, train=False)

    def loss(variables, images):
        return vit.clone(dtype=jnp.bfloat16).apply(variables, images, train=True).sum()

    gradient = jax.jit(kernels_for(mesh_of(1), jax.grad(loss)))
    text = jax.export.export(gradient, platforms=["tpu"])(variables, images).mlir_module()
    assert text.count("tpu_custom_call") == 4  # forward and backward, two blocks
    text = jax.export.export(jax.jit(jax.grad(loss)), platforms=["tpu"])(variables, images)
    assert "tpu_custom_call" not in text.mlir_module()


def test_what_fits_is_said():
    mesh = mesh_of(2)

    def can(shape, heads, dtype=jnp.bfloat16, mesh=mesh):
        return tpu_attention.can_attend(mesh, jax.ShapeDtypeStruct(shape, dtype), heads)

    assert can((8, 197, 3 * 768), 12) and can((8, 577, 3 * 1024), 16)
    assert not can((8, 197, 3 * 768), 12, jnp.float32)
    assert not can((9, 197, 3 * 768), 12)  # images for two devices
    assert not can((8, 197, 3 * 192), 3)  # one head and a half at a time
    assert not can((8, 197, 3 * 960), 12)  # heads of 80 channels
    assert not can((8, 2000, 3 * 768), 12)  # more than fast memory
    split = sharding.make_mesh(model=2, devices=jax.devices()[:2])
    assert not can((8, 197, 3 * 768), 12, mesh=split)  # heads on other devices


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "tokens", "heads"),
    [("v4:2x2x1", 512, 12), ("v5e:2x2", 896, 12), ("v5p:2x2x1", 768, 16), ("v6e:2x2", 896, 12)],
)
def test_what_fits_compiles(topology, tokens, heads, tpu_compiler):
    mesh = sharding.make_mesh(devices=topologies.devices(topology))
    split = sharding.batch_sharding(mesh)
    qkv, gradient = (
        jax.ShapeDtypeStruct((128, tokens, parts * heads * 64), jnp.bfloat16, sharding=split)
        for parts in (3, 1)
    )
    assert tpu_attention.can_attend(mesh, qkv, heads)
    with compilation_cache.unused():
        jitted_run(mesh, heads).lower(qkv, gradient).compile()
