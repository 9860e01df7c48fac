"""TFDS's files are read exactly, from their metadata alone, and without TensorFlow."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from flaxcls.data import open_source, tfrecord
from flaxcls.data import tfds as flaxcls_tfds
from flaxcls.data.loader import materialize
from flaxcls.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_every_example_comes_back_exactly(write_dataset, tmp_path, file_format):
    written = write_dataset(file_format)
    for split, (images, labels) in written.items():
        source = open_source("tiny", split, data_dir=tmp_path)
        read_images, read_labels = materialize(source)
        np.testing.assert_array_equal(read_images, images)
        np.testing.assert_array_equal(read_labels, labels)
        np.testing.assert_array_equal(source.labels(), labels)
        assert source.class_names == ("ant", "bee", "cow")
        assert source.image_shape == (5, 4, 3)
        assert len(source) == len(labels)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
@pytest.mark.parametrize(
    "split, part", [("train[3:-2]", slice(3, -2)), ("train[25%:75%]", slice(3, 10))]
)
def test_a_slice_over_shards_is_the_slice_of_the_whole(
    write_dataset, tmp_path, file_format, split, part
):
    images, labels = write_dataset(file_format)["train"]
    read_images, read_labels = materialize(open_source("tiny", split, data_dir=tmp_path))
    np.testing.assert_array_equal(read_images, images[part])
    np.testing.assert_array_equal(read_labels, labels[part])


def test_sums_of_splits_are_concatenated(write_dataset, tmp_path):
    written = write_dataset()
    read_images, _ = materialize(open_source("tiny", "test[1:]+train[:2]", data_dir=tmp_path))
    expected = np.concatenate([written["test"][0][1:], written["train"][0][:2]])
    np.testing.assert_array_equal(read_images, expected)


def test_bytes_equal_those_of_tfds_own_parser(write_dataset, tmp_path):
    write_dataset()
    source = open_source("tiny", "train", data_dir=tmp_path)
    features = tfds.builder_from_directory(tmp_path / "tiny/1.0.0").info.features
    decoders = {"image": tfds.decode.SkipDecoding()}
    for index in range(len(source)):
        parsed = features.deserialize_example_np(source._records[index], decoders=decoders)
        assert source[index] == (parsed["image"], parsed["label"])


def test_fingerprint_knows_the_data_but_not_the_folder(write_dataset, tmp_path):
    write_dataset()
    shutil.copytree(tmp_path / "tiny", tmp_path / "elsewhere/tiny")

    def fingerprint(split, data_dir=tmp_path):
        return open_source("tiny", split, data_dir=data_dir).fingerprint

    assert fingerprint("train") == fingerprint("train", tmp_path / "elsewhere")
    assert fingerprint("train[:12]") == fingerprint("train[:-1]")
    different = {fingerprint(s) for s in ("train", "test", "train[1:]", "train[:-1]", "all")}
    assert len(different) == 5


def test_data_dir_comes_from_the_environment(write_dataset, tmp_path, monkeypatch):
    write_dataset()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert len(open_source("tiny", "test")) == 5


def test_newest_version_unless_one_is_asked_for(write_dataset, tmp_path):
    for version, size in (("1.9.0", 2), ("1.10.0", 3), ("2.0.0", 4)):
        write_dataset(shards={"train": [size]}, folder=f"tiny/{version}")
    (tmp_path / "tiny/3.0.0").mkdir()  # empty: not prepared
    for name, size in (("tiny", 4), ("tiny:1.*.*", 3), ("tiny:1.9.0", 2)):
        assert len(open_source(name, "train", data_dir=tmp_path)) == size


def test_configs_are_found_by_name_and_named_when_missing(write_dataset, tmp_path):
    write_dataset(shards={"train": [2]}, folder="pets/small/1.0.0")
    write_dataset(shards={"train": [3]}, folder="pets/large/1.0.0")
    assert len(open_source("pets/small", "train", data_dir=tmp_path)) == 2
    assert len(open_source("pets/large:1.0.0", "train", data_dir=tmp_path)) == 3
    with pytest.raises(ConfigError, match="has configs large, small: .* 'pets/large'"):
        open_source("pets", "train", data_dir=tmp_path)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_damaged_shard_is_named(write_dataset, tmp_path, file_format):
    write_dataset(file_format)
    shard = tmp_path / f"tiny/1.0.0/tiny-train.{file_format}-00001-of-00003"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=shard.name):
        open_source("tiny", "train", data_dir=tmp_path)
    assert len(open_source("tiny", "train[:4]", data_dir=tmp_path)) == 4  # another shard
    shard.unlink()
    with pytest.raises(DataError, match=shard.name):
        open_source("tiny", "train", data_dir=tmp_path)


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_a_shard_with_another_number_of_records_is_named(write_dataset, tmp_path, file_format):
    write_dataset(file_format)
    folder = tmp_path / "tiny/1.0.0"
    shards = sorted(folder.glob("tiny-train*"))
    shutil.copy(shards[2], shards[0])
    with pytest.raises(DataError, match=f"{shards[0].name} holds 6 records .* says 4"):
        open_source("tiny", "train", data_dir=tmp_path)


def test_a_record_that_is_not_an_example_is_named(write_dataset, tmp_path):
    write_dataset()
    source = open_source("tiny", "test", data_dir=tmp_path)
    shard = tmp_path / "tiny/1.0.0/tiny-test.tfrecord-00000-of-00001"
    content = bytearray(shard.read_bytes())
    content[12:40] = b"\xff" * 28
    shard.write_bytes(content)
    with pytest.raises(DataError, match="example 0 of tiny 'test' is not a record"):
        source[0]


def test_a_label_outside_the_classes_is_named(write_dataset, tmp_path):
    write_dataset(shards={"test": [3]}, labels=[0, 2, -1])
    with pytest.raises(DataError, match="example 2 of tiny 'test' has label -1, but there are 3"):
        materialize(open_source("tiny", "test", data_dir=tmp_path))


def test_image_and_label_need_no_supervised_keys(write_info):
    info = write_info(
        {
            "kind": tfds.features.ClassLabel(num_classes=2),
            "photo": tfds.features.Image(shape=(None, None, 1)),
        },
        supervised_keys=None,
    )
    assert flaxcls_tfds.image_and_label(info) == ("photo", "kind")


def test_supervised_keys_choose_among_several(write_info):
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "coarse": tfds.features.ClassLabel(num_classes=2),
        "fine": tfds.features.ClassLabel(num_classes=4),
    }
    info = write_info(features, supervised_keys=("image", "fine"))
    assert flaxcls_tfds.image_and_label(info) == ("image", "fine")
    info = write_info(features, supervised_keys=None)
    with pytest.raises(ConfigError, match=r"one image and one class; .*fine \(ClassLabel\)"):
        flaxcls_tfds.image_and_label(info)


def test_images_of_other_types_are_refused(write_info):
    info = write_info(
        {
            "image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16),
            "label": tfds.features.ClassLabel(num_classes=2),
        }
    )
    with pytest.raises(ConfigError, match="uint16"):
        flaxcls_tfds.image_and_label(info)


def test_unknown_split_names_those_that_exist(write_dataset, tmp_path):
    write_dataset()
    with pytest.raises(ConfigError, match="unknown split 'valid'; there is train, test"):
        open_source("tiny", "valid[:10%]", data_dir=tmp_path)


def test_unknown_data_sets_get_a_hint(write_dataset, tmp_path):
    write_dataset()
    for name, message in (
        ("imagenet2021", "unknown data set 'imagenet2021', did you mean 'imagenet2012'"),
        ("tinyy:1.0.0", "did you mean 'tiny'"),
        ("digit", "did you mean 'digits'"),
        ("qqqqqq", "known: digits, fake, folder, idx, list, tiny$"),
        ("not a name", "is not the name of a data set"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(name, "train", data_dir=tmp_path)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A function that copies what is in `tmp_path` to gs://bucket, which is in memory."""

    class Bucket(MemoryFileSystem):
        protocol = ("gcs", "gs")
        store, pseudo_dirs = {}, [""]
        ranges = []  # (begin, end) of what was fetched

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).replace("gs://", "memory://"))

        def cat_file(self, path, start=None, end=None, **_):
            self.ranges.append((start, end))
            return super().cat_file(path, start=start, end=end)

    def copy():
        for path in filter(Path.is_file, tmp_path.rglob("*")):
            Bucket().pipe_file(f"gs://bucket/{path.relative_to(tmp_path)}", path.read_bytes())
        return Bucket

    for protocol in Bucket.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, protocol, Bucket)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    yield copy
    epath.backend.fsspec_backend._get_filesystem.cache_clear()


def test_tfrecord_in_a_bucket_is_read_in_parts(write_dataset, tmp_path, bucket, monkeypatch):
    write_dataset()
    local = open_source("tiny", "train[3:-2]", data_dir=tmp_path)
    files = bucket()
    for _ in range(2):
        source = open_source("tiny", "train[3:-2]", data_dir="gs://bucket")
        assert [source[index] for index in range(8)] == [local[index] for index in range(8)]
        assert source.fingerprint == local.fingerprint
        monkeypatch.setattr(tfrecord, "_scan", None)  # the offsets are kept on this machine
    lengths = [end - start for start, end in files.ranges]
    assert sum(length < 500 for length in lengths) == 16
    assert len(lengths) == 16 + 2 * 2  # and the metadata, twice


def test_replaced_files_in_a_bucket_are_looked_through_again(write_dataset, tmp_path, bucket):
    write_dataset(shards={"test": [3]})
    bucket()
    assert len(open_source("tiny", "test", data_dir="gs://bucket")) == 3
    shard = tmp_path / "tiny/1.0.0/tiny-test.tfrecord-00000-of-00001"
    shard.write_bytes(shard.read_bytes()[:-40])
    bucket()
    with pytest.raises(DataError, match="gs://bucket/tiny/1.0.0/tiny-test.* is cut short"):
        open_source("tiny", "test", data_dir="gs://bucket")


def test_what_cannot_be_read_from_the_cloud_is_a_sentence(
    write_dataset, tmp_path, bucket, monkeypatch
):
    write_dataset()
    write_dataset("array_record", folder="other/1.0.0")
    files = bucket()
    source = open_source("tiny", "train", data_dir="gs://bucket")
    files.store = {}
    with pytest.raises(DataError, match="example 0 of tiny 'train' cannot be read: No such file"):
        source[0]
    with pytest.raises(ConfigError, match="tiny is not in gs://bucket: prepare it in a local"):
        open_source("tiny", "train", data_dir="gs://bucket")
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ConfigError, match="unknown URL scheme: ftp://bucket"):
        open_source("tiny", "train", data_dir="ftp://bucket")
    with pytest.raises(ConfigError, match="s3://bucket cannot be reached: pip install"):
        open_source("tiny", "train", data_dir="s3://bucket")


def test_preparing_failure_is_the_childs_sentence(tmp_path, monkeypatch):
    """A child of this Python without TensorFlow: the modules are hidden, whatever is installed."""
    hide = tmp_path / "hide"
    hide.mkdir()
    (hide / "tensorflow.py").write_text("raise ModuleNotFoundError(\"No module 'tensorflow'\")")
    (hide / "importlib_resources.py").write_text("import tensorflow")
    monkeypatch.setenv("PYTHONPATH", str(hide), prepend=":")
    with pytest.raises(ConfigError, match=r"needs TensorFlow: pip install 'flaxcls\[prepare\]'"):
        open_source("mnist", "train", data_dir=tmp_path)


def test_preparing_errors_of_any_kind_become_one_sentence(tmp_path, monkeypatch):
    class Unreachable:
        def download_and_prepare(self, **_):
            raise OSError("no route to host\nand much more")

    monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: Unreachable())
    with pytest.raises(DataError, match="mnist could not be prepared in .*: no route to host$"):
        flaxcls_tfds.prepare_here("mnist", tmp_path)


def test_preparing_writes_what_can_be_read(tmp_path):
    pytest.importorskip("importlib_resources")

    class Stripes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.3")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(2, 2, 3)),
                "label": tfds.features.ClassLabel(num_classes=2),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                png = cv2.imencode(".png", np.full((2, 2, 3), i, np.uint8))[1].tobytes()
                yield i, {"image": io.BytesIO(png), "label": i % 2}  # an array needs TensorFlow

    flaxcls_tfds.prepare_here("stripes", tmp_path)
    images, labels = materialize(open_source("stripes", "train", data_dir=tmp_path))
    assert sorted(images[:, 0, 0, 0]) == list(range(6))
    np.testing.assert_array_equal(images[:, 0, 0, 0] % 2, labels)
    assert not list(tmp_path.glob("**/*.tfrecord*"))


def test_reading_never_loads_tensorflow(write_dataset, tmp_path):
    write_dataset("tfrecord")
    write_dataset("array_record", folder="tiny/2.0.0")
    program = f"""
import sys
from flaxcls.data import open_source
heavy = {{"cv2", "jax", "sklearn", "tensorflow_datasets", "tensorflow"}}
assert not heavy & set(sys.modules), "importing the module is not light"
from flaxcls.data.loader import materialize
for version in ("1.0.0", "2.0.0"):
    materialize(open_source("tiny:" + version, "train[:50%]", data_dir={str(tmp_path)!r}))
materialize(open_source("digits", "train"))
assert not {{"tensorflow", "sklearn"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_grey_images_keep_one_channel(write_dataset, tmp_path):
    images, _ = write_dataset(channels=1)["train"]
    read_images, _ = materialize(open_source("tiny", "train", data_dir=tmp_path))
    np.testing.assert_array_equal(read_images, images)
