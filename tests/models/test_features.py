"""What networks record on the way to their logits: `models.features`."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import models
from flaxcls.errors import ConfigError
from flaxcls.insight.explanations import gradcam
from flaxcls.models.layers import record
from flaxcls.models.resnet import BasicBlock

SMALL_RESNET = {"stage_sizes": (1, 1), "block": BasicBlock, "width": 4}
SMALL_DENSENET = {"block_sizes": (1, 2), "growth": 4, "stem_width": 8}
SMALL_VGG = {"stage_sizes": (1,) * 5, "pool_size": 1, "hidden": 8}
SMALL_VIT = {"depth": 2, "width": 16, "heads": 2, "patch": 16}

# A network of every kind, and the sides of its maps for images of 64 x 96 pixels.
STAGES = [
    ("dense", {"widths": (8, 6)}, []),
    ("keras_cnn", {}, [62, 29, 12]),
    ("keras_small", {"dropout": 0.5}, [62, 29]),
    ("torch_convnet", {}, [64, 32]),
    ("digits_cnn", {"dropout": 0.5}, [64, 32]),
    ("quick", {"widths": (8, 12)}, [31, 15]),
    ("cifar_resnet20", {}, [64, 32, 16]),
    ("wrn", {"depth": 10, "width": 1}, [64, 32, 16]),
    ("flaxcls.models.resnet:ResNet", SMALL_RESNET, [16, 8]),
    ("flaxcls.models.resnet:ResNet", {**SMALL_RESNET, "stem": "cifar"}, [64, 32]),
    ("alexnet", {"hidden": 8}, [15, 7, 3]),
    ("cifar_alexnet", {}, [16, 8, 4]),
    ("flaxcls.models.vgg:VGG", SMALL_VGG, [64, 32, 16, 8, 4]),
    ("flaxcls.models.densenet:DenseNet", SMALL_DENSENET, [16, 8]),
    ("densenet_bc", {"depth": 10, "growth": 4}, [64, 32, 16]),
    ("efficientnet_b0", {}, [32, 16, 8, 4, 2]),
    ("efficientnet_lite0", {}, [32, 16, 8, 4, 2]),
    ("mobilenet_v3_small", {}, [32, 16, 8, 4, 2]),
    ("mobilenet_v3_large", {}, [32, 16, 8, 4, 2]),
    ("mobilenetv4_conv_medium", {}, [32, 16, 8, 4, 2]),
    ("convnext", {"depths": (1, 1, 1), "width": 8}, [16, 8, 4]),
    ("swin", {"depths": (1, 2), "width": 16, "head_width": 8}, [16, 8]),
]
BLOCKS = [
    ("vit", SMALL_VIT, [4, 4]),
    ("vit", {**SMALL_VIT, "registers": 3, "remat": True}, [4, 4]),
    ("vit", {**SMALL_VIT, "pool": "average", "registers": 2}, [4, 4]),
    ("mixer", {"depth": 2, "width": 16, "patch": 16}, [4, 4]),
]
SHAPE = (64, 96, 3)
# What the logits are over those of the head: Quick divides them by the head's width.
SCALE = {"quick": 1 / 12}

# Where the head is given the mean over the pixels of the last map.
POOLED_BY_MEAN = {"cifar_resnet20", "wrn", "efficientnet_b0", "efficientnet_lite0", "swin"}
POOLED_BY_MEAN |= {"densenet_bc"} | {name for name, *_ in STAGES if "Net" in name}


def variables_for(network, shape=SHAPE):
    """Variables that tell everything apart, without compiling `init`."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        positive = jax.tree_util.keystr(path).endswith(("['var']", "['scale']"))
        values = random.normal(size=leaf.shape) * 0.1 + positive
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map_with_path(draw, models.shapes(network, shape))


@pytest.mark.parametrize(("name", "options", "sides"), STAGES + BLOCKS)
def test_maps_and_what_the_head_is_given_are_recorded(name, options, sides):
    network = models.build(name, num_classes=5, **options)
    variables = variables_for(network)
    images = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    compute = jax.jit(
        functools.partial(models.logits_and_features, network),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    logits, features = compute(variables, images)

    head = variables["params"]["head"]
    assert features["pooled"].shape == (2, head["kernel"].shape[0])
    assert features["pooled"].dtype == logits.dtype == jnp.float32
    expected = features["pooled"] @ head["kernel"] + head.get("bias", 0)
    scale = SCALE.get(name, 1)
    np.testing.assert_allclose(logits, scale * expected, rtol=1e-4, atol=1e-4)

    kind = "block" if (name, options, sides) in BLOCKS else "stage"
    maps = {key: value for key, value in features.items() if key != "pooled"}
    assert list(maps) == [f"{kind}{i + 1}" for i in range(len(sides))]
    assert [x.shape[1] for x in maps.values()] == sides
    assert all(x.ndim == 4 and x.shape[0] == 2 and x.shape[2] > x.shape[1] for x in maps.values())
    for x in maps.values():  # they are of these images, and no map is that of another layer
        assert np.ptp(x[0]) > 0 and not np.array_equal(x[0], x[1])
    if name in POOLED_BY_MEAN:
        last = features[f"stage{len(sides)}"]
        np.testing.assert_allclose(features["pooled"], last.mean((1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "options", "sides"), STAGES + BLOCKS)
def test_logits_depend_on_every_map_which_gradcam_needs(name, options, sides):
    network = models.build(name, num_classes=5, **options)
    shapes = models.shapes(network, SHAPE), jax.ShapeDtypeStruct((2, *SHAPE), jnp.float32)
    assert [x.shape[1] for x in models.maps(network, *shapes).values()] == sides


@pytest.mark.parametrize(("name", "options", "sides"), [STAGES[0], STAGES[5], STAGES[-1], *BLOCKS])
def test_gradcam_has_the_size_of_the_image_or_says_that_there_is_no_map(name, options, sides):
    network = models.build(name, num_classes=5, **options)
    images, labels = jnp.zeros((2, *SHAPE)), jnp.zeros(2, jnp.int32)
    explain = functools.partial(jax.eval_shape, gradcam(network), models.shapes(network, SHAPE))
    if sides:
        heat = explain(images, labels)
        assert (heat.shape, heat.dtype) == ((2, 64, 96), jnp.float32)
    else:
        with pytest.raises(ConfigError, match="gradcam needs a network with maps"):
            explain(images, labels)


def test_what_is_added_to_a_map_is_seen_there_and_after_it():
    network = models.build("vit", num_classes=5, registers=3, **SMALL_VIT)
    variables = variables_for(network)
    images = np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32)
    added = np.random.default_rng(2).normal(size=(2, 4, 6, 16)).astype(np.float32)
    compute = jax.jit(functools.partial(models.logits_and_features, network, variables, images))
    (logits, before), (changed, after) = compute(), compute({"block1": added})
    np.testing.assert_allclose(after["block1"] - before["block1"], added, atol=1e-4)
    assert np.abs(after["block2"] - before["block2"]).max() > 0.1
    assert np.abs(changed - logits).max() > 1e-3
    nothing = compute({"block1": np.zeros_like(added)})
    np.testing.assert_allclose(nothing[0], logits, rtol=1e-5)


def test_maps_of_tokens_are_row_by_row_and_without_the_tokens_that_are_added():
    network = models.build("vit", num_classes=5, registers=3, **SMALL_VIT)
    variables = variables_for(network)
    images = np.random.default_rng(1).normal(size=(1, *SHAPE)).astype(np.float32)
    before = models.features(network, variables, images)["block1"]
    # Positions are added to the tokens: one that is far from the others shows where it is.
    params = variables["params"]
    added, columns = 1 + 3, 6
    changed = params["pos_embed"].at[:, added + 2 * columns + 5].add(100.0)
    variables = {"params": {**params, "pos_embed": changed}}
    after = models.features(network, variables, images)["block1"]
    moved = np.abs(after - before).sum((0, 3))
    assert np.unravel_index(moved.argmax(), moved.shape) == (2, 5)


@pytest.mark.parametrize(("name", "options", "sides"), STAGES + BLOCKS)
def test_nothing_is_computed_or_kept_where_features_are_not_asked_for(
    name, options, sides, monkeypatch
):
    network = models.build(name, num_classes=5, **options)
    images = jax.ShapeDtypeStruct((2, *SHAPE), jnp.float32)
    variables = models.shapes(network, SHAPE)
    assert variables.keys() <= {"params", "batch_stats"}

    def program():
        rngs = {"dropout": jax.random.key(0)}
        step = functools.partial(network.apply, train=True, mutable=["batch_stats"], rngs=rngs)
        return str(jax.make_jaxpr(step)(variables, images))

    asked = program()
    for module in list(sys.modules.values()):
        if module.__name__.startswith("flaxcls.models.") and hasattr(module, "record"):
            monkeypatch.setattr(module, "record", lambda network, name, x, *view: x)
    assert program() == asked


class Backbone(nn.Module):
    @nn.compact
    def __call__(self, x):
        record(self, "stage1", x)
        return x.mean((1, 2))


class Own(nn.Module):
    num_classes: int
    recorded: bool

    @nn.compact
    def __call__(self, x, train):
        x = Backbone(name="backbone")(x)
        if self.recorded:
            record(self, "pooled", 2 * x)
        x = nn.Dense(4, name="hidden")(x)
        return nn.Dense(self.num_classes)(x)


@pytest.mark.parametrize("passed_on", [True, False])
def test_own_network_that_passes_on_what_record_returns_has_gradients(passed_on):
    class Network(nn.Module):
        num_classes: int = 2

        @nn.compact
        def __call__(self, x, train):
            recorded = record(self, "stage1", x)
            return nn.Dense(2)((recorded if passed_on else x).mean((1, 2)))

    images = jnp.zeros((1, 4, 4, 3))
    variables = models.shapes(Network(), (4, 4, 3))
    assert list(models.maps(Network(), variables, images)) == ["stage1"] * passed_on


def test_own_network_has_what_it_records_or_else_what_its_last_layer_is_given():
    images = jnp.arange(2 * 2 * 2 * 3, dtype=jnp.bfloat16).reshape(2, 2, 2, 3)
    network = Own(num_classes=5, recorded=True)
    variables = network.init(jax.random.key(0), images, train=False)
    assert variables.keys() == {"params"}
    features = models.features(network, variables, images)
    assert features.keys() == {"backbone/stage1", "pooled"}
    np.testing.assert_array_equal(features["backbone/stage1"], images)
    mean = images.astype(jnp.float32).mean((1, 2))
    np.testing.assert_allclose(features["pooled"], 2 * mean)
    assert features["pooled"].dtype == jnp.float32

    features = models.features(network.clone(recorded=False), variables, images)
    hidden = variables["params"]["hidden"]
    np.testing.assert_allclose(features["pooled"], mean @ hidden["kernel"] + hidden["bias"], 1e-2)
