"""Crops and sizes are torchvision's to the pixel; pixels are Pillow's, or OpenCV's where faster."""

import functools
import io
import math
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from flaxcls.data import decode
from flaxcls.data.transform import (
    TRANSFORMS,
    CenterCrop,
    Pad,
    RandomResizedCrop,
    Resize,
)
from flaxcls.errors import ConfigError

METHODS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "area": Image.Resampling.BOX,
}
SHAPES = [(37, 53), (53, 37), (40, 40), (1, 15), (15, 1), (1, 1), (5, 4), (211, 97)]


class Pixels:
    """Decoded pixels as a picture, which notes how much it was asked to be reduced."""

    def __init__(self, pixels):
        self.whole, self.reductions = pixels, []
        self.height, self.width = pixels.shape[:2]

    def pixels(self, reduction=1):
        self.reductions.append(reduction)
        return self.whole

    def part(self, box):
        top, left, height, width = box
        self.reductions.append(1)
        return self.whole[top : top + height, left : left + width]


def random_pixels(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def photograph(height, width, channels=3):
    """Random pixels with a photograph's spectrum: amplitudes fall with the frequency."""
    rng = np.random.default_rng(1)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    channel = []
    for _ in range(channels):
        noise = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
        plane = np.fft.irfft2(noise / frequency**1.5, (height, width))
        channel.append(128 + 50 * (plane - plane.mean()) / plane.std())
    return np.stack(channel, axis=-1).clip(0, 255).astype(np.uint8)


def to_pillow(pixels):
    return Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])


def to_array(image):
    return np.asarray(image).reshape(image.height, image.width, -1)


def largest(first, second):
    return np.abs(first.astype(np.int32) - second).max()


# The part in the centre.


def shrunk_shape(height, width, short):
    """torchvision.transforms.Resize(int): the shorter side becomes `short`, the other follows."""
    long = int(short * max(height, width) / min(height, width))
    return (short, long) if height <= width else (long, short)


def centre(shape, size):
    """torchvision.transforms.CenterCrop: top and left."""
    return [int(round((side - size) / 2.0)) for side in shape]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("interpolation", METHODS)
@pytest.mark.parametrize("size, ratio", [(24, 0.875), (33, 0.95), (7, 1.0), (60, 0.3), (1, 0.5)])
def test_center_crop_equals_resize_and_crop_by_pillow(size, ratio, interpolation, channels):
    for height, width in SHAPES:
        pixels = random_pixels(height, width, channels)
        transform = CenterCrop(interpolation=interpolation, ratio=ratio)
        shape = shrunk_shape(height, width, int(size / ratio))
        resized = to_pillow(pixels).resize(shape[::-1], METHODS[interpolation])
        top, left = centre(shape, size)
        expected = to_array(resized.crop((left, top, left + size, top + size)))
        np.testing.assert_array_equal(transform(Pixels(pixels), size, []), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size, ratio", [(24, 0.875), (60, 0.3), (1, 0.5)])
def test_center_crop_without_antialiasing_equals_torch(size, ratio, interpolation):
    torch = pytest.importorskip("torch")
    for height, width in SHAPES:
        pixels = random_pixels(height, width)
        transform = CenterCrop(interpolation=interpolation, antialias=False, ratio=ratio)
        shape = shrunk_shape(height, width, int(size / ratio))
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(
            batch, shape, mode=interpolation, align_corners=False, antialias=False
        )[0].permute(1, 2, 0)
        top, left = centre(shape, size)
        expected = resized[top : top + size, left : left + size].clamp(0, 255).numpy()
        # OpenCV's weights have 11 bits; bicubic ones reach beyond 0 and 1.
        assert largest(transform(Pixels(pixels), size, []), expected) <= 2


def test_center_crop_equals_torchvision(torchvision):
    transforms = torchvision.transforms
    for height, width in SHAPES:
        pixels = random_pixels(height, width)
        theirs = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28)])
        expected = to_array(theirs(to_pillow(pixels)))
        np.testing.assert_array_equal(CenterCrop()(Pixels(pixels), 28, []), expected)


# The random part.


def torchvision_box(rng, height, width, area, aspect):
    """torchvision.transforms.RandomResizedCrop.get_params, from its documentation and source."""
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    return torchvision_fallback(height, width, aspect)


def torchvision_fallback(height, width, aspect):
    h, w = height, width
    if width / height < aspect[0]:
        h = round(width / aspect[0])
    elif width / height > aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("shape", [(400, 500), (600, 150)])
@pytest.mark.parametrize("area, aspect", [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.3, 0.6), (0.5, 3.0))])
def test_boxes_are_distributed_as_torchvisions(shape, area, aspect):
    stats = pytest.importorskip("scipy.stats")
    rng, transform = np.random.default_rng(0), RandomResizedCrop(area=area, aspect=aspect)
    ours = np.array([transform.box(*shape, rng.random(24).tolist()) for _ in range(2000)], float)
    theirs = np.array([torchvision_box(rng, *shape, area, aspect) for _ in range(2000)], float)
    for property_of in (
        lambda top, left, height, width: height * width,
        lambda top, left, height, width: width / height,
        lambda top, left, height, width: top / (shape[0] - height + 1),
        lambda top, left, height, width: left / (shape[1] - width + 1),
    ):
        result = stats.ks_2samp(property_of(*ours.T), property_of(*theirs.T))
        assert result.pvalue > 1e-3


def test_boxes_are_distributed_as_those_of_the_installed_torchvision(torchvision):
    transforms = torchvision.transforms
    stats, torch = pytest.importorskip("scipy.stats"), pytest.importorskip("torch")
    torch.manual_seed(0)
    image, transform = Image.new("L", (500, 400)), RandomResizedCrop()
    rng, params = np.random.default_rng(0), transforms.RandomResizedCrop.get_params
    theirs = np.array([params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(2000)])
    ours = np.array([transform.box(400, 500, rng.random(24).tolist()) for _ in range(2000)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3


def test_boxes_lie_inside_pictures_of_any_shape():
    rng = np.random.default_rng(0)
    for _ in range(1000):
        height, width = (int(2 ** rng.uniform(0, 11)) for _ in range(2))
        area = np.sort(rng.uniform(0.001, 1, 2)).tolist()
        aspect = np.sort(np.exp(rng.uniform(np.log(0.01), np.log(100), 2))).tolist()
        for draws in (rng.random(24), np.zeros(24), np.full(24, 1 - 2**-53)):
            transform = RandomResizedCrop(area=tuple(area), aspect=tuple(aspect))
            top, left, tall, wide = transform.box(height, width, draws.tolist())
            assert 0 <= top <= top + tall <= height and tall >= 1
            assert 0 <= left <= left + wide <= width and wide >= 1


@pytest.mark.parametrize("shape", [(1000, 10), (10, 1000), (1, 500), (500, 1), (7, 7)])
def test_shapes_without_a_fitting_part_give_the_largest_in_the_centre(shape):
    transform = RandomResizedCrop(area=(1.0, 1.0), aspect=(2.0, 3.0))
    expected = torchvision_fallback(*shape, (2.0, 3.0))
    top, left, height, width = transform.box(*shape, [0.5] * 24)
    if expected[2] > 0:
        assert (top, left, height, width) == expected
    else:  # torchvision would have failed
        assert (top, left, height, width) == (249, 0, 1, 1)


def test_sixth_attempt_has_its_own_draws():
    draws = [0.999] * 20 + [0.0, 0.999] + [0.5] * 2
    draws[10:12] = [0.5, 0.5]  # a square of half the area; nothing else fits the square picture
    side = round(math.sqrt(100 * 100 * (0.08 + 0.92 * 0.5)))
    assert RandomResizedCrop().box(100, 100, draws) == (0, 100 - side, side, side)


def random_draws(seed):
    return np.random.default_rng(seed).random(24).tolist()


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("interpolation", METHODS)
def test_random_part_equals_crop_and_resize_by_pillow(interpolation, channels):
    transform = RandomResizedCrop(interpolation=interpolation)
    for seed, (height, width) in enumerate(SHAPES * 3):
        pixels = random_pixels(height, width, channels)
        top, left, tall, wide = transform.box(height, width, random_draws(seed))
        part = to_pillow(pixels).crop((left, top, left + wide, top + tall))
        expected = to_array(part.resize((16, 16), METHODS[interpolation]))
        actual = transform(Pixels(pixels), 16, random_draws(seed))
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_part_without_antialiasing_equals_torch(interpolation):
    torch = pytest.importorskip("torch")
    transform = RandomResizedCrop(interpolation=interpolation, antialias=False)
    for seed, (height, width) in enumerate(SHAPES * 3):
        pixels = random_pixels(height, width)
        top, left, tall, wide = transform.box(height, width, random_draws(seed))
        part = torch.from_numpy(pixels[top : top + tall, left : left + wide].copy())
        expected = torch.nn.functional.interpolate(
            part.permute(2, 0, 1)[None].float(), (16, 16), mode=interpolation, align_corners=False
        )[0].permute(1, 2, 0)
        actual = transform(Pixels(pixels), 16, random_draws(seed))
        assert largest(actual, expected.clamp(0, 255).numpy()) <= 2


def covered_means(pixels, size):
    """The mean over the area that a pixel of the result covers, in float64."""

    def weights(length):
        edges = np.linspace(0, length, size + 1)
        begin, end = edges[:-1, None], edges[1:, None]
        cells = np.arange(length)
        overlap = np.minimum(cells + 1, end) - np.maximum(cells, begin)
        return overlap.clip(0) * size / length

    rows, columns = (weights(length) for length in pixels.shape[:2])
    return np.einsum("yh,xw,hwc->yxc", rows, columns, pixels.astype(float))


def test_area_without_antialiasing_is_the_mean_of_what_is_covered():
    for height, width in [(37, 53), (53, 37), (40, 40), (211, 97)]:
        pixels = random_pixels(height, width)
        image = Resize(interpolation="area", antialias=False)(Pixels(pixels), 12, [])
        assert largest(image, covered_means(pixels, 12)) <= 1


# The whole picture.


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("interpolation", METHODS)
@pytest.mark.parametrize("size", [1, 17, 64])
def test_resize_equals_pillow(size, interpolation, channels):
    for height, width in SHAPES:
        pixels = random_pixels(height, width, channels)
        expected = to_pillow(pixels).resize((size, size), METHODS[interpolation])
        actual = Resize(interpolation=interpolation)(Pixels(pixels), size, [])
        np.testing.assert_array_equal(actual, to_array(expected))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [1, 17, 64])
def test_pad_keeps_the_whole_picture_between_borders(size, antialias, channels):
    for height, width in SHAPES:
        pixels = random_pixels(height, width, channels)
        image = Pad(fill=9, antialias=antialias)(Pixels(pixels), size, [])
        tall = max(1, round(size * height / max(height, width)))
        wide = max(1, round(size * width / max(height, width)))
        assert image.shape == (size, size, channels) and size in (tall, wide)
        top, left = (size - tall) // 2, (size - wide) // 2
        inside = np.zeros((size, size), bool)
        inside[top : top + tall, left : left + wide] = True
        assert (image[~inside] == 9).all()
        if antialias:
            expected = to_pillow(pixels).resize((wide, tall), Image.Resampling.BILINEAR)
            np.testing.assert_array_equal(
                image[inside].reshape(tall, wide, channels), to_array(expected)
            )


def test_pictures_of_the_right_size_are_not_changed():
    pixels = random_pixels(20, 20)
    for transform in (Resize(), Resize(antialias=False), Pad(), CenterCrop(ratio=1.0)):
        np.testing.assert_array_equal(transform(Pixels(pixels), 20, []), pixels)
    whole = RandomResizedCrop(area=(1.0, 1.0), aspect=(1.0, 1.0))
    np.testing.assert_array_equal(whole(Pixels(pixels), 20, random_draws(0)), pixels)


# All of them.


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", METHODS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_any_shape_becomes_any_size(name, interpolation, antialias):
    options = {"fill": 200} if name == "pad" else {}
    transform = TRANSFORMS[name](interpolation=interpolation, antialias=antialias, **options)
    draws = random_draws(3)[: transform.draws]
    for channels in (1, 3):
        for shape in (*SHAPES, (3, 700), (700, 3)):
            even = np.broadcast_to(np.uint8(200), (*shape, channels))  # not to be written into
            for size in (1, 2, 9, 48):
                image = transform(Pixels(even), size, draws)
                assert image.shape == (size, size, channels) and image.dtype == np.uint8
                assert (image == 200).all(), (shape, size)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_only_what_is_shrunk_four_times_is_reduced(name):
    transform = TRANSFORMS[name](**({"ratio": 1.0} if name == "center_crop" else {}))
    if name == "random_resized_crop":
        transform = RandomResizedCrop(area=(1.0, 1.0), aspect=(1.0, 1.0))
    reductions = {8: 1, 40: 1, 63: 1, 64: 2, 127: 2, 128: 4, 255: 4, 256: 8, 999: 8}
    for side, reduction in reductions.items():
        picture = Pixels(np.zeros((side, side, 3), np.uint8))
        transform(picture, 16, [0.5] * 24)
        assert picture.reductions == [reduction], side


def test_longer_side_alone_does_not_reduce():
    picture = Pixels(np.zeros((63, 900, 3), np.uint8))
    Resize()(picture, 16, [])
    assert picture.reductions == [1]


@functools.cache
def jpeg(height, width):
    file = io.BytesIO()
    to_pillow(photograph(height, width)).save(file, "JPEG", quality=92)
    return file.getvalue()


@pytest.mark.parametrize(
    "transform, mean, most",
    [
        (RandomResizedCrop(area=(0.9, 1.0)), 0.6, 8),
        (CenterCrop(), 0.6, 8),
        (Pad(), 0.6, 8),
        (Resize(interpolation="bicubic"), 0.6, 8),
        (Resize(interpolation="area", antialias=False), 2, 12),
        # Pillow's box takes whole pixels or none, of which there are fewer.
        (Resize(interpolation="area"), 3, 20),
        # Whoever does without antialiasing gets some of it, and fewer of its artefacts.
        (CenterCrop(antialias=False), 6, 30),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(641, 803), (1201, 907)])
def test_reduced_decoding_is_hardly_seen_in_the_result(transform, mean, most, shape):
    """Against the same transform of the whole decoded picture; in steps of 255."""
    for channels in (3, 1):
        picture = decode.Picture(jpeg(*shape), channels)
        whole = Pixels(decode.decode(jpeg(*shape), channels))
        for size in (32, 64):
            image = transform(picture, size, random_draws(5)).astype(np.int32)
            difference = np.abs(image - transform(whole, size, random_draws(5)))
            assert whole.reductions[-1] >= 2
            assert difference.mean() < mean and difference.max() <= most


def test_picture_that_cannot_be_reduced_is_shrunk_at_once():
    pixels = photograph(300, 400)
    file = io.BytesIO()
    to_pillow(pixels).save(file, "PNG")
    for transform in (Resize(), CenterCrop(), Resize(antialias=False)):
        expected = transform(Pixels(pixels), 16, [])
        image = transform(decode.Picture(file.getvalue(), 3), 16, [])
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("antialias", [True, False])
def test_center_crop_of_a_ribbon_is_that_of_its_middle(antialias):
    """Shrunk whole, a side of 60,000 pixels would become 2,220,000, of 240 MB."""
    transform = CenterCrop(antialias=antialias)
    column = np.arange(60_000) // 235
    expected = np.full((32, 32, 1), 127)
    for pixels in (column[:, None, None], column[None, :, None]):
        tracemalloc.start()
        image = transform(Pixels(np.ascontiguousarray(pixels, np.uint8)), 32, [])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert largest(image, expected) <= 1
        assert peak < 10**6


@pytest.mark.parametrize("option", ["area", "aspect"])
def test_ranges_go_up(option):
    with pytest.raises(ConfigError, match=rf"{option} must be \(low, high\), got \(0.9, 0.5\)"):
        RandomResizedCrop(**{option: (0.9, 0.5)})
