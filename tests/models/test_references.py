"""The networks of torchvision and timm, equal to ours."""

import functools
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


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("efficientnet_b0", "efficientnet_b0"),
        ("efficientnet_lite0", "tf_efficientnet_lite0"),
        ("mobilenet_v3_small", "mobilenet_v3_small"),
        ("mobilenetv4_conv_medium", "mobilenetv4_conv_medium"),
    ],
)
def test_mobile_networks_equal_torchvision_and_timm(name, reference):
    theirs = getattr(references.torchvision_models(), reference, None)
    make = theirs or functools.partial(references.timm().create_model, reference)
    references.compare(name, make(num_classes=7), size=65, train=False)
