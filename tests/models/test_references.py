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
