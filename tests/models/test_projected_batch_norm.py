"""BatchNorm of a widening 1x1 convolution, computed from what is convolved: the same numbers."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls.models.batch_norm_groups import batch_norm_in_groups
from flaxcls.models.layers import Conv, batch_norm
from flaxcls.models.projected_batch_norm import batch_norm_of_projections
from flaxcls.models.resnet import BottleneckBlock, ResNet


class Projection(nn.Module):
    """A 1x1 convolution, then BatchNorm."""

    features: int = 12
    strides: int = 1
    use_bias: bool = False
    kernel: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        window = (self.kernel, self.kernel)
        options = {"use_bias": self.use_bias, "dtype": self.dtype}
        x = Conv(self.features, window, self.strides, padding=0, name="conv", **options)(x)
        return batch_norm(train, self.dtype)(name="norm")(x)


def contexts(groups, projected):
    stack = contextlib.ExitStack()
    if projected:
        stack.enter_context(batch_norm_of_projections(groups))
    stack.enter_context(batch_norm_in_groups(groups))
    return stack


def computed(network, x, variables, groups, projected):
    """Output, running statistics [G,C], and the gradients of the parameters and x."""

    def loss(params, x):
        with contexts(groups, projected):
            y, updates = network.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), (y, updates)

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, (y, updates) = run(variables["params"], x)
    return y, jax.tree.map(lambda s: s.reshape(groups, -1), updates), gradients


def example(network, channels=5):
    """Images whose channels depend on each other and are far from zero; variables."""
    rng = np.random.default_rng(0)
    x = rng.normal(1, 1, (8, 6, 5, channels)) @ rng.normal(0, 1, (channels, channels)) + 2
    x = jnp.float32(x)
    variables = network.init(jax.random.key(0), x, train=False)
    leaves, tree = jax.tree.flatten(variables)
    leaves = [leaf + rng.uniform(0.1, 0.5, leaf.shape).astype(np.float32) for leaf in leaves]
    return x, jax.tree.unflatten(tree, leaves)


def assert_close(actual, expected, tolerance):
    def compare(a, b):
        a, b = np.float64(a), np.float64(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())

    jax.tree.map(compare, actual, expected)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("groups", [1, 4])
def test_output_statistics_and_gradients_are_those_of_both_layers(strides, groups):
    network = Projection(strides=strides)
    x, variables = example(network)
    expected = computed(network, x, variables, groups, projected=False)
    assert_close(computed(network, x, variables, groups, projected=True), expected, 1e-4)


def test_bfloat16_rounds_no_worse_than_both_layers():
    exact, rounded = Projection(), Projection(dtype=jnp.bfloat16)
    x, variables = example(exact)
    y = np.float64(computed(exact, x, variables, 1, projected=False)[0])
    errors = [
        np.std(np.float64(computed(rounded, x, variables, 1, projected)[0]) - y)
        for projected in (False, True)
    ]
    assert 0 < errors[1] < 1.1 * errors[0]


def convolutions(network, x, variables, projected=True, train=True):
    """How many convolutions a network has on a TPU."""

    def apply(variables, x):
        with contexts(1, projected):
            return network.apply(variables, x, train=train, mutable=["batch_stats"])

    lowered = jax.jit(apply).trace(variables, x).lower(lowering_platforms=("tpu",))
    return lowered.as_text().count("stablehlo.convolution")


def test_the_convolution_itself_is_not_computed():
    x, variables = example(Projection())
    assert convolutions(Projection(), x, variables, projected=False) == 1
    assert convolutions(Projection(), x, variables) == 0


@pytest.mark.parametrize(
    ("options", "train"),
    [({"use_bias": True}, True), ({"kernel": 3}, True), ({"features": 5}, True), ({}, False)],
)
def test_what_is_no_widening_projection_in_training_is_as_ever(options, train):
    network = Projection(**options)
    x, variables = example(network)
    assert convolutions(network, x, variables, train=train) == 1


@pytest.mark.parametrize("remat", [False, True])
def test_a_residual_network_has_the_same_numbers(remat):
    network = ResNet(
        num_classes=3, stage_sizes=(1, 1), block=BottleneckBlock, width=4, stem="cifar", remat=remat
    )
    x, variables = example(network, channels=3)
    expected = computed(network, x, variables, 2, projected=False)
    assert_close(computed(network, x, variables, 2, projected=True), expected, 2e-4)
