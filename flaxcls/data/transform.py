"""What the host makes of a picture, one at a time: which part, how resampled, how changed.

Sizes and offsets are torchvision's to the pixel. With `antialias` Pillow resamples, which is what
torchvision does to PIL images; without it OpenCV, in a third of the time, as tf.image and
torchvision's tensors without antialiasing.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Annotated, ClassVar, Literal, Protocol

import cv2
import numpy as np
from PIL import Image

from flaxcls.config.options import Range
from flaxcls.errors import ConfigError

_RIBBON = 16  # times as long as wide, or more
_PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
}
_OPENCV = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC, "area": cv2.INTER_AREA}


class Picture(Protocol):
    """What a transform needs to know of a picture: see `flaxcls.data.decode.Picture`."""

    height: int
    width: int

    def pixels(self, reduction: int = 1) -> np.ndarray: ...

    def part(self, box: tuple[int, int, int, int]) -> np.ndarray: ...


class Transform:
    """Base of the transforms: `transform(picture, size, draws)` is uint8 [size, size, C].

    `draws` is how many uniform random numbers it needs, a multiple of 4.
    """

    draws: int = 0

    def __call__(self, picture: Picture, size: int | None, draws: Sequence[float]) -> np.ndarray:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Resampled(Transform):
    """Base of those that resample a part of the picture.

    Attributes:
      interpolation: "bilinear", "bicubic" or "area" (the mean over what a pixel covers; as ffcv).
      antialias: whether the filter grows with the pixels when an image is made smaller. (A JPEG
        that is shrunk more than four times is averaged while it is decoded, in any case.)
    """

    interpolation: Literal["bilinear", "bicubic", "area"] = "bilinear"
    antialias: bool = True

    def _resample(
        self,
        picture: Picture,
        box: tuple[int, int, int, int],
        shape: tuple[int, int],
        window: tuple[int, int, int, int] | None = None,
    ) -> np.ndarray:
        """The box (top, left, height, width) of a picture at `shape`, or a window of that.

        A picture that would have to be shrunk more than four times is decoded at a half, a quarter
        or an eighth of its size: at least twice as large as what it is shrunk to after that.
        """
        *_, height, width = box
        zoom = min(height / shape[0], width / shape[1])
        reduction = next((r for r in (8, 4, 2) if zoom >= 2 * r), 1)
        if reduction == 1 and window is None:
            pixels, box = picture.part(box), (0, 0, height, width)
        else:
            pixels = picture.pixels(reduction)
            if pixels.shape[:2] != (picture.height, picture.width):  # not every format can do it
                box = tuple(side / reduction for side in box)
        if self.antialias:
            image = _by_pillow(pixels, box, shape, _PILLOW[self.interpolation])
        else:
            image = _by_opencv(pixels, box, shape, _OPENCV[self.interpolation])
        if window is None:
            return image
        top, left, height, width = window
        return image[top : top + height, left : left + width]


def _by_pillow(pixels, box, shape, method) -> np.ndarray:
    top, left, height, width = box
    if (top, left) == (0, 0) and pixels.shape[:2] == (height, width) == shape:
        return pixels
    # Beyond the border of the box there is nothing, as if it had been cut out first.
    first_row, first_column = math.floor(top), math.floor(left)
    pixels = pixels[first_row : math.ceil(top + height), first_column : math.ceil(left + width)]
    top, left = top - first_row, left - first_column
    bottom = min(top + height, pixels.shape[0])
    right = min(left + width, pixels.shape[1])
    grey = pixels.shape[2] == 1
    file = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels))
    image = np.asarray(file.resize(shape[::-1], method, box=(left, top, right, bottom)))
    return image[..., None] if grey else image


def _by_opencv(pixels, box, shape, method) -> np.ndarray:
    top, left, height, width = (round(side) for side in box)
    pixels = pixels[top : top + max(height, 1), left : left + max(width, 1)]
    if pixels.shape[:2] != shape:
        pixels = cv2.resize(pixels, shape[::-1], interpolation=method)
    return pixels.reshape(*shape, -1)  # OpenCV drops the axis of a single channel


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(Resampled):
    """A random part of the picture, `area` of it, with its width `aspect` times its height.

    Inception's crop (Szegedy et al. 2014, arXiv:1409.4842), drawn as torchvision does: up to ten
    attempts, then the largest part in the centre whose aspect is allowed.
    """

    draws: ClassVar[int] = 24  # area and aspect of ten attempts, a position, and two to spare
    area: Annotated[tuple[float, float], Range(above=0, at_most=1)] = (0.08, 1.0)
    aspect: Annotated[tuple[float, float], Range(0.01, 100)] = (3 / 4, 4 / 3)

    def __post_init__(self):
        for option in ("area", "aspect"):
            low, high = getattr(self, option)
            if low > high:
                raise ConfigError(f"config.crop.{option} must be (low, high), got ({low}, {high})")

    def __call__(self, picture: Picture, size: int, draws: Sequence[float]) -> np.ndarray:
        return self._resample(picture, self.box(picture.height, picture.width, draws), (size, size))

    def box(self, height: int, width: int, draws: Sequence[float]) -> tuple[int, int, int, int]:
        """Top, left, height and width of the part."""
        least, most = self.area
        low, high = math.log(self.aspect[0]), math.log(self.aspect[1])
        for attempt in range(10):
            area = height * width * (least + (most - least) * draws[2 * attempt])
            aspect = math.exp(low + (high - low) * draws[2 * attempt + 1])
            wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < wide <= width and 0 < tall <= height:
                top = int((height - tall + 1) * draws[20])
                left = int((width - wide + 1) * draws[21])
                return top, left, tall, wide
        aspect = min(max(width / height, self.aspect[0]), self.aspect[1])
        wide = min(width, round(height * aspect))
        tall = min(height, round(width / aspect))
        wide, tall = max(wide, 1), max(tall, 1)
        return (height - tall) // 2, (width - wide) // 2, tall, wide


@dataclasses.dataclass(frozen=True)
class CenterCrop(Resampled):
    """Shrinks the shorter side to size / `ratio` and takes the square in the centre."""

    ratio: Annotated[float, Range(above=0, at_most=1)] = 0.875

    def __call__(self, picture: Picture, size: int, draws: Sequence[float]) -> np.ndarray:
        # Of a picture as long as a ribbon the middle: all of it, resized, could fill the memory.
        height = min(picture.height, _RIBBON * picture.width)
        width = min(picture.width, _RIBBON * picture.height)
        box = (picture.height - height) // 2, (picture.width - width) // 2, height, width
        short = int(size / self.ratio)
        shape = (
            (short, max(short, int(short * width / height)))
            if height <= width
            else (max(short, int(short * height / width)), short)
        )
        top, left = (int(round((side - size) / 2)) for side in shape)
        return self._resample(picture, box, shape, (top, left, size, size))


@dataclasses.dataclass(frozen=True)
class Resize(Resampled):
    """The whole picture, its sides stretched to the square."""

    def __call__(self, picture: Picture, size: int, draws: Sequence[float]) -> np.ndarray:
        return self._resample(picture, (0, 0, picture.height, picture.width), (size, size))


@dataclasses.dataclass(frozen=True)
class Pad(Resampled):
    """The whole picture, its longer side shrunk to the square's, with borders of `fill`."""

    fill: Annotated[int, Range(0, 255)] = 0

    def __call__(self, picture: Picture, size: int, draws: Sequence[float]) -> np.ndarray:
        height, width = picture.height, picture.width
        scale = size / max(height, width)
        tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = self._resample(picture, (0, 0, height, width), (tall, wide))
        image = np.full((size, size, pixels.shape[2]), self.fill, np.uint8)
        top, left = (size - tall) // 2, (size - wide) // 2
        image[top : top + tall, left : left + wide] = pixels
        return image


class Change(Protocol):
    """What is done to an image after that: see `on_host` of `flaxcls.augment.Augmentation`."""

    name: ClassVar[str]
    draws: ClassVar[int]

    def on_host(self, image: np.ndarray, draws: Sequence[float]) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Augmented(Transform):
    """A transform, or none for pictures of one size, and then some changes to the image."""

    transform: Transform | None
    changes: tuple[Change, ...]

    @property
    def draws(self) -> int:
        count = sum(change.draws for change in self.changes)
        return (self.transform.draws if self.transform else 0) + -(-count // 4) * 4

    def __call__(self, picture: Picture, size: int | None, draws: Sequence[float]) -> np.ndarray:
        start = self.transform.draws if self.transform else 0
        image = self.transform(picture, size, draws[:start]) if self.transform else picture.pixels()
        for change in self.changes:
            image = change.on_host(image, draws[start : start + change.draws])
            start += change.draws
        return image


TRANSFORMS: dict[str, Callable[..., Transform]] = {
    "random_resized_crop": RandomResizedCrop,
    "center_crop": CenterCrop,
    "resize": Resize,
    "pad": Pad,
}
