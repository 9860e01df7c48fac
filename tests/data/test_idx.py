"""MNIST's files are read as a reader of their definition reads them, and damage is named."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from flaxcls.data import idx, open_source
from flaxcls.errors import ConfigError, DataError

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist


def write(path: Path, values: np.ndarray, compressed: bool = False) -> None:
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    content += values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if compressed else content)


@pytest.fixture
def written(tmp_path):
    """Images [N, 4, 3] and labels [N] by split, of which test's files are compressed."""
    random = np.random.default_rng(0)
    splits = {}
    for split, prefix, count in (("train", "train", 20), ("test", "t10k", 7)):
        images = random.integers(0, 256, (count, 4, 3), np.uint8)
        labels = random.integers(0, 10, count, np.uint8)
        ending = "" if split == "train" else ".gz"
        write(tmp_path / f"{prefix}-images-idx3-ubyte{ending}", images, bool(ending))
        write(tmp_path / f"{prefix}-labels-idx1-ubyte{ending}", labels, bool(ending))
        splits[split] = images, labels
    return splits


def open_idx(path, split="train"):
    return open_source("idx", split, path=str(path))


def test_every_image_comes_back_exactly(written, tmp_path):
    for split, (images, labels) in written.items():
        source = open_idx(tmp_path, split)
        assert len(source) == len(labels)
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            np.testing.assert_array_equal(source[index].image, image[..., None])
            assert source[index].label == label
        np.testing.assert_array_equal(source.labels(), labels)
        assert source.labels().dtype == np.int32
        assert source.image_shape == (4, 3, 1)
        assert source.class_names == tuple("0123456789")


def test_a_reader_by_hand_agrees(written, tmp_path):
    content = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    assert content[:16] == bytes([0, 0, 8, 3, 0, 0, 0, 20, 0, 0, 0, 4, 0, 0, 0, 3])
    images = np.frombuffer(content, np.uint8, offset=16).reshape(20, 4, 3, 1)
    np.testing.assert_array_equal(open_idx(tmp_path)[19].image, images[19])


def test_slices_sums_and_other_names_of_test(written, tmp_path):
    source = open_idx(tmp_path, "validation[5:]+train[:3]")
    expected = np.concatenate([written["test"][1][5:], written["train"][1][:3]])
    np.testing.assert_array_equal(source.labels(), expected)
    with pytest.raises(ConfigError, match="unknown split 'dev'; there is train, test"):
        open_idx(tmp_path, "dev")


def test_only_the_files_of_the_split_are_needed_by_either_name(written, tmp_path):
    for path in tmp_path.glob("t10k*"):
        path.unlink()
    for path in tmp_path.glob("train*"):
        path.rename(str(path).replace("-idx", ".idx"))
    assert len(open_idx(tmp_path)) == 20
    with pytest.raises(ConfigError, match=r"has no t10k-images-idx3-ubyte, compressed \(.gz\) or"):
        open_idx(tmp_path, "test")


def test_fingerprint_follows_the_content(written, tmp_path):
    before = open_idx(tmp_path).fingerprint
    (tmp_path / "copy").mkdir()
    images, labels = written["train"]
    write(tmp_path / "copy/train-images-idx3-ubyte.gz", images, compressed=True)
    write(tmp_path / "copy/train-labels-idx1-ubyte", labels)
    assert open_idx(tmp_path / "copy").fingerprint == before
    write(tmp_path / "copy/train-labels-idx1-ubyte", (labels + 1) % 10)
    assert open_idx(tmp_path / "copy").fingerprint != before


@pytest.mark.parametrize(
    "file, damage, message",
    [
        ("train-images-idx3-ubyte", lambda c: c[:-1], "damaged: 255 bytes where .* says 256"),
        ("train-images-idx3-ubyte", lambda c: c + b"x", "damaged: 257 bytes where"),
        ("train-images-idx3-ubyte", lambda c: c[:10], "not an IDX file of bytes with 3 dimensions"),
        ("train-images-idx3-ubyte", lambda c: b"", "not an IDX file"),
        ("train-images-idx3-ubyte", lambda c: b"\0\0\r\3" + c[4:], "not an IDX file"),  # floats
        ("train-images-idx3-ubyte", lambda c: b"\0\0\b\1" + c[4:], "not an IDX file"),
        (
            "train-labels-idx1-ubyte",
            lambda c: b"\0\0\b\1\0\0\0\2ab",
            "20 train images but 2 labels",
        ),
        ("t10k-images-idx3-ubyte.gz", lambda c: c[:-9], "cannot be read: Compressed file ended"),
        ("t10k-images-idx3-ubyte.gz", lambda c: c[:20] + b"?" + c[21:], "cannot be read: "),
    ],
)
def test_damaged_and_foreign_files_are_named(written, tmp_path, file, damage, message):
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(damage(content))
    with pytest.raises(DataError, match=message):
        open_idx(tmp_path, "train" if "train" in file else "test")


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "nowhere"):
        with pytest.raises(ConfigError, match=f"must be a folder of IDX files, got .*{name}"):
            open_idx(tmp_path / name)


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_known_by_its_labels():
    for split, count in (("train", 60_000), ("test", 10_000)):
        source = open_idx(FASHION, split)
        assert len(source) == count and source.image_shape == (28, 28, 1)
        np.testing.assert_array_equal(np.bincount(source.labels()), [count // 10] * 10)
        assert source.class_names[0] == "T-shirt/top" and source.class_names[9] == "Ankle boot"


def test_fashion_mnist_is_known_by_all_its_labels(written, tmp_path, monkeypatch):
    digests = [hashlib.sha256(labels.tobytes()).hexdigest() for _, labels in written.values()]
    monkeypatch.setattr(idx, "_FASHION_LABELS", digests)
    assert open_idx(tmp_path, "all").class_names[9] == "Ankle boot"
    monkeypatch.setattr(idx, "_FASHION_LABELS", digests[:1])
    assert open_idx(tmp_path).class_names[9] == "Ankle boot"
    assert open_idx(tmp_path, "test").class_names[9] == "9"
