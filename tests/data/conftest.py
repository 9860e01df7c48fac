"""Tiny data sets, prepared as TFDS prepares them, without TensorFlow."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorboardX.record_writer import RecordWriter
from tensorflow_datasets.core import splits as tfds_splits
from tensorflow_datasets.proto import tf_example_pb2


def tiny_images(count: int, channels: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 4, channels), np.uint8)


def dataset_name(folder: Path) -> str:
    """Of tiny/1.0.0 and of tiny/config/1.0.0."""
    return folder.parts[-3] if folder.parts[-2] in ("small", "large") else folder.parts[-2]


def encode_png(image: np.ndarray) -> bytes:
    pixels = image[..., ::-1] if image.shape[-1] == 3 else image
    return cv2.imencode(".png", pixels)[1].tobytes()


def encode_example(image: bytes, label: int, number: int = 0) -> bytes:
    example = tf_example_pb2.Example()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["label"].int64_list.value.append(label)
    example.features.feature["id"].bytes_list.value.append(b"name-%d" % number)
    return example.SerializeToString()


def write_tfrecord(path: Path, records: list[bytes]) -> None:
    writer = RecordWriter(str(path))
    for record in records:
        writer.write(record)
    writer.close()


def write_array_record(path: Path, records: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


WRITERS = {"tfrecord": write_tfrecord, "array_record": write_array_record}


def write_metadata(folder: Path, shard_lengths: dict, file_format: str, **info) -> None:
    """features.json and dataset_info.json, by TFDS itself."""
    info.setdefault("supervised_keys", ("image", "label"))
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=dataset_name(folder), filetype_suffix=file_format
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        split_infos=[
            tfds_splits.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=0, filename_template=template
            )
            for split, lengths in shard_lengths.items()
        ],
        version=folder.name,
        filename_template=template,
        check_data=False,
        **info,
    )


@pytest.fixture
def write_info(tmp_path):
    """Writes the metadata of a data set with these features and returns its DatasetInfo."""

    def write(features: dict, **info):
        folder = tmp_path / "info/1.0.0"
        folder.mkdir(parents=True, exist_ok=True)
        features = tfds.features.FeaturesDict(features)
        (folder / "info-train.tfrecord-00000-of-00001").touch()
        write_metadata(folder, {"train": [1]}, "tfrecord", features=features, **info)
        return tfds.builder_from_directory(folder).info

    return write


@pytest.fixture
def write_dataset(tmp_path):
    """Writes TMP/tiny/1.0.0 and returns its images [N, 5, 4, 3] and labels [N] by split."""

    def write(file_format="tfrecord", shards=None, folder="tiny/1.0.0", labels=None, channels=3):
        shards = shards or {"train": [4, 3, 6], "test": [5]}
        folder = tmp_path / folder
        folder.mkdir(parents=True)
        written = {}
        for seed, (split, lengths) in enumerate(shards.items()):
            images = tiny_images(sum(lengths), channels, seed)
            classes = np.arange(sum(lengths)) % 3 if labels is None else np.array(labels)
            records = [
                encode_example(encode_png(image), int(label), number)
                for number, (image, label) in enumerate(zip(images, classes, strict=True))
            ]
            start = 0
            for shard, length in enumerate(lengths):
                name = f"{dataset_name(folder)}-{split}.{file_format}"
                path = folder / f"{name}-{shard:05d}-of-{len(lengths):05d}"
                WRITERS[file_format](path, records[start : start + length])
                start += length
            written[split] = images, classes
        features = {
            "image": tfds.features.Image(shape=(5, 4, channels), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["ant", "bee", "cow"]),
            "id": tfds.features.Text(),
        }
        write_metadata(folder, shards, file_format, features=tfds.features.FeaturesDict(features))
        return written

    return write
