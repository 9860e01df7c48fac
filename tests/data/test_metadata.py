"""Metadata and lists that are damaged, or made to do harm, end in a sentence with the file."""

import json
import os
import pickle
import struct
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flaxcls.data import metadata, open_source
from flaxcls.errors import DataError, FlaxclsError

NAMES = (metadata.INFO, metadata.FEATURES)
few = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def dataset(write_dataset, tmp_path, monkeypatch):
    """The folder of a data set that is whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_dataset(shards={"train": [4, 3], "test": [2]})
    return tmp_path / "tiny/1.0.0"


def open_tiny(dataset, split="train", name="tiny"):
    return open_source(name, split, data_dir=dataset.parents[1])


EVIL = """
import pathlib
pathlib.Path({marker!r}).touch()
from tensorflow_datasets.core.features import Text


class Thing(Text):
    pass
"""
# Ways in which a features.json can name a class: TFDS's today, the older ones, and text in text.
WAYS = {
    "a feature": lambda name: {"pythonClassName": name, "text": {}},
    "as protobuf calls it": lambda name: {"python_class_name": name, "text": {}},
    "in a sequence": lambda name: {
        "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
        "sequence": {"feature": {"pythonClassName": name, "text": {}}},
    },
    "in text": lambda name: {
        "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
        "jsonFeature": {
            "json": json.dumps({"feature": {"type": name, "content": {}}, "length": None})
        },
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_no_module_that_features_name_is_imported(dataset, tmp_path, monkeypatch, way):
    marker = tmp_path / "marker"
    (tmp_path / "evilmod.py").write_text(EVIL.format(marker=str(marker)))
    monkeypatch.syspath_prepend(tmp_path)
    features = json.loads((dataset / metadata.FEATURES).read_text())
    features["featuresDict"]["features"]["note"] = WAYS[way]("evilmod.Thing")
    (dataset / metadata.FEATURES).write_text(json.dumps(features))
    with pytest.raises(DataError, match="features.json names a feature class .*: evilmod.Thing$"):
        open_tiny(dataset)
    assert not marker.exists() and "evilmod" not in sys.modules


def test_modules_of_tfds_that_hold_no_feature_are_not_imported_either(dataset):
    features = json.loads((dataset / metadata.FEATURES).read_text())
    name = "tensorflow_datasets.core.features.image_feature_test.Thing"
    legacy = {"type": name, "content": features}
    (dataset / metadata.FEATURES).write_text(json.dumps(legacy))
    with pytest.raises(DataError, match=f"features.json names a feature class .*: {name}$"):
        open_tiny(dataset)


def test_all_of_tfds_own_features_are_read(dataset):
    import tensorflow_datasets as tfds

    every = {
        "image": tfds.features.Image(shape=(5, 4, 3)),
        "label": tfds.features.ClassLabel(names=["ant", "bee", "cow"]),
        "box": tfds.features.BBoxFeature(),
        "boxes": tfds.features.Sequence({"box": tfds.features.BBoxFeature(), "type": np.int64}),
        "number": np.float32,
        "tensor": tfds.features.Tensor(shape=(None, 2), dtype=np.uint8),
        "nested": {"type": tfds.features.Text(), "content": tfds.features.Text()},
        "mask": tfds.features.LabeledImage(labels=2, shape=(5, 4, 1)),
        "rows": tfds.features.Dataset({"a": np.int32}),
    }
    tfds.features.FeaturesDict(every).save_config(str(dataset))
    assert len(open_tiny(dataset)) == 7


DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[]",
    "a number": lambda content: b"7",
    "no UTF-8": lambda content: b'{"name": "caf\xe9"}',
    "no JSON": lambda content: b"\x89PNG",
    "too deep": lambda content: b'{"a":' * 100_000,
    "another object": lambda content: b'{"a": 1}',
}


@pytest.mark.parametrize("name", NAMES)
def test_damaged_metadata_are_named(dataset, name):
    whole = (dataset / name).read_bytes()
    for damage in DAMAGE.values():
        (dataset / name).write_bytes(damage(whole))
        with pytest.raises(DataError, match=f"{dataset}.*{name}") as caught:
            open_tiny(dataset)
        assert "\n" not in str(caught.value)
    (dataset / name).unlink()
    os.mkfifo(dataset / name)
    with pytest.raises(DataError, match=f"{name} cannot be read: it is a pipe, not a file"):
        open_tiny(dataset)


def test_missing_metadata_are_named_and_labels_that_are_others(dataset):
    labels = dataset / "label.labels.txt"
    for content in (b"ant\nbee\n", b"ant\nant\ncow\n", b"ant\nb\xe9\xe9\ncow\n"):
        labels.write_bytes(content)
        with pytest.raises(DataError, match="label.labels.txt (is damaged|cannot be read)"):
            open_tiny(dataset)
    labels.write_text("ant\n\x1b[31mbee\ncow\n")
    assert open_tiny(dataset).class_names == ("ant", "\\x1b[31mbee", "cow")
    (dataset / metadata.INFO).unlink()
    with pytest.raises(DataError, match="dataset_info.json cannot be read: No such file"):
        open_tiny(dataset)


def test_a_damaged_default_config_is_named(dataset):
    place = dataset.parent / ".config/metadata.json"
    place.parent.mkdir()
    for content in ("{", "[]"):
        place.write_text(content)
        with pytest.raises(DataError, match=".config/metadata.json is damaged"):
            open_tiny(dataset)


def test_real_process_ends_with_the_code_of_data(dataset, run_main):
    (dataset / metadata.FEATURES).write_text("{")
    result = run_main(
        "check",
        "--source=tiny",
        f"--config.data.dir={dataset.parents[1]}",
        module="flaxcls.data",
    )
    assert result.returncode == 45
    assert result.stderr.count("\n") == 1
    assert f"flaxcls: {dataset}/features.json is damaged: it is not JSON" in result.stderr


def npy(header: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


@pytest.mark.parametrize(
    "content",
    [
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000000,), }\n"),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': (100000000,), }\n", b"\0" * 80),
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", pickle.dumps([1])),
        npy("(" * 9000),
        npy("{'descr': '<i8', 'fortran_order': False, 'shape': -1, }\n"),
        pickle.dumps(np.arange(9)),
    ],
)
def test_an_index_that_claims_anything_is_made_again(dataset, content):
    expected = [open_tiny(dataset)[index] for index in range(7)]
    place = dataset / ".tiny-train.tfrecord-00000-of-00002.offsets.npy"
    whole = place.read_bytes()
    place.write_bytes(content)
    assert [open_tiny(dataset)[index] for index in range(7)] == expected
    assert place.read_bytes() == whole


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "0", "-1", "train", "99999999999999999999", "{", "tfrecord", "{}"])
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(value, path=()):
    """The paths of everything in a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children if isinstance(value, (dict, list)) else ():
        yield from places(child, (*path, key))


@pytest.mark.parametrize("name", NAMES)
def test_metadata_with_anything_in_any_place_are_read_or_refused(dataset, name):
    whole = json.loads((dataset / name).read_text())
    paths = [path for path in places(whole) if path]

    @few
    @given(st.data())
    def check(data):
        changed = json.loads(json.dumps(whole))
        for _ in range(data.draw(st.integers(1, 2))):
            *parents, last = data.draw(st.sampled_from(paths))
            value = changed
            try:
                for key in parents:
                    value = value[key]
                if data.draw(st.booleans()):
                    del value[last]
                else:
                    value[last] = data.draw(JSON)
            except (LookupError, TypeError):
                continue  # the first change has taken the place of the second
        (dataset / name).write_text(json.dumps(changed))
        read_or_refuse(lambda: open_tiny(dataset))

    check()


@pytest.mark.parametrize(
    "name", [*NAMES, "label.labels.txt", ".tiny-test.tfrecord-00000-of-00001.offsets.npy"]
)
def test_files_with_any_bytes_changed_are_read_or_refused(dataset, name):
    open_tiny(dataset, "test")
    whole = (dataset / name).read_bytes()

    @few
    @given(changes(whole))
    def check(content):
        (dataset / name).write_bytes(content)
        read_or_refuse(lambda: open_tiny(dataset, "test"))

    check()


def changes(whole: bytes):
    """Some bytes in place of others."""
    place = st.integers(0, len(whole))
    return st.builds(
        lambda begin, length, new: whole[:begin] + new + whole[begin + length :],
        place,
        st.integers(0, 20) | place,
        st.binary(max_size=20),
    )


LISTS = {
    "list.csv": "path,label,split\n" + "".join(f"{n}.jpg,{n % 2},train\n" for n in range(4)),
    "other.csv": "".join(f"{n}.jpg;{'ab'[n % 2]}\n" for n in range(4)),
    "list.jsonl": "".join(
        json.dumps({"path": f"{n}.jpg", "label": n % 2, "split": "train"}) + "\n" for n in range(4)
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_with_any_bytes_changed_are_read_or_refused(tmp_path, name):
    path = tmp_path / name

    @settings(few, max_examples=200)
    @given(changes(LISTS[name].encode()) | st.binary(max_size=60))
    @example(b",")
    @example(b"[" * 100_000)
    @example(b'{"path": "a.jpg", "label": ' + b"9" * 5000 + b"}")
    def check(content):
        path.write_bytes(content)
        read_or_refuse(lambda: open_source("list", "train", path=str(path)))

    check()


def read_or_refuse(function):
    """Whatever comes of it, it is a source or a sentence of one line that can be printed."""
    try:
        function()
    except FlaxclsError as error:
        assert str(error).encode() and len(str(error).splitlines()) == 1, str(error)
