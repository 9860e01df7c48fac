"""Layers against Flax's own, and initialisers against their definitions."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from flaxcls.models import layers, pooling
from flaxcls.models.convolution import _convolve_blocks


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (2, 7, 5, 3)])
@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize(
    ("pool", "reference"), [(pooling.max_pool, nn.max_pool), (pooling.average_pool, nn.avg_pool)]
)
def test_pooling_and_its_gradient_equal_flax(pool, reference, window, shape):
    x = normal(0, *shape)
    expected, expected_pullback = jax.vjp(
        lambda x: reference(x, (window, window), (window, window)), x
    )
    actual, pullback = jax.vjp(lambda x: pool(x, window), x)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    cotangent = normal(1, *expected.shape)
    np.testing.assert_allclose(pullback(cotangent)[0], expected_pullback(cotangent)[0], rtol=1e-6)


def test_the_first_of_equal_maxima_has_the_gradient_of_max_pool():
    x = jnp.array([[1.0, 3.0], [3.0, 0.0]])[None, :, :, None]
    gradient = jax.grad(lambda x: pooling.max_pool(x).sum())(x)
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[0.0, 1.0], [0.0, 0.0]])


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 7, 9, 2), (1, 5, 4, 1)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("pool", [pooling.overlapping_max_pool, pooling._gathered_max_pool])
def test_overlapping_max_pool_and_its_gradient_equal_flax(pool, padding, shape):
    x = jnp.round(2 * normal(0, *shape))  # with equal maxima, of which the first has the gradient

    def reference(x):
        return nn.max_pool(x, (3, 3), (2, 2), padding=((padding, padding),) * 2)

    expected, expected_pullback = jax.vjp(reference, x)
    actual, pullback = jax.vjp(lambda x: pool(x, 3, 2, padding), x)
    np.testing.assert_array_equal(actual, expected)
    cotangent = normal(1, *expected.shape)
    np.testing.assert_allclose(pullback(cotangent)[0], expected_pullback(cotangent)[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("pixels", "size", "means"),
    [
        (4, 2, [0.5, 2.5]),
        (5, 3, [0.5, 2.0, 3.5]),  # of pixels 0-1, 1-3 and 3-4
        (2, 4, [0.0, 0.0, 1.0, 1.0]),
        (3, 3, [0.0, 1.0, 2.0]),
    ],
)
def test_adaptive_average_pool_takes_the_spans_of_pytorch(pixels, size, means):
    ramp = jnp.arange(pixels, dtype=jnp.float32)
    x = (10 * ramp[:, None] + ramp)[None, :, :, None]
    expected = 10 * np.array(means)[:, None] + np.array(means)
    pooled = pooling.adaptive_average_pool(x, size)
    np.testing.assert_allclose(pooled[0, :, :, 0], expected, rtol=1e-6)


def test_overlapping_max_pool_scatters_no_gradient_on_gpus():
    gradient = jax.jit(jax.grad(lambda x: pooling.overlapping_max_pool(x).sum()))
    x = jnp.zeros((2, 8, 8, 3))
    modules = {
        platform: jax.export.export(gradient, platforms=[platform])(x).mlir_module()
        for platform in ("cuda", "tpu")
    }
    assert "stablehlo.select_and_scatter" in modules["tpu"]
    assert not re.search(r"stablehlo\.(select_and_)?scatter", modules["cuda"])


@pytest.mark.parametrize("size", [(16, 12), (14, 18)])
def test_convolution_of_blocks_equals_the_stem_and_its_gradients(size):
    x, kernel = normal(0, 2, *size, 3), normal(1, 7, 7, 3, 4)
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    convolution = functools.partial(jax.lax.conv_general_dilated, **numbers)

    def stem(x, kernel):
        return convolution(x, kernel, window_strides=(2, 2), padding=((3, 3), (3, 3)))

    expected, expected_pullback = jax.vjp(stem, x, kernel)
    actual, pullback = jax.vjp(functools.partial(_convolve_blocks, convolution), x, kernel)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    cotangent = normal(2, *expected.shape)
    for one, other in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("platform", "dtype", "blocks"),
    [("cuda", "bfloat16", True), ("cuda", "float32", False), ("tpu", "bfloat16", False)],
)
def test_only_the_stem_in_bfloat16_on_gpus_works_on_blocks(platform, dtype, blocks):
    module = layers.Conv(8, (7, 7), 2, padding=3, dtype=jnp.dtype(dtype))
    apply = jax.jit(lambda x: module.init_with_output(jax.random.key(0), x)[0])
    x = jnp.zeros((2, 16, 16, 3))
    text = jax.export.export(apply, platforms=[platform])(x).mlir_module()
    assert (f"tensor<4x4x12x8x{'bf16' if dtype == 'bfloat16' else 'f32'}>" in text) is blocks


@pytest.mark.parametrize(
    ("channels", "features", "kernel", "strides", "padding", "groups", "rewritten"),
    [
        (3, 8, (3, 3), 1, "SAME", 1, True),
        (1, 32, (2, 3), 1, "VALID", 1, True),
        (3, 8, (3, 3), 1, ((2, 0), (1, 3)), 1, True),
        (4, 40, (1, 1), 1, "SAME", 1, True),
        (4, 40, (1, 1), 2, 0, 1, True),
        (4, 8, (2, 2), 2, "VALID", 1, True),
        (4, 8, (9, 9), 1, 4, 1, True),  # larger than the image
        (4, 8, (5, 7), (2, 3), (3, 2), 1, True),
        (4, 4, (3, 3), 1, 1, 4, True),  # depthwise
        (4, 4, (5, 5), 2, ((1, 2), (2, 1)), 4, True),
        (3, 8, (3, 3), 2, 1, 1, False),
        (3, 33, (3, 3), 1, 1, 1, False),
        (4, 8, (3, 3), 1, 1, 1, False),
        (4, 8, (1, 1), 1, 1, 1, False),
        (4, 8, (3, 3), 1, 1, 2, False),
        (4, 8, (3, 3), 1, 1, 4, False),
    ],
)
def test_conv_equals_flax_with_the_same_parameters(
    channels, features, kernel, strides, padding, groups, rewritten
):
    x = normal(0, 2, 7, 6, channels)
    options = {"padding": padding, "feature_group_count": groups}
    reference = nn.Conv(features, kernel, strides, **options)
    module = layers.Conv(features, kernel, strides, **options)
    variables = reference.init(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, jax.eval_shape(module.init, jax.random.key(1), x)
    )

    def run(module, variables, x):
        y, pullback = jax.vjp(module.apply, variables, x)
        return y, pullback(jnp.cos(y))

    expected = run(reference, variables, x)
    program = jax.jit(run, static_argnums=0).lower(module, variables, x).compile()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        program(variables, x),
        expected,
    )
    if jax.default_backend() == "cpu":
        assert ("convolution(" not in program.as_text()) is rewritten
    assert "conditional(" not in program.as_text()  # the choice is made before compiling


@pytest.mark.parametrize("options", [{"feature_group_count": 3}, {"kernel_dilation": 2}])
def test_conv_with_groups_or_dilation_equals_flax(options):
    x = normal(0, 2, 7, 6, 3)
    reference, module = nn.Conv(6, (3, 3), **options), layers.Conv(6, (3, 3), **options)
    variables = reference.init(jax.random.key(1), x)
    np.testing.assert_array_equal(module.apply(variables, x), reference.apply(variables, x))


def test_the_matrix_product_is_for_cpu_only():
    module = layers.Conv(8, (3, 3))
    x = jnp.zeros((2, 8, 8, 3))
    apply = jax.jit(lambda x: module.init_with_output(jax.random.key(0), x)[0])
    exported = jax.export.export(apply, platforms=["tpu"])(x)
    assert "stablehlo.convolution" in exported.mlir_module()
    assert "stablehlo.dot_general" not in exported.mlir_module()


def test_torch_initialisers_are_uniform_within_one_over_root_fan_in():
    kernel = layers.torch_kernel_init(jax.random.key(0), (3, 3, 16, 200))
    bias = layers.torch_bias_init(144)(jax.random.key(1), (20_000,))
    for values in (kernel, bias):
        assert np.abs(values).max() <= 1 / 12
        np.testing.assert_allclose(np.std(values), 1 / 12 / np.sqrt(3), rtol=0.02)


def test_he_normal_fan_out_has_variance_two_over_fan_out():
    kernel = layers.he_normal_fan_out(jax.random.key(0), (3, 3, 100, 32))
    np.testing.assert_allclose(np.var(kernel), 2 / (9 * 32), rtol=0.03)


def test_a_dense_layer_over_patches_is_a_convolution():
    x, kernel = normal(0, 2, 6, 9, 3), normal(1, 3, 3, 3, 5)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (3, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    actual = layers.patches(x, 3) @ kernel.reshape(-1, 5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_drop_path_drops_whole_examples_and_scales_up_the_others():
    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return layers.drop_path(x, 0.25, train)

    x = normal(0, 4000, 2, 3)
    assert jnp.array_equal(Drop().apply({}, x, train=False), x)
    y = Drop().apply({}, x, train=True, rngs={"dropout": jax.random.key(1)})
    kept = (y != 0).any(axis=(1, 2))
    np.testing.assert_allclose(y[kept], x[kept] / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.04  # six standard deviations


def test_drop_path_rates_rise_linearly():
    np.testing.assert_allclose(layers.drop_path_rates(0.2, 5), [0, 0.05, 0.1, 0.15, 0.2])
    assert layers.drop_path_rates(0.2, 1) == [0.0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_is_x_times_the_normal_distribution_and_so_is_its_gradient(dtype):
    x = jnp.linspace(-9, 9, 1801).astype(dtype)
    y, pullback = jax.vjp(layers.exact_gelu, x)
    exact = np.asarray(x, np.float64)
    below, density = stats.norm.cdf(exact), stats.norm.pdf(exact)
    tolerance = {"rtol": float(jnp.finfo(dtype).eps), "atol": 1e-6}
    assert y.dtype == dtype
    np.testing.assert_allclose(np.float64(y), exact * below, **tolerance)
    (gradient,) = pullback(jnp.ones_like(x))
    np.testing.assert_allclose(np.float64(gradient), below + exact * density, **tolerance)
