"""The networks of torchvision and timm, equal to ours."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from flaxcls.models.resnet import BottleneckBlock, ResNeXtBlock
from flaxcls.weights.resampling import adapt_channels, resample_positions

pytestmark = pytest.mark.slow
# Large ones of a family whose smaller members are compared always: by `pytest -m torture`.
torture = pytest.mark.torture

_spec = importlib.util.spec_from_file_location(
    "references", Path(__file__).with_name("references.py")
)
references = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(references)


def torch_networks():
    """torchvision.models and torch.nn."""
    return references.torchvision_models(), pytest.importorskip("torch").nn


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=torture)])
def test_equals_torchvision(name):
    make = getattr(references.torchvision_models(), name)
    references.compare(name, make(num_classes=7), size=65)


@pytest.mark.torture
def test_wide_bottlenecks_of_groups_equal_torchvision():
    resnet = references.torchvision_models().resnet
    reference = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], 7, groups=32, width_per_group=4)
    name, options = "flaxcls.models.resnet:ResNet", {"block": ResNeXtBlock}
    references.compare(name, reference, size=33, stage_sizes=(1, 1, 1, 1), **options)


def test_deep_stem_and_pooled_shortcut_equal_timm():
    resnet = references.timm().models.resnet
    reference = resnet.ResNet(
        resnet.Bottleneck, (1, 1, 1, 1), 7, stem_width=32, stem_type="deep", avg_down=True
    )
    options = {"stem": "deep", "pooled_shortcut": True}
    options |= {"stage_sizes": (1, 1, 1, 1), "block": BottleneckBlock}
    references.compare("flaxcls.models.resnet:ResNet", reference, size=39, **options)


def test_alexnet_equals_torchvision():
    library, nn = torch_networks()
    reference = library.alexnet(num_classes=7)
    reference.classifier[1], reference.classifier[4] = nn.Linear(256 * 36, 8), nn.Linear(8, 8)
    reference.classifier[6] = nn.Linear(8, 7)
    references.compare("alexnet", reference, size=97, hidden=8, dropout=0.0)


def test_cifar_alexnet_is_that_of_torchvision_with_smaller_pools():
    library, nn = torch_networks()
    reference = library.alexnet(num_classes=7)
    reference.features[0] = nn.Conv2d(3, 64, 11, stride=4, padding=5)
    for pool in (2, 5, 12):
        reference.features[pool] = nn.MaxPool2d(2)
    reference.avgpool, reference.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(256, 7)
    references.compare("cifar_alexnet", reference, size=33)


@pytest.mark.parametrize(("norm", "pool_size"), [(False, 7), (True, 1)])
def test_vgg_equals_torchvision(norm, pool_size):
    library, nn = torch_networks()
    widths = [64, "M", 128, "M", 256, 256, "M", 512, "M", 512, "M"]
    reference = library.VGG(library.vgg.make_layers(widths, batch_norm=norm), 7, False)
    reference.avgpool = nn.AdaptiveAvgPool2d(pool_size)
    layers = (nn.Linear(512 * pool_size**2, 8), nn.Linear(8, 8), nn.Linear(8, 7))
    reference.classifier[0], reference.classifier[3], reference.classifier[6] = layers
    options = {"stage_sizes": (1, 1, 2, 1, 1), "norm": norm, "pool_size": pool_size}
    name = "flaxcls.models.vgg:VGG"
    references.compare(name, reference, size=67, hidden=8, dropout=0.0, **options)


def test_densenet_equals_torchvision():
    reference = references.torchvision_models().DenseNet(8, (2, 3, 2, 1), 16, num_classes=7)
    options = {"block_sizes": (2, 3, 2, 1), "growth": 8, "stem_width": 16}
    references.compare("flaxcls.models.densenet:DenseNet", reference, size=67, **options)


def test_densenet_bc_is_that_of_torchvision_with_another_stem():
    library, nn = torch_networks()
    reference = library.DenseNet(8, (2, 2, 2), 16, num_classes=7)
    reference.features.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    for layer in ("norm0", "relu0", "pool0"):
        delattr(reference.features, layer)
    references.compare("densenet_bc", reference, size=33, depth=16, growth=8)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        pytest.param("efficientnet_b0", "efficientnet_b0", marks=torture),
        ("efficientnet_lite0", "tf_efficientnet_lite0"),
        ("mobilenet_v3_small", "mobilenet_v3_small"),
        pytest.param("mobilenetv4_conv_medium", "mobilenetv4_conv_medium", marks=torture),
    ],
)
def test_mobile_networks_equal_torchvision_and_timm(name, reference):
    theirs = getattr(references.torchvision_models(), reference, None)
    make = theirs or functools.partial(references.timm().create_model, reference)
    references.compare(name, make(num_classes=7), size=65, train=False)


VIT = {"depth": 2, "width": 64, "heads": 4, "patch": 8}
AVERAGE = {"class_token": False, "global_pool": "avg", "fc_norm": False}


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"remat": True}, {}),
        ({"registers": 3}, {"reg_tokens": 3}),
        (
            {"pool": "average", "registers": 2, "no_embed_class": True, "layer_scale": 0.1},
            {**AVERAGE, "reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
        ),
    ],
)
def test_vit_equals_timm(options, theirs):
    make = references.timm().models.VisionTransformer
    reference = make(
        img_size=40, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=7, **theirs
    )
    references.compare("vit", reference, size=40, **VIT, **options)


@torture
def test_deit3_equals_timm():
    make = references.timm().create_model
    reference = make("deit3_small_patch16_224", num_classes=7, img_size=48)
    references.compare("deit3_s16", reference, size=48, train=False)


def test_mixer_equals_timm():
    make = references.timm().models.MlpMixer
    reference = make(num_classes=7, img_size=40, patch_size=8, num_blocks=2, embed_dim=64)
    references.compare("mixer", reference, size=40, patch=8, width=64, depth=2)


def test_convnext_equals_torchvision():
    library = references.torchvision_models().convnext
    stages = [(16, 32, 2), (32, 64, 1), (64, None, 1)]
    stages = [library.CNBlockConfig(*stage) for stage in stages]
    reference = library.ConvNeXt(stages, num_classes=7)
    references.compare("convnext", reference, size=37, width=16, depths=(2, 1, 1))


def test_swin_equals_torchvision():
    make = references.torchvision_models().SwinTransformer
    reference = make([4, 4], 16, [2, 2], [2, 4], [3, 3], num_classes=7, stochastic_depth_prob=0.0)
    options = {"width": 16, "depths": (2, 2), "head_width": 8, "window": 3}
    references.compare("swin", reference, size=45, **options)


def test_resampling_equals_timm():
    timm = references.timm()
    embedding = np.random.default_rng(0).normal(size=(1, 1 + 14 * 14, 5)).astype(np.float32)
    for rows, columns in ((7, 7), (16, 16), (24, 12), (14, 14), (15, 3)):
        expected = timm.layers.resample_abs_pos_embed(
            references.torch.from_numpy(embedding), [rows, columns]
        )
        ours = resample_positions(embedding, rows, columns, 1)
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-5)


def test_adapting_channels_equals_timm():
    timm = references.timm()
    kernel = np.random.default_rng(0).normal(size=(3, 5, 3, 4)).astype(np.float32)
    for channels in (1, 2, 3, 4, 7):
        expected = timm.models.adapt_input_conv(
            channels, references.torch.from_numpy(kernel.transpose(3, 2, 0, 1))
        )
        ours = adapt_channels(kernel, channels).transpose(3, 2, 0, 1)
        np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)
