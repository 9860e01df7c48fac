"""Writes a TFDS data set of ArrayRecord files atomically, and resumes after interruptions.

While a data set DIR/NAME is written, everything is in the hidden folder DIR/.NAME.incomplete:

    begun.json       what is being written; if that is something else, it starts from scratch
    shards/*.json    what became of the pictures of every shard that is complete
    NAME/1.0.0/      the data set, its metadata last; renamed to DIR/NAME when it is complete
"""

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxcls.errors import ConfigError, DataError
from flaxcls.files import write_json
from flaxcls.runtime.progress import progress
from flaxcls.runtime.read_ahead import in_order

VERSION = "1.0.0"
METADATA = "prepared.json"  # beside the data: of what they were made, and how
_UNFINISHED = ".tmp"
_CHUNK = 8  # examples that a thread makes at a time


@dataclasses.dataclass
class Tally:
    """What became of some pictures."""

    written: int = 0
    kept: int = 0  # of these, with the bytes that they had
    bytes_before: int = 0
    bytes: int = 0
    left_out: list[str] = dataclasses.field(default_factory=list)  # what is wrong with them

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in _FIELDS))


_FIELDS = dataclasses.fields(Tally)


def is_complete(target: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether the data set is there already; ConfigError if something else is."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    check_metadata(_read_json(target / VERSION / METADATA), metadata, target)
    _remove_staging(target)
    return True


def _staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.incomplete")


def _remove_staging(target: Path) -> None:
    """What is left of writing a data set when it is complete; a killed process leaves it."""
    shutil.rmtree(_staging(target), ignore_errors=True)


class DatasetWriter:
    """Writes one data set; to be entered, which keeps other processes off.

    Args:
      target: the data set's folder, DIR/NAME.
      metadata: what the data set is made of, and how, as JSON takes it. What an interrupted process
        left is used only if its metadata were the same.

    Raises:
      ConfigError: another process is writing it.
      OSError: it can't be written.
    """

    def __init__(self, target: Path, metadata: dict[str, Any]):
        self._target, self._metadata = target, metadata
        self._staging = _staging(target)
        self._folder = self._staging / target.name / VERSION
        self._lock = -1

    def __enter__(self) -> "DatasetWriter":
        self._staging.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._staging, os.O_RDONLY)
        try:
            _lock(self._lock, self._target)
            self._begin()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        os.close(self._lock)

    def _begin(self) -> None:
        begun = self._staging / "begun.json"
        if _read_json(begun) != self._metadata:
            begun.unlink(missing_ok=True)  # first: what is left of the rest is not to be used
            for child in self._staging.iterdir():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            write_json(begun, self._metadata, fsync=True)
        (self._staging / "shards").mkdir(exist_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def write_split(
        self,
        split: str,
        shards: Sequence[range],
        make: Callable[[range], tuple[list[bytes], Tally]],
        threads: int,
    ) -> list[Tally]:
        """Writes the shards of a split that are not there yet.

        Args:
          split: its name.
          shards: the examples of each shard.
          make: gives the records of some examples, in order, and what became of them.
          threads: how many call `make`.

        Returns:
          What became of the examples of every shard.
        """
        names = shard_names(self._target.name, split, len(shards))
        count, there = sum(map(len, shards)), self._complete_shards()
        done = sum(len(part) for name, part in zip(names, shards, strict=True) if name in there)
        tallies = []
        with progress(f"writing {self._target.name} '{split}'", count, done) as advance:
            for name, examples in zip(names, shards, strict=True):
                if name not in there:
                    parts = [examples[i : i + _CHUNK] for i in range(0, len(examples), _CHUNK)]
                    self._write_shard(name, in_order(make, parts, threads), advance)
                tallies.append(self._tally(name))
        return tallies

    def _complete_shards(self) -> set[str]:
        """The names of the shards that are there."""
        return {path.name for path in self._folder.iterdir() if path.suffix != _UNFINISHED}

    def _tally(self, name: str) -> Tally:
        """What became of the examples of a shard."""
        return Tally(**_read_json(self._staging / "shards" / f"{name}.json"))

    def _write_shard(
        self,
        name: str,
        made: Iterable[tuple[list[bytes], Tally]],
        advance: Callable[[int], None],
    ) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        total, temporary = Tally(), self._folder / f"{name}{_UNFINISHED}"
        try:
            # Each record by itself, for random access; JPEG can't be compressed any further.
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            try:
                for records, tally in made:
                    for record in records:
                        writer.write(record)
                    total += tally
                    advance(len(records) + len(tally.left_out))
            finally:
                writer.close()
        except RuntimeError as error:  # the writer's only kind, such as of a full disk
            temporary.unlink(missing_ok=True)
            raise OSError(0, str(error).partition(";")[0]) from error
        self._keep_shard(temporary, name, dataclasses.asdict(total))

    def _keep_shard(self, temporary: Path, name: str, tally: dict[str, Any]) -> None:
        """Makes a written file a shard, and keeps what became of its examples."""
        _sync(temporary)
        write_json(self._staging / "shards" / f"{name}.json", tally, fsync=True)
        os.replace(temporary, self._folder / name)

    def finish(
        self,
        tallies: Mapping[str, Sequence[Tally]],
        *,
        class_names: Sequence[str],
        image_shape: tuple[int | None, int | None, int],
        description: str,
    ) -> None:
        """Writes the metadata, checks that all can be read, and makes it the data set."""
        self._write_metadata(tallies, class_names, image_shape, description)
        self._check(tallies, class_names)
        self._publish()

    def _write_metadata(
        self,
        tallies: Mapping[str, Sequence[Tally]],
        class_names: Sequence[str],
        image_shape: tuple[int | None, int | None, int],
        description: str,
    ) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.splits import SplitInfo

        template = tfds.core.ShardedFileTemplate(
            data_dir=self._folder,
            dataset_name=self._target.name,
            filetype_suffix="array_record",
        )
        tfds.folder_dataset.write_metadata(
            data_dir=self._folder,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=image_shape, encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=class_names),
                }
            ),
            split_infos=[
                SplitInfo(
                    name=split,
                    shard_lengths=[tally.written for tally in parts],
                    num_bytes=sum(tally.bytes for tally in parts),
                    filename_template=template,
                )
                for split, parts in tallies.items()
            ],
            version=VERSION,
            filename_template=template,
            check_data=False,
            supervised_keys=("image", "label"),
            description=description,
        )
        left_out = {split: sum(parts, Tally()).left_out for split, parts in tallies.items()}
        metadata = {**self._metadata, "left_out": left_out}
        write_json(self._folder / METADATA, metadata, fsync=True)

    def _check(self, tallies: Mapping[str, Sequence[Tally]], class_names: Sequence[str]) -> None:
        """Raises DataError unless the data set gives back its classes, and as many records."""
        from flaxcls.data.tfds import TfdsSource

        for split in tallies:
            source = TfdsSource(self._target.name, split, self._folder)  # counts the records
            if list(source.class_names) != list(class_names):
                raise DataError(f"{self._folder} does not give back the names of the classes")

    def _publish(self) -> None:
        for path in (*self._folder.iterdir(), self._folder, self._folder.parent):
            _sync(path)
        os.rename(self._folder.parent, self._target)
        _sync(self._target.parent)
        _remove_staging(self._target)


def shard_names(dataset: str, split: str, count: int) -> list[str]:
    """The names of a split's files, as TFDS has them."""
    name = f"{dataset}-{split}.array_record"
    return [f"{name}-{number:05d}-of-{count:05d}" for number in range(count)]


def check_metadata(found: Mapping[str, Any], metadata: Mapping[str, Any], target: Any) -> None:
    """ConfigError unless what was `found` of a data set that is there is `metadata` and more."""
    if {key: found.get(key) for key in metadata} != metadata:
        raise ConfigError(
            f"{target} exists and is not what this command would write: choose another --name or "
            "--out, or remove it"
        )


def _lock(descriptor: int, target: Path) -> None:
    """Locks a folder until it is closed or the process ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"another process is writing {target}") from error
    except OSError:
        return  # a file system without locks


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file; nothing if it isn't there or is broken."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _sync(path: Path) -> None:
    """Makes a file or folder safe from a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
