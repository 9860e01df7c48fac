"""Encoded bytes to uint8 pixels, on the host: JPEG by OpenCV, all else by Pillow.

OpenCV is the faster one for JPEG and releases Python's lock; Pillow reads the headers, and every
other format as torchvision's users know it.
"""

import io
import threading
import warnings
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from flaxcls.data.region import decode_region, load_codec
from flaxcls.errors import DataError

MAX_PIXELS = 100_000_000  # of a picture; more is taken for a mistake or an attack
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # JPEG finds MPO, a kind of it, as well
_ORIENTATION = 0x0112  # EXIF's tag: 1 is upright, 5 to 8 lie on their side
_RGB = cv2.IMREAD_COLOR_RGB
_REDUCED = {  # by channels and what height and width are divided by
    3: {1: _RGB, 2: 16 | _RGB, 4: 32 | _RGB, 8: 64 | _RGB},
    1: {
        1: cv2.IMREAD_GRAYSCALE,
        2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
        4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
        8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
    },
}


_is_set_up, _lock = False, threading.Lock()


def set_up() -> None:
    """Makes OpenCV and Pillow, in this process, what decoding needs; once, before the first one."""
    global _is_set_up
    if _is_set_up:
        return
    with _lock:
        if not _is_set_up:
            cv2.setNumThreads(1)  # the threads are ours: one image each
            Image.init()  # loads the formats' readers, which is not safe in threads
            Image.MAX_IMAGE_PIXELS = None  # `max_pixels` is the limit, and says which file it was
            # About what is odd in a file: what is wrong raises an error.
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
            load_codec()
            _is_set_up = True


class Header(NamedTuple):
    """What a file says of itself before it is decoded; height and width as a viewer shows them."""

    format: str  # "JPEG", "PNG", ...
    mode: str  # Pillow's: "RGB", "L", "CMYK", "P", "I;16", ...
    height: int
    width: int
    orientation: int  # EXIF's; 1 is upright


def read_header(image: bytes, *, where: str = "an image") -> Header:
    """Reads format and size without decoding, in some 20 microseconds.

    Raises:
      DataError: not an image; the sentence begins with `where`.
    """
    return _header(_open(image, where))


def decode(
    image: bytes, channels: int, *, where: str = "an image", max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """A file's bytes as uint8 [H, W, 3] in RGB order, or grey [H, W, 1].

    Reads JPEG, PNG, WebP, BMP, GIF (the first frame) and TIFF; grey, palette, CMYK and 16-bit
    pictures are converted, transparency is ignored, EXIF's orientation is applied.

    Raises:
      DataError: not an image, one cut short, or one of more than `max_pixels`, which is refused
        before it is decoded; the sentence begins with `where`.
    """
    return Picture(image, channels, where=where, max_pixels=max_pixels).pixels()


class Picture:
    """An encoded picture: its size at once, its pixels when they are asked for.

    Raises DataError as `decode` does.

    Attributes:
      header: what the file says of itself.
      height, width: as a viewer shows the picture.
      is_grey: whether the file has no colours, rather than equal ones.
    """

    def __init__(
        self, image: bytes, channels: int, *, where: str = "an image", max_pixels: int = MAX_PIXELS
    ):
        self._bytes, self._channels, self._where = image, channels, where
        self._file = _open(image, where)
        self.header = _header(self._file)
        self.height, self.width = self.header.height, self.header.width
        self.is_grey = self.header.mode in ("1", "L", "LA") or self.header.mode.startswith("I")
        if self.height * self.width > max_pixels:
            raise DataError(
                f"{where} has {self.width} x {self.height} pixels, more than the "
                f"{max_pixels:,} that config.input.max_pixels allows"
            )

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """The whole picture, uint8 [H, W, C]; of a JPEG 1/2, 1/4 or 1/8 of it, on request.

        A reduced JPEG is averaged while it is decoded, in a fraction of the time. Its sides are
        divided by `reduction` and rounded up; other formats come in their own size.
        """
        if self.header.format in ("JPEG", "MPO") and self.header.mode in ("RGB", "L"):
            pixels = self._pixels_by_opencv(reduction)
        else:
            pixels = self._pixels_by_pillow()
        pixels = _upright(pixels, self.header.orientation)
        return pixels.reshape(*pixels.shape[:2], self._channels)

    def part(self, box: tuple[int, int, int, int]) -> np.ndarray:
        """The pixels of a box (top, left, height, width) of the picture."""
        upright = self.header.orientation == 1
        if self._channels == 3 and self.header[:2] == ("JPEG", "RGB") and upright:
            pixels = decode_region(self._bytes, box)
            if pixels is not None:
                return pixels
        top, left, height, width = box
        return self.pixels()[top : top + height, left : left + width]

    def _pixels_by_opencv(self, reduction: int) -> np.ndarray:
        # It reads EXIF in its own way: turned by that, a picture could contradict its header.
        flags = _REDUCED[self._channels][reduction] | cv2.IMREAD_IGNORE_ORIENTATION
        try:
            pixels = cv2.imdecode(np.frombuffer(self._bytes, np.uint8), flags)
        except cv2.error as error:
            raise _unreadable(self._where, self._bytes) from error
        if pixels is None:
            raise _unreadable(self._where, self._bytes)
        return pixels

    def _pixels_by_pillow(self) -> np.ndarray:
        try:
            file = self._file
            if file.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
                file = Image.fromarray((np.asarray(file) >> 8).clip(0, 255).astype(np.uint8))
            return np.asarray(file.convert("RGB" if self._channels == 3 else "L"))
        except Exception as error:  # whatever a codec does to broken bytes
            raise _unreadable(self._where, self._bytes) from error


def _open(image: bytes, where: str) -> Image.Image:
    set_up()
    try:
        return Image.open(io.BytesIO(image), formats=_FORMATS)
    except Exception as error:  # whatever a parser does to broken bytes
        raise _unreadable(where, image) from error


def _header(file: Image.Image) -> Header:
    width, height = file.size
    orientation = 1
    if "exif" in file.info:
        try:
            orientation = file.getexif().get(_ORIENTATION, 1)
        except Exception:  # a broken EXIF block does not spoil the picture
            orientation = 1
    if orientation in (5, 6, 7, 8):
        width, height = height, width
    elif orientation not in (2, 3, 4):
        orientation = 1
    return Header(file.format or "", file.mode, height, width, orientation)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Pixels as stored, turned as EXIF's orientation asks."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def _unreadable(where: str, image: bytes) -> DataError:
    return DataError(f"{where} is not a readable image ({len(image)} bytes)")


def stretch(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels, uint8 [H, W, C], at another size, for networks whose pictures need no transform."""
    if pixels.shape[:2] == (height, width):
        return pixels
    grey = pixels.shape[2] == 1
    file = Image.fromarray(pixels[..., 0] if grey else pixels)
    resized = np.asarray(file.resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if grey else resized
