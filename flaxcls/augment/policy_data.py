"""What the policies are made of: the arguments of their ops, and the pairs of AutoAugment.

A function `..._arguments(level, sign, shape)` gives the argument of each op that can be drawn, [B],
for `ops.apply`: from a level [B] in [0, 1], a random sign [B] and the images' (height, width). The
arrays are JAX's or, for `ops.apply_on_host`, NumPy's.
"""

from collections.abc import Sequence
from typing import Any

Arguments = dict[str, Any]


def _warps(level: Any, shear: float, degrees: float, pixels: Sequence[Any]) -> Arguments:
    """`pixels` are those of the translations, by row and by column."""
    down, across = pixels
    return {
        "shear_x": shear * level,
        "shear_y": shear * level,
        "translate_x": across,
        "translate_y": down,
        "rotate": degrees * level,
    }


def _enhancements(factor: Any) -> Arguments:
    return dict.fromkeys(("brightness", "contrast", "color", "sharpness"), factor)


def rand_arguments(level, sign, shape, increasing: bool) -> Arguments:
    """timm's for RandAugment; where not `increasing` they are those of the paper's code."""
    xp = level.__array_namespace__()
    signed = sign * level
    factor, bits, threshold = 0.1 + 1.8 * level, xp.floor(4 * level), xp.floor(256 * level)
    if increasing:
        factor, bits, threshold = xp.maximum(0.1, 1 + 0.9 * signed), 4 - bits, 256 - threshold
    return {
        **_warps(signed, 0.3, 30, [0.45 * side * signed for side in shape]),
        **_enhancements(factor),
        **dict.fromkeys(("invert", "autocontrast", "equalize"), level),
        "posterize": bits,
        "solarize": threshold,
        "solarize_add": xp.floor(110 * level),
    }


def wide_arguments(level, sign, shape) -> Arguments:
    """torchvision's for TrivialAugment."""
    xp = level.__array_namespace__()
    signed = sign * level
    return {
        **_warps(signed, 0.99, 135, [xp.trunc(32 * signed)] * 2),
        **_enhancements(1 + 0.99 * signed),
        **dict.fromkeys(("identity", "autocontrast", "equalize"), level),
        "posterize": 8 - xp.round(6 * level),
        "solarize": 255 * (1 - level),
    }


def auto_arguments(level, sign, shape) -> Arguments:
    """torchvision's for AutoAugment."""
    xp = level.__array_namespace__()
    signed = sign * level
    return {
        **_warps(signed, 0.3, 30, [xp.trunc(150 / 331 * side * signed) for side in shape]),
        **_enhancements(1 + 0.9 * signed),
        **dict.fromkeys(("invert", "autocontrast", "equalize"), level),
        "posterize": 8 - xp.round(4 * level),
        "solarize": 255 * (1 - level),
    }


def augmix_arguments(level, sign, shape) -> Arguments:
    """Those of the code of AugMix."""
    xp = level.__array_namespace__()
    signed = sign * level
    return {
        **_warps(signed, 0.3, 30, [xp.trunc(side / 3 * signed) for side in shape]),
        **dict.fromkeys(("autocontrast", "equalize"), level),
        "rotate": xp.trunc(30 * signed),
        "posterize": 4 - xp.floor(4 * level),
        "solarize": 256 - xp.floor(256 * level),
    }


# The sub-policies: two ops each, with their probability and magnitude.
AUTO_AUGMENT = {
    "imagenet": (
        (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
        (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
        (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
        (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
        (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
        (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
        (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
        (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
        (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
        (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
        (("rotate", 0.8, 8), ("color", 0.4, 0)),
        (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
        (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
        (("invert", 0.6, 4), ("equalize", 1.0, 8)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("rotate", 0.8, 8), ("color", 1.0, 2)),
        (("color", 0.8, 8), ("solarize", 0.8, 7)),
        (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
        (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
        (("color", 0.4, 0), ("equalize", 0.6, 3)),
        (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
        (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
        (("invert", 0.6, 4), ("equalize", 1.0, 8)),
        (("color", 0.6, 4), ("contrast", 1.0, 8)),
        (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    ),
    "cifar10": (
        (("invert", 0.1, 7), ("contrast", 0.2, 6)),
        (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
        (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
        (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
        (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
        (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
        (("color", 0.4, 3), ("brightness", 0.6, 7)),
        (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
        (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
        (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
        (("color", 0.7, 7), ("translate_x", 0.5, 8)),
        (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
        (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
        (("brightness", 0.9, 6), ("color", 0.2, 8)),
        (("solarize", 0.5, 2), ("invert", 0.0, 3)),
        (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
        (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
        (("color", 0.9, 9), ("equalize", 0.6, 6)),
        (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
        (("brightness", 0.1, 3), ("color", 0.7, 0)),
        (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
        (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
        (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
        (("equalize", 0.8, 8), ("invert", 0.1, 3)),
        (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
    ),
}
