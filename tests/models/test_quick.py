"""The quick network: whitening, identity initialisation, and the network it is after."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import models
from flaxcls.models.quick import dirac_init, whiten


@pytest.fixture(scope="module")
def module():
    return models.build("quick", num_classes=4, widths=(6, 40))


@pytest.fixture(scope="module")
def images():
    """Smooth, correlated images, as natural ones are."""
    noise = jax.random.normal(jax.random.key(0), (64, 12, 13, 3))
    return noise[:, :-1] + noise[:, 1:] + 0.5 * noise[:, :-1].mean(-1, keepdims=True)


@pytest.fixture(scope="module")
def variables(module, images):
    return jax.jit(lambda key: module.init(key, images[:1], train=False))(jax.random.key(1))


def test_whitened_patches_have_the_identity_as_second_moment(variables, images):
    kernel = whiten(variables, images, epsilon=0.0)["params"]["whiten"]["kernel"]
    white = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(-1, 24)
    np.testing.assert_allclose(white[:, :12].T @ white[:, :12] / len(white), np.eye(12), atol=1e-3)
    np.testing.assert_array_equal(kernel[..., 12:], -kernel[..., :12])


def test_whitening_of_constant_images_is_finite(variables):
    kernel = whiten(variables, jnp.ones((4, 9, 9, 3)))["params"]["whiten"]["kernel"]
    assert np.isfinite(kernel).all()


def test_initialize_from_data_changes_only_the_frozen_kernel(module, variables, images):
    new = models.initialize_from_data(module, variables, images)
    changed = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(variables["params"]),
            jax.tree.leaves(new["params"]),
            strict=True,
        )
        if not np.array_equal(a, b)
    ]
    assert changed == ["whiten/kernel"]
    assert re.search(models.frozen(module), changed[0])
    assert new["batch_stats"] is variables["batch_stats"]
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, variables)


def test_the_whitening_kernel_gets_no_gradient(module, variables, images):
    def loss(params):
        logits, _ = module.apply(
            {**variables, "params": params}, images[:4], train=True, mutable=["batch_stats"]
        )
        return (logits**2).sum()

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert not gradient["whiten"]["kernel"].any()
    assert gradient["whiten"]["bias"].any()
    assert gradient["block1_conv1"]["kernel"].any()


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 3), (3, 5), (5, 3)])
def test_dirac_initialised_convolution_passes_channels_through(inputs, outputs):
    kernel = dirac_init(jax.random.key(0), (3, 3, inputs, outputs))
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, inputs))
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    common = min(inputs, outputs)
    np.testing.assert_allclose(y[..., :common], x[..., :common], atol=1e-6)
    assert (np.abs(kernel[..., common:]) > 0).all()


def test_batch_norm_has_no_scale_and_the_given_momentum(images):
    module = models.build("quick", num_classes=4, widths=(6,), batch_norm_momentum=0.25)
    variables = jax.jit(lambda key: module.init(key, images[:1], train=False))(jax.random.key(1))
    assert set(variables["params"]["block1_norm1"]) == {"bias"}
    zeros = jnp.zeros_like(images[:2])
    variables["params"]["whiten"]["bias"] = jnp.zeros(24)
    _, state = jax.jit(lambda v: module.apply(v, zeros, train=True, mutable=["batch_stats"]))(
        variables
    )
    # The batch's variance is 0, so what is left of the initial 1 is the momentum.
    np.testing.assert_allclose(state["batch_stats"]["block1_norm1"]["var"], 0.25)


def test_quick_equals_pytorch(module, variables, images):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    params = jax.tree.map(
        lambda a: torch.tensor(np.array(a if a.ndim < 4 else a.transpose(3, 2, 0, 1))),
        models.initialize_from_data(module, variables, images)["params"],
    )

    def norm(x, name):
        return functional.batch_norm(
            x, None, None, bias=params[name]["bias"], training=True, eps=1e-5
        )

    def gelu(x):
        return functional.gelu(x, approximate="tanh")

    x = torch.tensor(np.array(images[:5]).transpose(0, 3, 1, 2))
    x = gelu(functional.conv2d(x, params["whiten"]["kernel"], params["whiten"]["bias"]))
    for block in ("block1", "block2"):
        x = functional.conv2d(x, params[f"{block}_conv1"]["kernel"], padding=1)
        x = gelu(norm(functional.max_pool2d(x, 2), f"{block}_norm1"))
        x = functional.conv2d(x, params[f"{block}_conv2"]["kernel"], padding=1)
        x = gelu(norm(x, f"{block}_norm2"))
    expected = x.amax((2, 3)) @ params["head"]["kernel"] / 40

    ours = models.initialize_from_data(module, variables, images)
    logits, _ = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))(
        ours, images[:5]
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
