"""Bytes become the right pixels, and whole splits arrive complete or with a sentence."""

import cv2
import numpy as np
import pytest

from flaxcls.data.decode import decode, materialize
from flaxcls.data.source import Example, Source
from flaxcls.errors import ConfigError, DataError


class Listed(Source):
    """A list of examples as a source."""

    def __init__(self, examples, image_shape=(None, None, 3)):
        super().__init__(
            name="listed",
            split="train",
            class_names=["a", "b"],
            image_shape=image_shape,
            fingerprint="",
        )
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return Example(*self.examples[index])


def encode(image, suffix=".png"):
    return cv2.imencode(suffix, image)[1].tobytes()


def random_image(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_channels_come_in_rgb_order():
    image = np.zeros((2, 3, 3), np.uint8)
    image[..., 0] = 200  # OpenCV writes blue first
    np.testing.assert_array_equal(decode(encode(image), 3)[0, 0], [0, 0, 200])


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_lossless_formats_are_exact(suffix):
    image = random_image(5, 7, 3)
    np.testing.assert_array_equal(decode(encode(image, suffix), 3), image[..., ::-1])
    np.testing.assert_array_equal(decode(encode(image[..., :1]), 1), image[..., :1])


def test_jpeg_equals_pillow():
    PIL = pytest.importorskip("PIL.Image")
    import io

    data = encode(cv2.GaussianBlur(random_image(40, 30, 3), (9, 9), 4), ".jpg")
    expected = np.asarray(PIL.open(io.BytesIO(data)).convert("RGB"), np.int32)
    assert np.abs(decode(data, 3) - expected).max() <= 4  # libjpeg-turbo versions differ a little


def test_grey_files_become_colour_and_back():
    grey = random_image(4, 4, 1)
    np.testing.assert_array_equal(decode(encode(grey), 3), np.repeat(grey, 3, axis=2))
    colour = np.repeat(grey, 3, axis=2)
    np.testing.assert_array_equal(decode(encode(colour), 1), grey)


@pytest.mark.parametrize("data", [b"", b"junk", encode(random_image(9, 9, 3), ".jpg")[:40]])
def test_unreadable_image_is_named(data):
    source = Listed([(encode(random_image(9, 9, 3)), 0)] * 3 + [(data, 1)])
    with pytest.raises(DataError, match="example 3 of listed 'train' is not a readable image"):
        materialize(source)


def test_materialize_keeps_the_order_and_reports_progress():
    images = random_image(700, 3, 2, 3)
    calls = []
    source = Listed([(encode(image[..., ::-1]), n % 2) for n, image in enumerate(images)])
    read, labels = materialize(source, progress=lambda *call: calls.append(call))
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(labels, np.arange(700) % 2)
    assert read.dtype == np.uint8 and labels.dtype == np.int32
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (700, 700)


@pytest.mark.parametrize("label", [-1, 2])
def test_label_out_of_range_is_named(label):
    image = random_image(2, 2, 3)
    with pytest.raises(DataError, match=f"example 1 .* has label {label}, but there are 2 classes"):
        materialize(Listed([(image, 0), (image, label)]))


def test_images_of_different_sizes_are_refused():
    examples = [(random_image(2, 2, 3), 0), (random_image(2, 3, 3), 0)]
    with pytest.raises(ConfigError, match="different sizes .* streaming input"):
        materialize(Listed(examples))


def test_what_memory_cannot_hold_is_refused():
    class Huge(Listed):
        def __len__(self):
            return 10**13

    with pytest.raises(ConfigError, match="too large for memory .* streaming input"):
        materialize(Huge([(random_image(64, 64, 3), 0)]))
