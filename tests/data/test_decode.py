"""Bytes of every format become the right pixels, or a sentence that names the file."""

import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from flaxcls.data.decode import Picture, decode, read_header
from flaxcls.errors import DataError
from flaxcls.runtime.cores import available_cores

# The decoder silences Pillow; pytest undoes that for every test (see the test of the silence).
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

JPEG_TOLERANCE = 4  # of 255: libjpeg-turbo versions round differently
NOT_IMAGES = {"empty": b"", "text": b"junk", "svg": b"<svg/>", "zip": b"PK\3\4" + bytes(99)}


def photograph(height=37, width=53):
    """A smooth picture, uint8 [H, W, 3], without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + y / 13), np.cos(x / 7 - y / 31), np.sin((x * y) / 300)]
    return (128 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def save(image, kind, second=None, **options):
    """The bytes of a Pillow image or an array as a file of that kind, maybe with a second page."""
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if second:
        options |= {"save_all": True, "append_images": [second.copy()]}
    image.copy().save(file, kind, **options)  # an image remembers settings of its last file
    return file.getvalue()


def opened(data):
    return Image.open(io.BytesIO(data))


RGB = Image.fromarray(photograph())
GREY, PALETTE = RGB.convert("L"), RGB.quantize(50)
RGBA = RGB.copy()
RGBA.putalpha(Image.fromarray(photograph()[..., 1]))
TURNED = RGB.transpose(Image.Transpose.ROTATE_180)

FILES = {
    "jpeg": save(RGB, "JPEG"),
    "jpeg, progressive, all colours": save(RGB, "JPEG", progressive=True, subsampling=0),
    "jpeg, grey": save(GREY, "JPEG"),
    "jpeg, CMYK": save(RGB.convert("CMYK"), "JPEG"),
    "mpo": save(RGB, "MPO", second=TURNED),
    "png": save(RGB, "PNG"),
    "png, grey": save(GREY, "PNG"),
    "png, grey, one transparent": save(GREY, "PNG", transparency=7),
    "png, grey and alpha": save(RGBA.convert("LA"), "PNG"),
    "png, alpha": save(RGBA, "PNG"),
    "png, one transparent": save(RGB, "PNG", transparency=(1, 2, 3)),
    "png, palette": save(PALETTE, "PNG"),
    "png, palette, one transparent": save(PALETTE, "PNG", transparency=3),
    "png, palette, alphas": save(PALETTE, "PNG", transparency=bytes(range(50))),
    "png, 1 bit": save(RGB.convert("1"), "PNG"),
    "webp": save(RGB, "WEBP"),
    "webp, lossless": save(RGB, "WEBP", lossless=True),
    "webp, alpha": save(RGBA, "WEBP", lossless=True, exact=True),
    "bmp": save(RGB, "BMP"),
    "bmp, grey": save(GREY, "BMP"),
    "bmp, 1 bit": save(RGB.convert("1"), "BMP"),
    "bmp, palette": save(PALETTE, "BMP"),
    "gif": save(PALETTE, "GIF"),
    "gif, one transparent": save(PALETTE, "GIF", transparency=3),
    "gif, animated": save(PALETTE, "GIF", second=TURNED),
    "tiff": save(RGB, "TIFF"),
    "tiff, compressed": save(RGB, "TIFF", compression="tiff_lzw"),
    "tiff, jpeg inside": save(RGB, "TIFF", compression="jpeg"),
    "tiff, fax": save(RGB.convert("1"), "TIFF", compression="group4"),
    "tiff, CMYK": save(RGB.convert("CMYK"), "TIFF"),
    "tiff, alpha": save(RGBA, "TIFF"),
    "tiff, pages": save(RGB, "TIFF", second=TURNED),
}


@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (1, "L")])
@pytest.mark.parametrize("name", FILES)
def test_files_are_converted_as_pillow_does(name, channels, mode):
    expected = np.asarray(opened(FILES[name]).convert(mode), np.int32).reshape(37, 53, channels)
    actual = decode(FILES[name], channels)
    assert actual.dtype == np.uint8 and actual.shape == expected.shape
    tolerance = JPEG_TOLERANCE if name in ("mpo", *list(FILES)[:3]) else 0
    assert np.abs(actual - expected).max() <= tolerance
    assert (read_header(FILES[name]).height, read_header(FILES[name]).width) == (37, 53)


def test_lossless_colours_come_in_rgb_order_and_transparency_is_ignored():
    for name in ("png", "png, alpha", "webp, lossless", "webp, alpha", "bmp", "tiff, alpha"):
        np.testing.assert_array_equal(decode(FILES[name], 3), photograph(), err_msg=name)


def test_grey_becomes_three_equal_channels():
    for name in ("png, grey", "png, grey and alpha", "jpeg, grey", "bmp, grey"):
        pixels = decode(FILES[name], 3)
        np.testing.assert_array_equal(pixels, np.repeat(decode(FILES[name], 1), 3, axis=2))


def deep_png(pixels):
    """A PNG file of uint16 [H, W] or [H, W, 3], by OpenCV."""
    return cv2.imencode(".png", pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()


DEEP = np.random.default_rng(0).integers(0, 2**16, (9, 7, 3), np.uint16)


@pytest.mark.parametrize(
    "data, expected",
    [
        (deep_png(DEEP[..., 0]), DEEP[..., :1]),
        (deep_png(DEEP), DEEP),
        (save(DEEP[..., 0], "TIFF"), DEEP[..., :1]),
        (save(DEEP[..., 0].astype(">u2"), "TIFF"), DEEP[..., :1]),
        (cv2.imencode(".tiff", DEEP[..., ::-1])[1].tobytes(), DEEP),
    ],
    ids=["png, grey", "png", "tiff, grey", "tiff, grey, big end first", "tiff"],
)
def test_16_bits_are_scaled_not_clipped(data, expected):
    pixels = decode(data, 3).astype(np.int32)
    assert np.abs(pixels - expected / 257).max() <= 1  # 257 = 65535 / 255
    if expected.shape[2] == 1:
        np.testing.assert_array_equal(decode(data, 1), pixels[..., :1])


# Orientation.


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
def test_exif_orientation_is_applied(kind, orientation):
    data = save(RGB, kind, TURNED if kind == "MPO" else None, exif=exif(orientation))
    expected = np.asarray(ImageOps.exif_transpose(opened(data)), np.int32)
    pixels, header = decode(data, 3), read_header(data)
    assert pixels.shape == expected.shape == (header.height, header.width, 3)
    assert np.abs(pixels - expected).max() <= (JPEG_TOLERANCE if kind in ("JPEG", "MPO") else 0)
    assert pixels.flags.c_contiguous and decode(data, 1).shape == (*expected.shape[:2], 1)


def jpeg_with(*segments):
    """A JPEG file with these APP1 segments, EXIF or not."""
    plain = save(RGB, "JPEG")
    packed = [b"\xff\xe1" + struct.pack(">H", len(each) + 2) + each for each in segments]
    return plain[:2] + b"".join(packed) + plain[2:]


def exif_entry(value, *, kind=3, count=1, order="<"):
    """An EXIF block whose single entry says the orientation in its own way."""
    begin = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, count) + value
    return b"Exif\0\0" + begin + entry + bytes(4)


ODD_EXIF = {
    "garbage": b"Exif\0\0" + bytes(range(60)),
    "nothing": b"Exif\0\0",
    "cut short": exif_entry(b"\6\0\0\0")[:-6],
    "orientation 0": exif_entry(b"\0\0\0\0"),
    "orientation 9": exif_entry(b"\11\0\0\0"),
    "orientation as bytes": exif_entry(b"\6\0\0\0", kind=7),
    "two orientations": exif_entry(b"\6\0\3\0", count=2),
    "more than there is": exif_entry(b"\0\0\1\0", count=5000),
}


@pytest.mark.parametrize("name", ODD_EXIF)
def test_broken_exif_does_not_spoil_the_picture(name):
    data = jpeg_with(ODD_EXIF[name])
    header, pixels = read_header(data), decode(data, 3)
    assert pixels.shape == (header.height, header.width, 3)
    if name != "two orientations":
        np.testing.assert_array_equal(pixels, decode(save(RGB, "JPEG"), 3))


XMP = b"""http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description
xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize(
    "segments",
    [
        (exif_entry(b"\6\0\0\0", kind=4),),
        (exif_entry(b"\0\0\0\6", kind=4, order=">"),),
        (exif_entry(b"\0\6\0\0", order=">"),),
        (XMP,),
        (exif_entry(b"abc\0", kind=2, count=4), XMP),
        (XMP, exif_entry(b"\6\0\0\0")),
        (exif_entry(b"\6\0\0\0"), exif_entry(b"\1\0\0\0")),
    ],
)
def test_pixels_are_turned_as_the_header_says(segments):
    """OpenCV and Pillow find different orientations in some of these."""
    data = jpeg_with(*segments)
    header = read_header(data)
    for reduction in (1, 2):
        pixels = Picture(data, 3).pixels(reduction)
        assert pixels.shape == (-(-header.height // reduction), -(-header.width // reduction), 3)
    upright = save(RGB, "JPEG")
    expected = decode(upright, 3) if header.orientation == 1 else np.rot90(decode(upright, 3), -1)
    np.testing.assert_array_equal(decode(data, 3), expected)


# Reduced decoding.


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_jpeg_is_the_mean_of_what_it_replaces(reduction, channels, orientation):
    image = RGB.resize((381, 289), Image.Resampling.BICUBIC)
    data = save(image, "JPEG", quality=95, exif=exif(orientation))
    pixels = Picture(data, channels).pixels(reduction).astype(np.int32)
    means = opened(data).convert("RGB" if channels == 3 else "L").reduce(reduction)
    if orientation == 6:
        means = means.transpose(Image.Transpose.ROTATE_270)
    difference = np.abs(pixels - np.asarray(means, np.int32).reshape(pixels.shape))
    assert difference.mean() < 1.0 and difference.max() <= 12


@pytest.mark.parametrize("name", ["png", "webp", "gif", "tiff", "jpeg, CMYK"])
def test_what_cannot_be_reduced_comes_whole(name):
    pixels = Picture(FILES[name], 3).pixels(4)
    np.testing.assert_array_equal(pixels, decode(FILES[name], 3))


# Parts. With nvImageCodec a part of a JPEG is decoded alone, without it the whole picture is.


def rough(height=203, width=301):
    noise = np.random.default_rng(0).integers(-40, 40, (height, width, 3))
    smooth = np.asarray(RGB.resize((width, height), Image.Resampling.BICUBIC), np.int32)
    return (smooth + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("JPEG", {}),
        ("JPEG", {"subsampling": 0}),
        ("JPEG", {"subsampling": 1, "progressive": True}),
        ("JPEG", {"restart_marker_blocks": 3, "quality": 30}),
        ("JPEG", {"exif": exif(1)}),
        ("JPEG", {"exif": exif(6)}),
        ("PNG", {}),
    ],
)
@pytest.mark.parametrize("channels", [3, 1])
def test_part_is_a_piece_of_the_whole_to_the_bit(kind, options, channels):
    data = save(rough(), kind, **options)
    whole, random = decode(data, channels), np.random.default_rng(1)
    height, width = whole.shape[:2]
    boxes = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1)]
    for _ in range(12):
        tall, wide = (int(random.integers(1, side + 1)) for side in (height, width))
        top = int(random.integers(height - tall + 1))
        boxes.append((top, int(random.integers(width - wide + 1)), tall, wide))
    for top, left, tall, wide in boxes:
        part = Picture(data, channels).part((top, left, tall, wide))
        np.testing.assert_array_equal(part, whole[top : top + tall, left : left + wide])


@pytest.mark.parametrize("cut", [1, 3, 500, 10_000])
def test_part_of_a_truncated_jpeg_is_refused_wherever_it_lies(cut):
    data = save(rough(), "JPEG")[:-cut]
    for box in ((0, 0, 8, 8), (50, 60, 90, 100), (190, 290, 10, 10)):
        with pytest.raises(DataError, match="^cat is not a readable image"):
            Picture(data, 3, where="cat").part(box)


# What can't be read.


@pytest.mark.parametrize("name", NOT_IMAGES)
def test_what_is_no_image_is_named(name):
    size = len(NOT_IMAGES[name])
    for read in (read_header, lambda data, where: decode(data, 3, where=where)):
        with pytest.raises(DataError, match=rf"^cat.jpg is not a readable image \({size} bytes\)$"):
            read(NOT_IMAGES[name], where="cat.jpg")


@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_named(name):
    data = FILES[name]
    single = {"gif, animated": "gif", "tiff, pages": "tiff", "mpo": "jpeg"}.get(name, name)
    whole = len(FILES[single])  # of several pages the first one is enough
    cuts = {1, 9, 25, *(int(share * whole) for share in (0.1, 0.3, 0.5, 0.7, 0.9))}
    for channels in (3, 1):
        for cut in sorted(cuts):
            with pytest.raises(DataError, match="^cat is not a readable image"):
                decode(data[:cut], channels, where="cat")


def test_truncated_jpeg_is_noticed_at_any_reduction():
    data = save(photograph(300, 400), "JPEG", quality=90)
    for reduction in (1, 2, 4, 8):
        for cut in (2, 3, 10, 1000, len(data) // 2):
            with pytest.raises(DataError, match="not a readable image"):
                Picture(data[:-cut], 3).pixels(reduction)


def chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def bomb(kind):
    """A file of some bytes whose header speaks of 50,000 x 50,000 pixels."""
    if kind == "PNG":
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    place, sides = {
        "BMP": (18, struct.pack("<ii", 50_000, 50_000)),
        "GIF": (6, struct.pack("<HH", 50_000, 50_000)),
        "JPEG": (None, struct.pack(">HH", 50_000, 50_000)),
    }[kind]
    data = save(RGB if kind != "GIF" else PALETTE, kind)
    place = place or data.index(b"\xff\xc0") + 5  # the start of a frame
    return data[:place] + sides + data[place + len(sides) :]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "JPEG"])
def test_pixel_bomb_is_refused_by_its_header(kind, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("it must not be decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    monkeypatch.setattr(cv2, "imdecode", refuse)
    message = (
        "cat.png has 50000 x 50000 pixels, more than the 100,000,000 that config.input.max_pixels "
        "allows"
    )
    with pytest.raises(DataError, match=f"^{message}$"):
        decode(bomb(kind), 3, where="cat.png")
    assert read_header(bomb(kind)).height == 50_000


def test_bomb_within_the_limit_is_unreadable_only():
    for kind in ("PNG", "GIF"):
        with pytest.raises(DataError, match="not a readable image"):
            decode(bomb(kind)[:60], 3, max_pixels=10**12)
    with pytest.raises(DataError, match="not a readable image"):  # beyond OpenCV's own limit
        decode(bomb("JPEG"), 3, max_pixels=10**12)


def test_limit_of_pixels_is_the_last_allowed_number():
    assert decode(FILES["png"], 3, max_pixels=37 * 53).shape == (37, 53, 3)
    with pytest.raises(DataError, match="53 x 37 pixels, more than the 1,960 that"):
        decode(FILES["png"], 3, max_pixels=37 * 53 - 1)


def test_oddities_are_read_in_silence(tmp_path):
    """In a process of its own: pytest catches warnings."""
    names = ("png, palette, alphas", "png, palette, one transparent", "gif, one transparent", "mpo")
    files = [FILES[name] for name in names]
    files += [jpeg_with(block) for block in ODD_EXIF.values()]
    files += [FILES["tiff, compressed"][:1000], FILES["webp"][:60], FILES["png"][:700], bomb("PNG")]
    for number, data in enumerate(files):
        (tmp_path / f"{number:02d}").write_bytes(data)
    program = """
import pathlib, sys
from flaxcls.data.decode import decode
from flaxcls.errors import DataError
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        decode(path.read_bytes(), 3)
    except DataError:
        print(path.name)
"""
    command = [sys.executable, "-W", "always", "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stderr == ""
    broken = [f"{number:02d}" for number in range(len(files) - 4, len(files))]
    assert result.stdout.split() == broken


def test_threads_decode_as_one_does():
    names = list(FILES) * 8
    with ThreadPoolExecutor(8) as threads:
        decoded = list(threads.map(lambda name: decode(FILES[name], 3), names))
    for name, pixels in zip(names, decoded, strict=True):
        np.testing.assert_array_equal(pixels, decode(FILES[name], 3), err_msg=name)


def test_cores_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 8}, raising=False)
    assert available_cores() == 3
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert available_cores() == 1
