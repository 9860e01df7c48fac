"""What is timed: a recipe's training step on made-up images, and the peer that does the same work.

To add a network, add a line; torch_step.py must know the peer's name, if it has one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Workload(NamedTuple):
    """A recipe of configs/ at one size.

    Attributes:
      image_size: height and width of the images on the device, uint8, 3 channels.
      steps: of a round, some seconds of work.
      gmacs: billions of multiplications of one image's forward pass, of which an update takes
        three times as many.
      peer: torchvision's network, or None where no peer has the recipe's step.
      overrides: what differs from the recipe, by field.
    """

    recipe: str
    image_size: int
    num_classes: int
    batch_size: int
    steps: int
    gmacs: float
    peer: str | None = None
    overrides: Mapping[str, Any] = {}


_BATCH_OF_256 = ("imagenet_resnet50", 224, 1000, 256, 20)


def _network(name: str, gmacs: float, peer: str, **options: Any) -> Workload:
    """A network in imagenet_resnet50's step: SGD, flips."""
    model = {"name": name, "zero_init_residual": None, **options}
    overrides = {f"model.{option}": value for option, value in model.items()}
    return Workload(*_BATCH_OF_256, gmacs, peer, overrides)


_A3 = (
    "imagenet_resnet50_a3",
    160,
    1000,
    1024,
    10,
    2.09,
)  # the recipe's batch is 2048, on several GPUs

WORKLOADS = {
    "resnet50": Workload(*_BATCH_OF_256, 4.09, "resnet50"),
    "vit_s16": _network("vit_s16", 4.6, "vit_small_patch16_224"),
    "vit_b16": _network("vit_b16", 17.6, "vit_base_patch16_224"),
    "convnext_tiny": _network("convnext_tiny", 4.46, "convnext_tiny"),
    "efficientnet_b0": _network("efficientnet_b0", 0.39, "efficientnet_b0"),
    "cifar_resnet18_128": Workload("cifar10_resnet18", 32, 10, 128, 200, 0.556, "cifar_resnet18"),
    "cifar_resnet18_1024": Workload("cifar10_resnet18", 32, 10, 1024, 50, 0.556, "cifar_resnet18"),
    "resnet50_a3": Workload(*_A3),
    "resnet50_a3_without_augmentation": Workload(*_A3, overrides={"augment": ()}),
    "resnet50_fast_160": Workload("imagenet_resnet50_fast", 160, 1000, 1024, 10, 2.09),
    "resnet50_fast_192": Workload("imagenet_resnet50_fast", 192, 1000, 1024, 10, 3.0),
}

# By the start of a device's name: dense bfloat16 operations a second, from the makers' data sheets.
PEAK_FLOPS = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12}


def tiny(workload: Workload) -> Workload:
    """The same on a size that a CPU does in seconds: the kit runs, and times nothing real."""
    return workload._replace(image_size=32, num_classes=10, batch_size=4, steps=2)
