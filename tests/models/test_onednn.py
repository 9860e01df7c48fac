"""Convolutions by oneDNN: the same numbers as XLA's, only where the step is for CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import models
from flaxcls.models.kernels import kernels_for
from flaxcls.models.layers import Conv
from flaxcls.perf.flops import xla_flops
from flaxcls.runtime import onednn, sharding
from flaxcls.training.train import train_config as train

VERSION = onednn.version()

pytestmark = pytest.mark.skipif(VERSION is None, reason="needs oneDNN")

TARGET = "flaxcls_onednn_convolution"


@pytest.fixture(autouse=True)
def with_onednn(monkeypatch):
    monkeypatch.setattr(onednn, "version", lambda: VERSION)
    monkeypatch.setattr("flaxcls.models.onednn.SMALLEST", 0)


def mesh_of(devices):
    return sharding.make_mesh(devices=jax.devices()[:devices])


def convolved(conv, x, gradient, mesh=None):
    """The output of a layer with fixed parameters, and the gradients of images and parameters."""
    params = conv.init(jax.random.key(1), x[:1])

    def run(x, params, gradient):
        y, pullback = jax.vjp(lambda x, params: conv.apply(params, x), x, params)
        return y, *pullback(gradient)

    if mesh is None:
        return jax.jit(run)(x, params, gradient)
    split = sharding.batch_sharding(mesh)
    x, gradient = (jax.device_put(array, split) for array in (x, gradient))
    step = jax.jit(kernels_for(mesh, run))
    assert step.lower(x, params, gradient).as_text().count(f"@{TARGET}") == 3
    return step(x, params, gradient)


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize(
    ("pixels", "window", "strides", "padding"),
    [
        ((9, 12), (3, 3), (1, 1), "SAME"),
        ((9, 12), (3, 3), (2, 2), "SAME"),
        ((8, 8), (5, 3), (2, 1), ((1, 3), (0, 2))),
        ((12, 12), (7, 7), (2, 2), 3),
        ((6, 6), (2, 2), (1, 1), "VALID"),
    ],
)
def test_equals_xla_with_its_gradients(devices, pixels, window, strides, padding):
    conv = Conv(40, window, strides, padding=padding, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (16, *pixels, 6))
    y = jax.eval_shape(lambda x: conv.init_with_output(jax.random.key(1), x)[0], x)
    gradient = jax.random.normal(jax.random.key(2), y.shape)
    expected = convolved(conv, x, gradient)
    found = convolved(conv, x, gradient, mesh_of(devices))
    for array, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(reference).max())
        np.testing.assert_allclose(array, reference, rtol=0, atol=2e-6 * scale)


def test_bfloat16_rounds_the_float32_result():
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 64))
    gradient = jax.random.normal(jax.random.key(2), (4, 8, 8, 32))
    expected = convolved(Conv(32, (3, 3), use_bias=False, dtype=jnp.float32), x, gradient)
    half = gradient.astype(jnp.bfloat16)
    found = convolved(Conv(32, (3, 3), use_bias=False, dtype=jnp.bfloat16), x, half, mesh_of(1))
    for array, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(reference).max())
        np.testing.assert_allclose(jnp.float32(array), reference, rtol=0, atol=0.01 * scale)


@pytest.mark.parametrize(
    "options",
    [
        {"feature_group_count": 2},
        {"kernel_dilation": 2},
        {"dtype": jnp.float16},
        {"kernel_size": (1, 1)},  # a product of matrices, as it is without oneDNN
    ],
)
def test_what_is_not_for_onednn_is_left_alone(options):
    options = {"features": 8, "kernel_size": (3, 3)} | options
    conv, x = Conv(**options), jnp.ones((8, 6, 6, 8))
    step = jax.jit(kernels_for(mesh_of(2), lambda x: conv.init(jax.random.key(0), x)))
    assert TARGET not in step.lower(x).as_text()


def test_a_batch_that_does_not_split_over_the_devices_is_left_alone():
    conv, x = Conv(8, (3, 3)), jnp.ones((3, 6, 6, 8))
    step = jax.jit(kernels_for(mesh_of(2), lambda x: conv.init(jax.random.key(0), x)))
    assert TARGET not in step.lower(x).as_text()


def test_what_is_too_small_is_left_to_xla(monkeypatch):
    conv, x = Conv(8, (3, 3), padding="VALID"), jnp.ones((4, 8, 6, 10))
    step = jax.jit(kernels_for(mesh_of(2), lambda x: conv.init_with_output(jax.random.key(0), x)))
    flops = 2 * (2 * 6 * 4 * 8) * (3 * 3 * 10)  # of one device
    monkeypatch.setattr("flaxcls.models.onednn.SMALLEST", flops + 1)
    assert TARGET not in step.lower(x).as_text()
    jax.clear_caches()
    monkeypatch.setattr("flaxcls.models.onednn.SMALLEST", flops)
    assert TARGET in step.lower(x).as_text()


@pytest.mark.parametrize("devices", [1, 8])
def test_numbers_are_the_same_every_time(devices):
    conv = Conv(16, (3, 3), use_bias=False)
    x, gradient = jax.random.normal(jax.random.key(0), (2, 64, 12, 12, 16))
    first = jax.tree.leaves(convolved(conv, x, gradient, mesh_of(devices)))
    again = jax.tree.leaves(convolved(conv, x, gradient, mesh_of(devices)))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_where_it_is_asked_for_and_installed(monkeypatch):
    conv, x = Conv(8, (3, 3)), jnp.ones((4, 6, 6, 8))

    def run(x):
        return conv.init_with_output(jax.random.key(0), x)[0]

    assert TARGET not in jax.jit(run).lower(x).as_text()
    monkeypatch.setattr(onednn, "version", lambda: None)
    assert TARGET not in jax.jit(kernels_for(mesh_of(1), run)).lower(x).as_text()


def test_flops_are_those_that_xla_counts():
    network = models.build("cifar_resnet20", num_classes=10)
    x = jnp.ones((8, 32, 32, 3))
    variables = network.init(jax.random.key(0), x[:1], train=False)

    def forward(variables, x):
        return network.apply(variables, x, train=False)

    def count(function):
        compiled = jax.jit(function).lower(variables, x).compile()
        return xla_flops(compiled, compiled.as_text())

    by_onednn = count(kernels_for(mesh_of(1), forward))
    assert by_onednn == pytest.approx(count(forward), rel=1e-3)


def test_a_call_that_fails_makes_numbers_that_no_step_takes(monkeypatch, capfd):
    conv, x = Conv(8, (3, 3)), jnp.ones((4, 6, 6, 8))
    step = jax.jit(kernels_for(mesh_of(1), lambda p, x: conv.apply(p, x)))
    step = step.lower(conv.init(jax.random.key(0), x), x).compile()

    def fails(convolution):
        raise MemoryError("no memory is left")

    monkeypatch.setattr(onednn, "_primitive", fails)
    y = step(conv.init(jax.random.key(0), x), x)
    assert bool(jnp.all(jnp.isnan(y)))
    assert "no memory is left" in capfd.readouterr().err


def test_calls_of_several_threads_do_not_disturb_each_other():
    conv = Conv(16, (3, 3))
    images = jax.random.normal(jax.random.key(0), (16, 8, 4, 12, 12, 8))
    params = conv.init(jax.random.key(1), images[0, 0])
    step = jax.jit(kernels_for(mesh_of(8), lambda x: conv.apply(params, x)))
    split = sharding.batch_sharding(mesh_of(8))
    for x in images.reshape(16, 32, 12, 12, 8):
        y = step(jax.device_put(x, split))
        np.testing.assert_allclose(y, conv.apply(params, x), rtol=0, atol=1e-5)


def test_a_run_is_xlas_but_for_rounding_and_resumes_bitwise(
    tmp_path, tiny_config, saved_arrays, assert_same_arrays, monkeypatch
):
    def config(**changes):
        changes |= {
            "model__name": "digits_cnn",
            "gradient_accumulation": 2,
            "ema_decay": 0.9,
            "schedule__name": "constant",
        }
        made = tiny_config(**changes)
        del made.model["widths"]
        return made

    train(config(), tmp_path / "whole")
    train(config(duration="8 steps"), tmp_path / "parts")
    train(config(), tmp_path / "parts")
    whole = saved_arrays(tmp_path / "whole", 12)
    assert_same_arrays(saved_arrays(tmp_path / "parts", 12), whole)
    monkeypatch.setattr(onednn, "version", lambda: None)
    train(config(), tmp_path / "xla")
    by_xla = saved_arrays(tmp_path / "xla", 12)
    assert any(np.any(whole[name] != by_xla[name]) for name in whole)
    for name, array in whole.items():
        np.testing.assert_allclose(array, by_xla[name], rtol=0, atol=1e-4, err_msg=name)
