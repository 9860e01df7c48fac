"""`remat`: the same training step, for which less is kept from forward to backward pass.

XLA:CPU computes again, too, but so early that it saves no memory; so what is kept is counted here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import models
from flaxcls.models import efficientnet
from flaxcls.models.resnet import BasicBlock, BottleneckBlock

RESNET = "flaxcls.models.resnet:ResNet"
DENSENET = "flaxcls.models.densenet:DenseNet"
# What is kept, as a share of what it is without: for these small ones, whose stems weigh much.
NETWORKS = [
    (RESNET, {"stage_sizes": (2,), "block": BasicBlock, "width": 8}, 0.7),
    (RESNET, {"stage_sizes": (2,), "block": BottleneckBlock, "width": 8}, 0.3),
    ("wrn", {"depth": 10, "width": 1, "dropout": 0.3}, 0.4),
    (DENSENET, {"block_sizes": (6,), "growth": 8, "stem_width": 8, "dropout": 0.2}, 0.7),
    pytest.param("efficientnet_lite0", {}, 0.3, marks=pytest.mark.torture),  # compiles for long
    pytest.param(
        *("convnext", {"depths": (2,), "width": 8, "drop_path": 0.3}, 0.3),
        marks=pytest.mark.torture,
    ),
    ("swin", {"depths": (2,), "width": 16, "head_width": 8, "drop_path": 0.3}, 0.3),
    ("vit", {"depth": 2, "width": 32, "heads": 2, "patch": 8, "dropout": 0.1}, 0.3),
    ("mixer", {"depth": 2, "width": 32, "patch": 8, "dropout": 0.1}, 0.3),
]
SHAPE = (32, 32, 3)


def loss_of(name, options):
    """(params, batch statistics, images) -> loss, changed batch statistics; and the shapes."""
    network = models.build(name, num_classes=5, **options)

    def loss(params, batch_stats, images):
        logits, changed = network.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(7)},
        )
        return jnp.sum(jax.nn.log_softmax(logits)[:, 0]), changed

    shapes = models.shapes(network, SHAPE)
    images = jax.ShapeDtypeStruct((4, *SHAPE), jnp.float32)
    return loss, (shapes["params"], shapes.get("batch_stats", {}), images)


def bytes_kept(loss, shapes):
    """What the backward pass is given of the forward pass, but for the parameters and images."""

    def backward(*given):
        return jax.vjp(functools.partial(loss, batch_stats=given[1], images=given[2]), given[0])[1]

    given = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    kept = jax.tree.leaves(jax.eval_shape(backward, *shapes))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept) - given


@pytest.fixture
def small_efficientnet(monkeypatch):
    monkeypatch.setattr(efficientnet, "STAGES", efficientnet.STAGES[1:3])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "share"), NETWORKS)
def test_remat_is_the_same_step_and_keeps_less(name, options, share, small_efficientnet):
    (plain, shapes), (again, same) = (
        loss_of(name, {**options, "remat": remat}) for remat in (False, True)
    )
    assert shapes == same
    assert bytes_kept(again, shapes) < share * bytes_kept(plain, shapes)

    random = np.random.default_rng(0)

    def draw(path, leaf):
        positive = jax.tree_util.keystr(path).endswith(("['var']", "['scale']"))
        return np.float32(random.normal(size=leaf.shape) * 0.1 + positive)

    given = jax.tree.map_with_path(draw, shapes)
    results = [
        jax.jit(
            jax.value_and_grad(loss, has_aux=True),
            compiler_options={"xla_backend_optimization_level": 0},
        )(*given)
        for loss in (plain, again)
    ]
    expected, actual = (jax.tree.leaves(result) for result in results)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(results[0][1]))
    for x, y in zip(expected, actual, strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5 * largest)
