"""Augmentation on the device: pure functions of (key, batch), applied to whole batches.

A pipeline is a list of mappings, as in a config:

    [{"name": "pad_crop", "padding": 4}, {"name": "flip"}, {"name": "normalize"},
     {"name": "cutout", "size": 8}]

`normalize` stands for the run's mean and standard deviation; where it is not listed it comes last.
What is listed before it sees images in [0, 255]; what is listed after it sees normalised ones, in
which 0 is the mean.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from flaxcls.augment.base import Augmentation, Batch
from flaxcls.augment.color import ColorJitter, Equalize, Grayscale, Posterize, Solarize, normalize
from flaxcls.augment.geometry import Affine, Flip, PadCrop, Rotation
from flaxcls.augment.mixing import CutMix, Mix, MixUp
from flaxcls.augment.noise import Cutout, GaussianBlur, RandomErasing, SaltAndPepper
from flaxcls.augment.own import own
from flaxcls.augment.policy import (
    AugMix,
    AutoAugment,
    Policy,
    RandAugment,
    ThreeAugment,
    TrivialAugment,
)
from flaxcls.config.options import accepted, look_up
from flaxcls.config.options import check as check_options
from flaxcls.config.user_code import is_path
from flaxcls.errors import ConfigError

__all__ = ["AUGMENTATIONS", "Augmentation", "Batch", "build", "check", "normalize", "split"]

AUGMENTATIONS: dict[str, type[Augmentation]] = {
    "pad_crop": PadCrop,
    "flip": Flip,
    "rotation": Rotation,
    "affine": Affine,
    "color_jitter": ColorJitter,
    "grayscale": Grayscale,
    "solarize": Solarize,
    "posterize": Posterize,
    "equalize": Equalize,
    "gaussian_blur": GaussianBlur,
    "rand_augment": RandAugment,
    "trivial_augment": TrivialAugment,
    "auto_augment": AutoAugment,
    "augmix": AugMix,
    "three_augment": ThreeAugment,
    "salt_and_pepper": SaltAndPepper,
    "random_erasing": RandomErasing,
    "cutout": Cutout,
    "mixup": MixUp,
    "cutmix": CutMix,
    "mix": Mix,
}


def build(
    specs: Sequence[Mapping[str, Any]], *, mean: Sequence[float], std: Sequence[float]
) -> Callable[[jax.Array, Batch], Batch]:
    """The function `(key, batch) -> batch` that applies `specs` in order.

    `mean` and `std` hold one number a channel, in units of [0, 1]. The batch has "image" uint8 or
    float32 [B, H, W, C] in [0, 255], "label" float32 [B, K], "index" and "epoch" int32 [B]; the
    result's images are float32, normalised. The op at position n is keyed by `fold_in(key, n)`.
    Raises `ConfigError` as `check` does.
    """
    if len(mean) != len(std) or not all(value > 0 for value in std):
        raise ConfigError(
            "the normalisation needs as many means as standard deviations, and these above 0, "
            f"got mean {tuple(mean)} and std {tuple(std)}"
        )
    before, after = _parse(specs)

    def augment(key: jax.Array, batch: Batch) -> Batch:
        for position, augmentation in before:
            batch = augmentation(jax.random.fold_in(key, position), batch)
        batch = {**batch, "image": normalize(batch["image"], mean, std)}
        for position, augmentation in after:
            batch = augmentation(jax.random.fold_in(key, position), batch)
        return batch

    return augment


def check(specs: Sequence[Mapping[str, Any]]) -> None:
    """Raises `ConfigError` if `build` could not make a pipeline of `specs`."""
    _parse(specs)


def split(specs: Sequence[Mapping[str, Any]]) -> tuple[tuple[Augmentation, ...], tuple[Any, ...]]:
    """What a host can do of the augmentations `specs`, by `on_host`, and the specs that are left.

    A host does the policies, which devices are bad at, and what has to come before them.
    """
    before = [augmentation for _, augmentation in _parse(specs)[0]]
    first = list(itertools.takewhile(lambda augmentation: augmentation.draws > 0, before))
    while first and not isinstance(first[-1], Policy):
        first.pop()
    return tuple(first), tuple(specs[len(first) :])


Placed = list[tuple[int, Augmentation]]


def _parse(specs: Sequence[Mapping[str, Any]]) -> tuple[Placed, Placed]:
    """The augmentations before and after `normalize`, each with its position in `specs`."""
    before: Placed = []
    after: Placed = []
    normalized = False
    for position, spec in enumerate(specs):
        name, options = _name_and_options(spec, position)
        if name == "normalize":
            if options or normalized:
                problem = "is listed twice" if normalized else f"takes no options, got {options}"
                raise ConfigError(f"config.augment[{position}]: `normalize` {problem}")
            normalized = True
            continue
        where = f"config.augment[{position}]"
        op = look_up(f"{where}.name", name, {**AUGMENTATIONS, "normalize": None})
        options = check_options(where, name, options, accepted(op))
        augmentation = own(name, op, options) if is_path(name) else op(**options)
        augmentation.check_order(normalized)
        (after if normalized else before).append((position, augmentation))
    return before, after


def _name_and_options(spec: Mapping[str, Any], position: int) -> tuple[str, dict[str, Any]]:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise ConfigError(
            f"config.augment[{position}] must be a mapping such as {{'name': 'flip'}}, got {spec!r}"
        )
    options = dict(spec)
    return options.pop("name"), options
