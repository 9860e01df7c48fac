"""The layers that layer-wise learning rates count, from the input to the head."""

import importlib.util
import re
from pathlib import Path

import flax.linen as nn
import pytest

from flaxcls import models
from flaxcls.core.optim import paths_of
from flaxcls.models.layer_order import layers_of


def tops(module, shape=(32, 32, 3)):
    """The modules at the network's top that each layer has parameters in."""
    return [
        list(dict.fromkeys(path.split("/")[0] for path in layer))
        for layer in layers_of(module, shape)
    ]


def test_a_vision_transformer_has_a_stem_its_blocks_and_a_head():
    network = models.build("vit", num_classes=5, patch=8, width=16, depth=12, heads=2)
    assert tops(network) == [
        ["patch_embed", "cls_token", "pos_embed"],
        *([f"block{i}"] for i in range(1, 12)),  # 10 comes after 9, not after 1
        ["block12", "norm"],
        ["head"],
    ]


def test_without_blocks_each_layer_with_a_kernel_counts():
    network = models.build("digits_cnn", num_classes=5)
    assert tops(network) == [["conv1", "norm1"], ["conv2", "norm2"], ["conv3", "norm3"], ["head"]]


def test_blocks_that_are_no_modules_are_told_by_their_names():
    network = models.build("cifar_resnet20", num_classes=5)
    layers = tops(network)
    assert layers[0] == ["conv1", "norm1"] and layers[-1] == ["head"] and len(layers) == 11
    assert layers[1] == [f"stage1_block1_{name}" for name in ("conv1", "norm1", "conv2", "norm2")]


class Twig(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(nn.Dense(4)(x))


class Tree(nn.Module):
    """A user's own network, whose layers have names that we can't guess."""

    num_classes: int
    block_pattern = r"^Twig_\d+"

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(4)(x.reshape(len(x), -1))
        for _ in range(11):
            x = Twig()(x)
        return nn.Dense(self.num_classes)(x)


def test_a_network_may_say_what_its_blocks_are():
    twigs = [[f"Twig_{i}"] for i in range(11)]
    assert tops(Tree(5)) == [["Dense_0"], *twigs, ["Dense_1"]]


@pytest.mark.parametrize(
    "name", ["densenet121", "mobilenetv4_conv_medium", "mobilenet_v3_small", "quick", "vgg11_bn"]
)
def test_every_parameter_is_in_one_layer(name):
    network = models.build(name, num_classes=7)
    layers = layers_of(network, (224, 224, 3))
    params = models.shapes(network, (224, 224, 3))["params"]
    assert sorted(path for layer in layers for path in layer) == paths_of(params)
    assert layers[-1] == ["head/kernel", "head/bias"][: len(layers[-1])]


def ours(names):
    """timm's names of modules as ours: its stages and blocks are counted from 0."""

    def name(theirs):
        for pattern, replacement in names:
            if found := re.match(pattern, theirs):
                return replacement.format(*(int(group) + 1 for group in found.groups()))
        raise AssertionError(theirs)

    return name


BLOCKS = (r"^blocks\.(\d+)", "block{}"), (r"^norm", "norm"), (r"^head", "head")
TIMM = {
    "vit_ti16": (
        "vit_tiny_patch16_224",
        *((f"^{name}", name) for name in ("patch_embed", "cls_token", "pos_embed")),
        *BLOCKS,
    ),
    "mixer_b16": ("mixer_b16_224", ("^stem", "patch_embed"), *BLOCKS),
    "resnet50d": (
        "resnet50d",
        *((rf"^layer{i}\.(\d+)", f"stage{i}_block{{}}") for i in range(1, 5)),
        ("^conv1|^bn1", "stem_conv1"),
        ("^fc", "head"),
    ),
    "convnext_tiny": (
        "convnext_tiny",
        (r"^stem", "stem_conv"),
        (r"^stages\.(\d+)\.downsample", "downsample{}_conv"),
        (r"^stages\.(\d+)\.blocks\.(\d+)", "stage{}_block{}"),
        (r"^head", "head"),  # in timm also the last norm, by its name
    ),
    "swin_t": (
        "swin_tiny_patch4_window7_224",
        (r"^patch_embed", "stem_conv"),
        (r"^layers\.(\d+)\.downsample", "merge{}_norm"),
        (r"^layers\.(\d+)\.blocks\.(\d+)", "stage{}_block{}"),
        *BLOCKS,
    ),
    "efficientnet_lite0": (
        "tf_efficientnet_lite0",
        (r"^conv_stem|^bn1", "stem"),
        (r"^blocks\.(\d+)\.(\d+)", "stage{}_block{}"),
        (r"^conv_head|^bn2", "last"),
        (r"^classifier", "head"),
    ),
}


@pytest.mark.parametrize("name", TIMM)
def test_learning_rates_are_timms(name):
    """Those of `param_groups_layer_decay`, with which MAE and BEiT are fine-tuned."""
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location(
        "references", Path(__file__).with_name("references.py")
    )
    references = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(references)
    reference, *names = TIMM[name]
    module = references.timm().create_model(reference)
    from timm.optim import param_groups_layer_decay

    named = {id(parameter): name for name, parameter in module.named_parameters()}
    expected = {
        ours(names)(named[id(parameter)]): group["lr_scale"]
        for group in param_groups_layer_decay(module, layer_decay=0.75)
        for parameter in group["params"]
    }
    layers = tops(models.build(name, num_classes=1000), (224, 224, 3))
    factors = {top: 0.75**above for above, layer in enumerate(reversed(layers)) for top in layer}
    for top, factor in expected.items():
        assert factors[top] == pytest.approx(factor), top
    assert len(expected) > 10
