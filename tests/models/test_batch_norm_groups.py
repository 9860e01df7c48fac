"""BatchNorm in groups: the same arithmetic as BatchNorm's, of each group by itself."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import models
from flaxcls.errors import ConfigError
from flaxcls.models.batch_norm_groups import batch_norm_in_groups

CHANNELS = 5
# Much larger than it varies, for the variance's sake; and no map, as behind a pooling layer.
INPUTS = {"maps": (12, 4, 3, CHANNELS), "vectors": (12, CHANNELS)}
GROUPS = 3


@pytest.fixture(params=INPUTS)
def example(request):
    """Images, what the output's gradient is, and variables of a BatchNorm; float64."""
    rng = np.random.default_rng(0)
    x, gradient = rng.normal(0.5, 2, (2, *INPUTS[request.param]))
    names = ("params", "scale"), ("params", "bias"), ("batch_stats", "mean"), ("batch_stats", "var")
    variables = {"params": {}, "batch_stats": {}}
    for collection, name in names:
        variables[collection][name] = rng.uniform(0.5, 1.5, CHANNELS)
    return x, gradient, variables


def over_groups(statistics):
    """What the running statistics become, of those that each group makes of them."""
    return jax.tree.map(lambda each: each.mean(0), statistics)


def computed(x, gradient, variables, groups, **options):
    """Output, running statistics and the gradients of x, scale and bias, by flaxcls."""
    norm = nn.BatchNorm(use_running_average=False, momentum=0.9, **options)
    single = jax.tree.map(jnp.float32, variables)

    def apply(x, params):
        with batch_norm_in_groups(groups):
            return norm.apply({**single, "params": params}, x, mutable=["batch_stats"])

    @jax.jit
    def run(x, params, gradient):
        y, pullback, updates = jax.vjp(apply, x, params, has_aux=True)
        return y, over_groups(updates["batch_stats"]), *pullback(gradient)

    return run(jnp.float32(x), single["params"], jnp.float32(gradient))


def reference(x, gradient, variables, groups, epsilon=1e-5):
    """The same in float64, the gradients by Ioffe & Szegedy 2015 (arXiv:1502.03167)."""
    split = x.reshape(groups, -1, CHANNELS)
    of_y = gradient.reshape(split.shape)
    mean, var = split.mean(1, keepdims=True), split.var(1, keepdims=True)
    normalized = (split - mean) / np.sqrt(var + epsilon)
    scale = variables["params"]["scale"]
    y = normalized * scale + variables["params"]["bias"]
    inner = of_y * scale
    of_x = inner - inner.mean(1, keepdims=True)
    of_x -= normalized * (inner * normalized).mean(1, keepdims=True)
    of_x /= np.sqrt(var + epsilon)
    running = {
        name: 0.9 * variables["batch_stats"][name] + 0.1 * new.mean((0, 1))
        for name, new in (("mean", mean), ("var", var))
    }
    of_params = {"scale": (of_y * normalized).sum((0, 1)), "bias": of_y.sum((0, 1))}
    return y.reshape(x.shape), running, of_x.reshape(x.shape), of_params


def assert_close(actual, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        tuple(actual),
        tuple(expected),
    )


@pytest.mark.parametrize("fast", [True, False])
def test_output_statistics_and_gradients_are_those_of_float64(example, fast):
    actual = computed(*example, GROUPS, use_fast_variance=fast)
    assert_close(actual, reference(*example, GROUPS))
    others = reference(*example, 1)
    assert np.abs(actual[0] - others[0]).max() > 0.1  # the whole batch would be something else


def test_each_group_is_pytorchs_batch_norm(example):
    torch = pytest.importorskip("torch")
    x, gradient, variables = example
    y, _, of_x, of_params = computed(*example, GROUPS)
    norm = (torch.nn.BatchNorm2d if x.ndim == 4 else torch.nn.BatchNorm1d)(CHANNELS).double()
    norm.weight.data, norm.bias.data = (
        torch.from_numpy(variables["params"][name]) for name in ("scale", "bias")
    )
    for group in np.split(np.arange(len(x)), GROUPS):
        given = torch.from_numpy(np.moveaxis(x[group], -1, 1).copy()).requires_grad_()
        output = norm(given)
        output.backward(torch.from_numpy(np.moveaxis(gradient[group], -1, 1).copy()))
        theirs = (np.moveaxis(t.detach().numpy(), 1, -1) for t in (output, given.grad))
        assert_close((y[group], of_x[group]), theirs)
    assert_close(  # added up over the groups
        (of_params["scale"], of_params["bias"]),
        (norm.weight.grad.numpy(), norm.bias.grad.numpy()),
    )


def test_one_group_is_flaxs_batch_norm(example):
    x, _, variables = example
    single = jax.tree.map(jnp.float32, variables)
    for dtype in (None, jnp.bfloat16):
        for options in ({}, {"use_scale": False}, {"use_bias": False, "epsilon": 1e-3}):
            norm = nn.BatchNorm(use_running_average=False, dtype=dtype, **options)
            expected, statistics = norm.apply(single, jnp.float32(x), mutable=["batch_stats"])
            with batch_norm_in_groups(1):
                y, other = norm.apply(single, jnp.float32(x), mutable=["batch_stats"])
            other = over_groups(other)
            assert y.dtype == expected.dtype
            # The mean of an example first, then over the group, may round the last bit otherwise.
            assert_close((y,), (expected,), 1e-5 if dtype is None else 2**-7)
            assert_close((other,), (statistics,))


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("digits_cnn", 8, {}),
        ("quick", 32, {"widths": (4, 8)}),
        ("wrn", 8, {"depth": 10, "width": 1, "remat": True}),
        ("densenet_bc", 16, {"depth": 10, "growth": 4}),
    ],
)
def test_networks_compute_each_group_as_if_it_were_alone(name, side, options):
    network = models.build(name, num_classes=3, **options)
    size = jnp.arange(1.0, 7).reshape(6, 1, 1, 1)  # so that groups differ
    images = size * jax.random.normal(jax.random.key(0), (6, side, side, 3))
    variables = jax.jit(lambda: network.init(jax.random.key(1), images[:1], train=False))()

    @functools.partial(jax.jit, static_argnums=1)
    def apply(images, groups=1):
        with batch_norm_in_groups(groups):
            logits, updates = network.apply(variables, images, train=True, mutable=["batch_stats"])
            return logits, over_groups(updates["batch_stats"])

    logits, statistics = apply(images, 3)
    alone = [apply(images[first : first + 2]) for first in (0, 2, 4)]
    assert_close((logits,), (np.concatenate([logits for logits, _ in alone]),), 1e-3)
    mean = jax.tree.map(lambda *several: sum(several) / 3, *(changed for _, changed in alone))
    assert_close((statistics,), (mean,), 1e-3)
    assert np.abs(logits - apply(images)[0]).max() > 1e-2


def test_evaluation_is_as_ever(example):
    x, _, variables = example
    norm = nn.BatchNorm()
    expected = norm.apply(variables, x, use_running_average=True)
    with batch_norm_in_groups(GROUPS):
        np.testing.assert_array_equal(norm.apply(variables, x, use_running_average=True), expected)
        np.testing.assert_array_equal(norm.apply(variables, x, True), expected)


@pytest.mark.parametrize(
    ("options", "given"), [({"axis": 1}, {}), ({}, {"mask": np.ones((4, 1, 1))})]
)
def test_batch_norm_of_another_kind_is_refused(options, given):
    norm = nn.BatchNorm(use_running_average=False, name="own", **options)
    with batch_norm_in_groups(2), pytest.raises(ConfigError, match=re.escape("as own does")):
        norm.init_with_output(jax.random.key(0), jnp.ones((4, 3, 2)), **given)
