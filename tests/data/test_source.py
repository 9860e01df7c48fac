"""Splits mean what they mean in TFDS; digits and fake data are what they claim, for ever."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from flaxcls.data import open_source
from flaxcls.data.embedded import digits_splits, read_digits
from flaxcls.data.loader import materialize
from flaxcls.data.source import Slice, resolve_split
from flaxcls.errors import ConfigError

SHARDS = {"train": [500, 497], "test": [100]}


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("train", [("train", 0, 997)]),
        ("test", [("test", 0, 100)]),
        ("train[:90%]", [("train", 0, 897)]),
        ("train[90%:]", [("train", 897, 997)]),
        ("train[10%:20%]", [("train", 100, 199)]),
        ("train[100:-50]", [("train", 100, 947)]),
        ("train[-10%:]", [("train", 897, 997)]),
        ("train[-1:]", [("train", 996, 997)]),
        ("train[:0.5%]", [("train", 0, 5)]),
        ("train[1shard]", [("train", 500, 997)]),
        ("train[:10]+test[90:]", [("train", 0, 10), ("test", 90, 100)]),
        ("train + test", [("train", 0, 997), ("test", 0, 100)]),
        ("all", [("train", 0, 997), ("test", 0, 100)]),
    ],
)
def test_splits_follow_tfds(spec, expected):
    assert resolve_split(spec, SHARDS) == [Slice(*part) for part in expected]


def test_percentages_partition_a_split():
    parts = [resolve_split(f"train[{p}%:{p + 7}%]", SHARDS)[0] for p in range(0, 98, 7)]
    parts += resolve_split("train[98%:]", SHARDS)
    assert parts[0].start == 0 and parts[-1].stop == 997
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:], strict=False))


@pytest.mark.parametrize(
    "spec, message",
    [
        ("valid", "unknown split 'valid'; there is train, test"),
        ("train+valid[:5]", "unknown split 'valid'; there is train, test"),
        ("train[:0]", r"split 'train\[:0\]' is empty: 'train' has 997 examples"),
        ("train[7:7]", "is empty"),
        ("train[7:3]", "is empty"),
        ("test+train[50%:20%]", "is empty"),
        ("train[:101%]", "percent slice boundaries should be in"),
        ("train[998:]", "incompatible with 997 examples"),
        ("train[a:b]", "Unrecognized split format"),
        ("train[5]", "only support slice syntax"),
        ("all[:5%]", "does not support slice"),
        ("", "unknown split ''"),
    ],
)
def test_impossible_splits_are_refused_in_a_sentence(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_split(spec, SHARDS)
    assert "\n" not in str(caught.value)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    images, labels = read_digits()
    expected = load_digits()
    np.testing.assert_array_equal(labels, expected.target)
    np.testing.assert_array_equal(images[..., 0], np.round(expected.images * 255 / 16))
    assert images.max() == 255 and images.dtype == np.uint8


def test_digits_split_is_stratified_complete_and_fixed():
    _, labels = read_digits()
    splits = digits_splits(labels)
    assert (len(splits["train"]), len(splits["test"])) == (1437, 360)
    together = np.concatenate([splits["train"], splits["test"]])
    np.testing.assert_array_equal(np.sort(together), np.arange(1797))
    share = np.bincount(labels[splits["test"]]) / np.bincount(labels)
    assert share.min() > 0.19 and share.max() < 0.21
    digest = hashlib.sha256(splits["test"].astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == "386a49efd904a993"


def test_digits_slices_and_fingerprints():
    train = open_source("digits", "train")
    held_out = open_source("digits", "train[80%:]")
    assert (len(train), len(held_out)) == (1437, 1437 - 1150)
    image, label = held_out[3]
    np.testing.assert_array_equal(image, train[1153].image)
    assert label == train.labels()[1153]
    assert train.image_shape == (8, 8, 1) and train.class_names == tuple("0123456789")
    assert train.fingerprint == "f66b3a5b986f9381"
    assert train.fingerprint != held_out.fingerprint
    assert open_source("digits", "train[:1437]").fingerprint == train.fingerprint


def test_fake_images_depend_on_their_split_and_index_alone():
    options = {"image_shape": (9, 7, 3), "num_classes": 4, "num_examples": 20}
    train = open_source("fake", "train", **options)
    tail = open_source("fake", "train[12:]+test[:2]", **options)
    assert len(train) == 20 and len(open_source("fake", "test", **options)) == 5
    for index in range(8):
        np.testing.assert_array_equal(tail[index].image, train[12 + index].image)
        assert tail[index].label == train[12 + index].label == (12 + index) % 4
    assert not np.array_equal(tail[8].image, train[0].image)  # test's first, another image
    np.testing.assert_array_equal(
        tail.labels(), [e.label for e in map(tail.__getitem__, range(10))]
    )
    assert train[0].image.shape == (9, 7, 3) and train[0].image.dtype == np.uint8


def test_fake_images_are_the_same_in_every_process():
    images, _ = materialize(open_source("fake", "train", image_shape=(5, 3, 1), num_examples=8))
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "a2c862d2aee0f878"


def test_fake_classes_can_be_told_apart():
    options = {"image_shape": (8, 8, 3), "num_classes": 5, "num_examples": 200}
    images, labels = materialize(open_source("fake", "train", **options))
    test_images, test_labels = materialize(open_source("fake", "test", **options))
    centres = np.stack([images[labels == label].mean(axis=0) for label in range(5)])
    distances = ((test_images[:, None] - centres) ** 2).sum(axis=(2, 3, 4))
    np.testing.assert_array_equal(distances.argmin(axis=1), test_labels)


def test_fake_fingerprint_follows_every_option():
    options = {"image_shape": (8, 8, 3), "num_classes": 5, "num_examples": 20}
    changes = [{}, {"image_shape": (8, 8, 1)}, {"num_classes": 4}, {"num_examples": 21}]
    found = {open_source("fake", "train", **{**options, **c}).fingerprint for c in changes}
    assert len(found) == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_shape": (8, 8)}, "`image_shape` of fake data must be"),
        ({"image_shape": (8, 0, 3)}, "`image_shape` of fake data must be"),
        ({"image_shape": (8, 8, 4)}, "`image_shape` of fake data must be"),
        ({"num_classes": 0}, "`num_classes` of fake data must be at least 1, got 0"),
        ({"num_examples": 0}, "`num_examples` of fake data must be at least 1, got 0"),
    ],
)
def test_impossible_fake_data_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        open_source("fake", "train", **options)


def test_embedded_data_load_nothing_heavy():
    program = """
import sys
from flaxcls.data import open_source
open_source("digits", "train"), open_source("fake", "test")
heavy = {"cv2", "jax", "sklearn", "tensorflow_datasets", "tensorflow"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", program], check=True)
