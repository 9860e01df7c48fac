"""The networks of torchvision and timm, equal to ours."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "references", Path(__file__).with_name("references.py")
)
references = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(references)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_torchvision(name):
    make = getattr(references.torchvision_models(), name)
    references.compare(name, make(num_classes=7), size=65)


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
