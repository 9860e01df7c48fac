"""Examples become images of one size; what can't be read is replaced, counted or named."""

import pickle

import cv2
import numpy as np
import pytest

from flaxcls.data import open_source
from flaxcls.data.loader import Broken, BrokenImages, Loader, materialize
from flaxcls.data.source import Example, Source
from flaxcls.data.transform import CenterCrop, RandomResizedCrop, Resize
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
    return cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


def random_images(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def with_broken(count, broken, shape=(4, 5, 3), **options):
    """A source of PNG files, those at the places `broken` cut short; and all pixels."""
    images = random_images(count, *shape)
    files = [encode(image) for image in images]
    examples = [(f[:30] if i in broken else f, i % 2) for i, f in enumerate(files)]
    return Listed(examples, **options), images


# One example.


def test_encoded_and_decoded_images_are_the_same():
    image = random_images(9, 7, 3)
    for transform in (None, Resize(), CenterCrop(antialias=False)):
        results = [
            Loader(Listed([(data, 1)]), transform)(0, 5, []) for data in (image, encode(image))
        ]
        (array, label), (decoded, _) = results
        np.testing.assert_array_equal(array, decoded)
        assert label == 1 and array.shape == ((5, 5, 3) if transform else (9, 7, 3))


def test_channels_are_those_of_the_source():
    image = random_images(9, 7, 3)
    grey, _ = Loader(Listed([(encode(image), 0)], image_shape=(None, None, 1)))(0)
    expected = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    assert grey.shape == (9, 7, 1)
    assert np.abs(grey[..., 0].astype(int) - expected).max() <= 1


def test_transform_is_given_the_draws():
    loader = Loader(Listed([(random_images(40, 30, 3), 0)]), RandomResizedCrop())
    assert loader.draws == 24 and Loader(Listed([])).draws == 0
    low, high, again = (loader(0, 8, [value] * 24)[0] for value in (0.1, 0.9, 0.1))
    np.testing.assert_array_equal(low, again)
    assert not np.array_equal(low, high)


@pytest.mark.parametrize("label", [-1, 2])
def test_label_out_of_range_is_named(label):
    image = random_images(2, 2, 3)
    with pytest.raises(DataError, match=f"example 1 .* has label {label}, but there are 2 classes"):
        materialize(Listed([(image, 0), (image, label)]))


def test_too_large_pictures_are_refused_by_name():
    loader = Loader(Listed([(encode(random_images(9, 7, 3)), 0)]), max_pixels=62)
    with pytest.raises(DataError, match="example 0 of listed 'train' has 7 x 9 pixels, more than"):
        loader(0)


def test_loader_can_be_sent_to_another_process():
    source = open_source("fake", "train", image_shape=(6, 5, 3), num_examples=4)
    loader = Loader(source, CenterCrop(ratio=0.5), max_pixels=99)
    copy = pickle.loads(pickle.dumps(loader))
    np.testing.assert_array_equal(copy(3, 4, [])[0], loader(3, 4, [])[0])
    assert copy.max_pixels == 99


# Substitutes.


def fill(source, indices, *, substitute=True):
    images = np.zeros((len(indices), 4, 5, 3), np.uint8)
    result = Loader(source).fill(
        images, np.array(indices), np.zeros((len(indices), 0)), substitute=substitute
    )
    return images, *result


def test_next_readable_image_takes_the_place_of_a_broken_one():
    source, pixels = with_broken(8, {2, 3, 7})
    images, taken, labels, broken = fill(source, [2, 0, 7, 3, 2, 5])
    np.testing.assert_array_equal(taken, [4, 0, 0, 4, 4, 5])  # the last one's next is the first
    np.testing.assert_array_equal(images, pixels[taken])
    np.testing.assert_array_equal(labels, taken % 2)
    assert taken.dtype == labels.dtype == np.int32
    # Of a neighbour that was tried and is broken too one hears when it is asked for itself.
    assert [each.index for each in broken] == [2, 7, 3, 2]
    assert broken[1].reason == "example 7 of listed 'train' is not a readable image (30 bytes)"


def test_label_out_of_range_is_never_replaced():
    image = random_images(4, 5, 3)
    with pytest.raises(DataError, match="has label 9"):
        fill(Listed([(image, 0), (image, 9), (image, 1)]), [1])


def test_nothing_is_replaced_where_it_must_not():
    source, _ = with_broken(8, {2})
    with pytest.raises(DataError, match="^example 2 of listed 'train' is not a readable image"):
        fill(source, [1, 2, 3], substitute=False)


@pytest.mark.parametrize("count", [3, 300])
def test_a_split_without_readable_images_ends_in_an_error(count):
    source, _ = with_broken(count, set(range(count)))
    with pytest.raises(DataError, match="not a readable image"):
        fill(source, [1])


def test_broken_images_are_reported_once_until_they_are_too_many():
    said = []
    broken = BrokenImages(1000, 0.003, said.append)
    broken.note([Broken(5, "cat.jpg is bad"), Broken(7, "dog.jpg is bad")])
    broken.note([Broken(7, "dog.jpg is bad"), Broken(5, "cat.jpg is bad"), Broken(8, "x is bad")])
    names = ("cat.jpg", "dog.jpg", "x")
    assert said == [f"{name} is bad; another image replaces it" for name in names]
    message = (
        r"^4 of 1,000 training images can't be read, more than config.input.max_broken = 0.003 "
        r"allows; the last one: y is bad$"
    )
    with pytest.raises(DataError, match=message) as caught:
        broken.note([Broken(9, "y is bad")])
    assert caught.value.exit_code == 45
    assert said[-1].startswith("y is bad")


def test_no_broken_image_is_allowed_at_a_share_of_0():
    with pytest.raises(DataError, match="1 of 10 training images"):
        BrokenImages(10, 0.0, lambda sentence: None).note([Broken(0, "bad")])


# A whole split.


@pytest.mark.parametrize("data", [b"", b"junk", encode(random_images(9, 9, 3), ".jpg")[:40]])
def test_unreadable_image_is_named(data):
    source = Listed([(encode(random_images(9, 9, 3)), 0)] * 3 + [(data, 1)])
    with pytest.raises(DataError, match="example 3 of listed 'train' is not a readable image"):
        materialize(source)


def test_materialize_keeps_the_order_and_reports_progress():
    images = random_images(700, 3, 2, 3)
    calls = []
    source = Listed([(encode(image), n % 2) for n, image in enumerate(images)])
    read, labels = materialize(source, progress=lambda *call: calls.append(call))
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(labels, np.arange(700) % 2)
    assert read.dtype == np.uint8 and labels.dtype == np.int32
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert calls[-1] == (700, 700)


def test_materialize_makes_pictures_of_any_size_equal():
    sizes = [(5, 9), (30, 4), (8, 8), (1, 1)]
    pictures = [random_images(height, width, 3) for height, width in sizes]
    transform = CenterCrop(ratio=0.8)
    images, labels = materialize(Listed([(encode(p), 1) for p in pictures]), transform, 6)
    assert images.shape == (4, 6, 6, 3) and labels.tolist() == [1] * 4
    for image, picture in zip(images, pictures, strict=True):
        expected, _ = Loader(Listed([(picture, 0)]), transform)(0, 6, [])
        np.testing.assert_array_equal(image, expected)


def test_materialize_takes_some_examples_in_the_order_given():
    source, pixels = with_broken(9, {3})
    indices = np.array([8, 0, 5, 0])
    images, labels = materialize(source, indices=indices)
    np.testing.assert_array_equal(images, pixels[indices])
    np.testing.assert_array_equal(labels, indices % 2)


@pytest.mark.parametrize("broken_ones", [{0}, {1, 2}, {8}])
def test_materialize_replaces_broken_images_where_that_is_allowed(broken_ones):
    said = []
    source, pixels = with_broken(9, broken_ones, image_shape=(4, 5, 3))
    allowed = BrokenImages(9, len(broken_ones) / 9, said.append)
    images, labels = materialize(source, broken=allowed)
    expected = [next(j % 9 for j in range(i, 20) if j % 9 not in broken_ones) for i in range(9)]
    np.testing.assert_array_equal(images, pixels[expected])
    np.testing.assert_array_equal(labels, np.array(expected) % 2)
    assert len(said) == len(broken_ones)
    with pytest.raises(DataError, match="1 of 9 training images"):
        materialize(source, broken=BrokenImages(9, 0.01, said.append))


def test_images_of_different_sizes_are_refused():
    examples = [(random_images(2, 2, 3), 0), (random_images(2, 3, 3), 0)]
    message = r"different sizes \(\(2, 2, 3\) and \(2, 3, 3\)\): set config.image_size"
    with pytest.raises(ConfigError, match=message):
        materialize(Listed(examples))


def test_images_of_another_size_than_the_source_says_are_refused():
    with pytest.raises(ConfigError, match=r"\(\(9, 9, 3\) and \(2, 2, 3\)\)"):
        materialize(Listed([(random_images(2, 2, 3), 0)], image_shape=(9, 9, 3)))


def test_what_memory_cannot_hold_is_refused():
    source = Listed([(b"", 0)], image_shape=(10**7, 10**7, 3))
    with pytest.raises(ConfigError, match="too large for memory .* config.input.mode = 'stream'"):
        materialize(source)
