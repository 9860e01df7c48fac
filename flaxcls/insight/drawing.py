"""Pictures of what is found: heat laid over an image, images in a grid, words below them."""

import io
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flaxcls.errors import ConfigError
from flaxcls.files import atomic_write
from flaxcls.runtime.output import printable

TILE = 224  # pixels per side that smaller images are enlarged to, at most
_MARGIN, _LINE = 8, 18  # pixels: around a tile, of a line of text
_FOR, _AGAINST = (
    (255, 150, 30),
    (60, 140, 255),
)  # orange and blue, which the colour-blind tell apart
_BRIGHTEST = 99.5  # the percentile of the heat that is shown as the strongest


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Heat [H, W] over the image, uint8 [H, W, C], in grey: uint8 [H, W, 3].

    Where no heat is below zero the colours are those of matplotlib's inferno, from dark to bright.
    Else orange speaks for the class and blue against it, the stronger the more. Heat is smoothed by
    1 % of the image's longer side. Nothing is coloured where it is zero everywhere.
    """
    if (sigma := max(heat.shape) / 100) >= 1:
        heat = cv2.GaussianBlur(heat, (0, 0), sigma)
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    largest = np.percentile(np.abs(heat), _BRIGHTEST) or np.abs(heat).max() or 1.0
    strength = np.clip(heat / largest, -1, 1)
    if heat.min() < 0:
        opacity = np.abs(strength)[..., None]
        colour = np.where(strength[..., None] > 0, _FOR, _AGAINST)
        grey = grey / 2
    else:
        opacity = 0.7 * np.sqrt(strength)[..., None]
        levels = np.round(strength * 255).astype(np.uint8)
        colour = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]
    return np.round(grey * (1 - opacity) + colour * opacity).astype(np.uint8)


def side_by_side(
    images: Sequence[np.ndarray], captions: Sequence[Sequence[str]], *, columns: int
) -> Image.Image:
    """Images, uint8 [H, W, C] of one size, in rows of so many, each with its lines of text below.

    Small ones are enlarged, a pixel as a square. Text that is too long is cut.
    """
    tiles = [_enlarge(image) for image in images]
    height, width, _ = tiles[0].shape
    font = ImageFont.load_default(14)
    lines = max(map(len, captions))
    across, down = width + _MARGIN, height + lines * _LINE + _MARGIN
    rows = -(-len(tiles) // columns)
    picture = Image.new("RGB", (columns * across + _MARGIN, rows * down + _MARGIN), "white")
    pen = ImageDraw.Draw(picture)
    for number, (tile, texts) in enumerate(zip(tiles, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = _MARGIN + column * across, _MARGIN + row * down
        picture.paste(Image.fromarray(tile), (left, top))
        for line, text in enumerate(texts):
            place = left, top + height + line * _LINE + 2
            pen.text(place, _fitting(printable(text), font, width), "black", font)
    return picture


def save_png(picture: Image.Image, path: Path, flag: str) -> None:
    """Writes a picture as PNG, atomically; ConfigError that names the flag if it can't be."""
    content = io.BytesIO()
    picture.save(content, "PNG")
    try:
        with atomic_write(path) as file:
            file.write(content.getvalue())
    except OSError as error:
        what = f"{printable(path)} of --{flag}"
        raise ConfigError(f"{what} can't be written: {error.strerror or error}") from error


def _enlarge(image: np.ndarray) -> np.ndarray:
    """In colour, and with every pixel a square if the image is small."""
    factor = max(1, TILE // max(image.shape[:2]))
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    return image if image.shape[2] == 3 else image.repeat(3, axis=2)


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut so that it is no wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "..") > width:
        text = text[:-1]
    return text + ".."
