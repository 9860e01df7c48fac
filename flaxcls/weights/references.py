"""The networks of PyTorch's libraries that ours are equal to, by the names that these give them."""

from collections.abc import Mapping
from typing import Any

_TORCHVISION = (
    "alexnet",
    *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    "wide_resnet50_2",
    "resnext50_32x4d",
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"efficientnet_b{number}" for number in range(5)),
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "swin_t",
    *(f"convnext_{size}" for size in ("tiny", "small", "base")),
)
_TIMM = {
    "resnet50d": "resnet50d",
    **{f"efficientnet_lite{number}": f"tf_efficientnet_lite{number}" for number in range(5)},
    "mobilenetv4_conv_medium": "mobilenetv4_conv_medium",
    "vit_ti16": "vit_tiny_patch16_224",
    "vit_s16": "vit_small_patch16_224",
    "vit_s32": "vit_small_patch32_224",
    "vit_b16": "vit_base_patch16_224",
    "vit_b32": "vit_base_patch32_224",
    "vit_l16": "vit_large_patch16_224",
    "vit_l32": "vit_large_patch32_224",
    "deit3_s16": "deit3_small_patch16_224",
    "mixer_b16": "mixer_b16_224",
}
_SIZED = ("vit_", "deit3_", "mixer_")  # whose parameters depend on the size of the images
_TRAINING_ONLY = {"name", "dropout", "drop_path", "remat"}


def reference(
    network: Mapping[str, Any], num_classes: int, image_size: int
) -> dict[str, Any] | None:
    """How PyTorch makes the network of config.model; None where no library is known to have it.

    {"library": "torchvision", "name": "resnet18", "options": {"num_classes": 10}}, or "timm" for
    its `create_model`.
    """
    name = network["name"]
    if network.keys() - _TRAINING_ONLY or name not in (*_TORCHVISION, *_TIMM):
        return None
    options = {"num_classes": num_classes}
    if name in _TORCHVISION:
        return {"library": "torchvision", "name": name, "options": options}
    if name.startswith(_SIZED):
        options["img_size"] = image_size
    return {"library": "timm", "name": _TIMM[name], "options": options}
