"""TFDS's data sets, by name, without TensorFlow.

A prepared data set is read from its files alone: TFDS's metadata say what is in them, and records
are reached at random in both of its formats. TensorFlow is needed only to prepare some data sets,
which `python -m flaxcls.data.tfds prepare NAME DIR` does in a process of its own.
"""

import contextlib
import difflib
import errno
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import dataset_builder, naming
from tensorflow_datasets.core.utils import version as versions
from tensorflow_datasets.proto import tf_example_pb2

from flaxcls import remote
from flaxcls.data import metadata
from flaxcls.data.array_record import RemoteArrayRecords
from flaxcls.data.source import Example, Source, fingerprint, resolve_split
from flaxcls.data.storage import data_error, is_remote, size_and_version
from flaxcls.data.tfrecord import FilePart, TfRecords, check_count
from flaxcls.errors import ConfigError, DataError, FlaxclsError, did_you_mean
from flaxcls.runtime.output import printable, say


def open_prepared(
    name: str, split: str, data_dir: str | Path | None, others: Iterable[str] = ()
) -> "TfdsSource":
    """Opens a data set, after preparing it where that hasn't been done.

    `others` are the names of data sets that are not TFDS's, for those who misspell one.
    """
    root = _data_root(data_dir)
    if is_remote(root):
        return _open_remote(name, split, root)
    directory = find_prepared(name, root)
    if directory is None:
        prepare(name, root, others)
        directory = find_prepared(name, root)
    if directory is None:
        raise DataError(f"{name} was prepared in {root}, but is not there")
    return TfdsSource(name, split, directory)


def is_prepared(name: str, data_dir: str | Path | None) -> bool:
    """Whether a data set is in the folder, or in the cloud, which is asked when it is opened."""
    root = _data_root(data_dir)
    return is_remote(root) or find_prepared(name, root) is not None


def _data_root(data_dir: str | Path | None) -> epath.Path:
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        return epath.Path(root).expanduser()
    except KeyError as error:
        raise ConfigError(f"`data_dir` has an unknown URL scheme: {root}") from error


def _open_remote(name: str, split: str, root: epath.Path) -> "TfdsSource":
    """Opens a data set that is in the cloud, whatever goes wrong there."""
    os.environ.setdefault("EPATH_USE_TF", "false")  # else etils loads TensorFlow where it finds it
    path = os.fspath(root)
    try:
        remote.forget_listings(path)  # and says what is not installed
        directory = find_prepared(name, root)
        if directory is not None:
            return TfdsSource(name, split, directory)
    except FlaxclsError:
        raise
    except Exception as error:  # every cloud's client has its own
        found = remote.os_error(path, error)
        what = f"{name} in {root} cannot be read"
        if found.errno == errno.EACCES:
            raise ConfigError(f"{what}: {found.strerror}") from error
        raise data_error(what, found) from error
    raise ConfigError(
        f"{name} is not in {root}: prepare it in a local folder and copy it there, or write it "
        f"there by `python -m flaxcls.data prepare --out={root}`"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


class TfdsSource(Source):
    """A split of a prepared data set: the folder with dataset_info.json and features.json."""

    def __init__(self, name: str, split: str, directory: epath.PathLike):
        info = metadata.read_info(directory)
        self._image_key, self._label_key = image_and_label(info)
        feature = info.features[self._image_key]
        try:
            slices = resolve_split(
                split, {key: list(value.shard_lengths) for key, value in info.splits.items()}
            )
            parts = [
                part
                for piece in slices
                for part in info.splits[tfds.core.ReadInstruction(*piece)].file_instructions
            ]
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise metadata.damaged(directory, error) from error
        self._records = _open_records(parts, info.file_format.value)
        self.is_remote = any(is_remote(part.filename) for part in parts)
        super().__init__(
            name=name,
            split=split,
            class_names=metadata.class_names(info, directory, self._label_key),
            image_shape=tuple(feature.shape),
            fingerprint=fingerprint(
                name=info.full_name,
                slices=slices,
                files=_names_and_sizes(parts),
            ),
            splits=info.splits,
        )

    def __len__(self) -> int:
        return len(self._records)

    def verify(self, index: int) -> None:
        if isinstance(self._records, TfRecords):  # ARRAY_RECORD's reader does it itself
            try:
                self._records.verify(index)
            except OSError as error:
                raise data_error(f"{self.where(index)} cannot be read", error) from error

    def __getitem__(self, index: int) -> Example:
        # Seven times as fast as the features' own deserialize_example_np, which converts all.
        try:
            record = tf_example_pb2.Example.FromString(self._records[index])
            features = record.features.feature
            (image,) = features[self._image_key].bytes_list.value
            (label,) = features[self._label_key].int64_list.value
        except (DecodeError, ValueError) as error:
            raise DataError(f"{self.where(index)} is not a record of image and label") from error
        except OSError as error:
            raise data_error(f"{self.where(index)} cannot be read", error) from error
        except RuntimeError as error:  # ARRAY_RECORD's checksums
            raise DataError(f"{self.where(index)} cannot be read: {error}") from error
        return Example(image, label)


def image_and_label(info: tfds.core.DatasetInfo) -> tuple[str, str]:
    """The names of the image's and the class's feature: the supervised keys, else the only ones.

    Raises:
      ConfigError: not one of each, or an image that is not uint8 with 1 or 3 channels.
    """
    features = info.features
    for keys in (info.supervised_keys or (), tuple(features)):
        present = [key for key in keys if isinstance(key, str) and key in features]
        images = [key for key in present if isinstance(features[key], tfds.features.Image)]
        labels = [key for key in present if isinstance(features[key], tfds.features.ClassLabel)]
        if len(images) == len(labels) == 1:
            break
    else:
        found = ", ".join(f"{key} ({type(value).__name__})" for key, value in features.items())
        raise ConfigError(f"{info.name} does not have one image and one class; it has: {found}")
    image = features[images[0]]
    if image.np_dtype != "uint8" or image.shape[-1] not in (1, 3):
        raise ConfigError(
            f"images must be uint8 with 1 or 3 channels; those of {info.name} are "
            f"{image.np_dtype} of shape {image.shape}"
        )
    return images[0], labels[0]


def _open_records(parts: Sequence[FilePart], file_format: str) -> Any:
    """The records of the parts as a sequence of bytes."""
    if file_format == "tfrecord":
        return TfRecords(parts)
    if file_format != "array_record":
        raise ConfigError(
            f"files of format {file_format} are not read; prepare the data set as array_record"
        )
    if any(is_remote(part.filename) for part in parts):
        return RemoteArrayRecords(parts)
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(_check_array_record, parts))
    return ArrayRecordDataSource(parts)


def _check_array_record(part: FilePart) -> None:
    from array_record.python.array_record_module import ArrayRecordReader

    try:  # the reader calls a missing file empty, as it does any damaged one
        size_and_version(part.filename)
    except OSError as error:
        raise DataError(f"{part.filename} cannot be read: {error.strerror}") from error
    reader = ArrayRecordReader(part.filename)
    check_count(part, reader.num_records())
    reader.close()


def _names_and_sizes(parts: Sequence[FilePart]) -> list[tuple[str, int]]:
    """The name and size of every part's file, wherever it is."""
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda part: size_and_version(part.filename), parts))
    names = [os.path.basename(part.filename) for part in parts]
    return [(name, size) for name, (size, _) in zip(names, found, strict=True)]


def find_prepared(name: str, root: epath.PathLike) -> epath.Path | None:
    """The folder of the newest prepared version of a data set that fits the name, or None.

    Raises:
      ConfigError: not a name, or one that leaves open which of several configs is meant.
    """
    dataset, asked = _parse_name(name)
    folder = epath.Path(root) / dataset
    config = asked.get("config") or _default_config(folder)
    found = _prepared_versions(folder / (config or ""), asked.get("version"))
    if found:
        return found[-1]
    if folder.is_dir() and not config:
        configs = sorted(child.name for child in folder.iterdir() if _prepared_versions(child))
        if configs:
            raise ConfigError(
                f"{dataset} in {root} has configs {', '.join(configs)}: "
                f"ask for one, such as '{dataset}/{configs[0]}'"
            )
    return None


def _default_config(folder: epath.Path) -> str | None:
    try:
        return dataset_builder.load_default_config_name(folder)
    except (AttributeError, OSError, ValueError) as error:
        if isinstance(error, OSError) and is_remote(folder):
            raise
        path = folder / ".config/metadata.json"
        raise DataError(f"{path} is damaged: {_first_line(error)}") from error


def _parse_name(name: str) -> tuple[str, dict[str, Any]]:
    """A name such as "dataset/config:1.0.0" as "dataset" and {"config", "version"}."""
    try:
        dataset, asked = naming.parse_builder_name_kwargs(name)
    except ValueError as error:
        raise ConfigError(
            f"'{name}' is not the name of a data set; names look like 'cifar10', "
            "'cifar10:3.0.2' or 'dataset/config:1.0.0'"
        ) from error
    return str(dataset), asked


def _prepared_versions(folder: epath.Path, asked: str | None = None) -> list[epath.Path]:
    """The folders of the complete versions, oldest first; `asked` may be "3.*.*"."""
    return [
        folder / str(version)
        for version in versions.list_all_versions(folder)
        if (asked is None or version.match(asked))
        and (folder / str(version) / "features.json").exists()
    ]


def prepare(name: str, root: Path, others: Iterable[str] = ()) -> None:
    """Downloads and writes a data set as ARRAY_RECORD, in a process of its own.

    TFDS may need TensorFlow for that, which must never load beside JAX: it takes the GPU.

    Raises:
      ConfigError: no such data set, or TensorFlow is needed and not installed.
      DataError: the download or the preparation failed.
    """
    _check_known(name, root, others)
    say(f"{name} is not in {printable(root)} yet: preparing it, once", error=True)
    child = subprocess.run(
        [sys.executable, "-m", "flaxcls.data.tfds", "prepare", name, str(root)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    if child.returncode == 0:
        return
    sentence = child.stdout.strip() or f"preparing {name} ended with exit code {child.returncode}"
    raise (ConfigError if child.returncode == ConfigError.exit_code else DataError)(sentence)


def check_known(name: str, data_dir: str | Path | None, others: Iterable[str] = ()) -> None:
    """ConfigError for a name that nothing can be opened by; in the cloud nothing is checked."""
    root = _data_root(data_dir)
    if not is_remote(root) and find_prepared(name, root) is None:
        _check_known(name, root, others)


def _check_known(name: str, root: Path, others: Iterable[str]) -> None:
    dataset, _ = _parse_name(name)
    here = {*others}
    if root.is_dir():
        here |= {child.name for child in root.iterdir() if child.is_dir()} - {"downloads"}
    known = {*here, *tfds.list_builders(with_community_datasets=False)}
    if dataset not in known:
        close = difflib.get_close_matches(dataset, known, n=1)
        hint = did_you_mean(dataset, close or here)  # TFDS's hundreds of names are no hint
        raise ConfigError(f"unknown data set '{dataset}'{hint}")


def prepare_here(name: str, root: Path) -> None:
    """What `prepare` does, in this process: TensorFlow may load."""
    try:
        builder = tfds.builder(name, data_dir=root)
        builder.download_and_prepare(file_format="array_record")
    except ImportError as error:
        missing = "TensorFlow" if "tensorflow" in str(error) else error.name or str(error)
        raise ConfigError(
            f"{name} is not prepared in {root} and preparing it needs {missing}: "
            "pip install 'flaxcls[prepare]', then run again"
        ) from error
    except Exception as error:  # whatever the data set's own code and its servers do
        raise DataError(f"{name} could not be prepared in {root}: {_first_line(error)}") from error


def main(arguments: list[str]) -> int:
    """`prepare NAME DIR`; standard output gets nothing but the sentence of an error."""
    if len(arguments) != 3 or arguments[0] != "prepare":
        print("usage: python -m flaxcls.data.tfds prepare NAME DIR")
        return ConfigError.exit_code
    try:
        with contextlib.redirect_stdout(sys.stderr):
            prepare_here(arguments[1], Path(arguments[2]))
    except FlaxclsError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
