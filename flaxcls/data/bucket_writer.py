"""`flaxcls.data.writer` for buckets, which know neither locks nor renaming.

Every shard is written on this machine and uploaded, which is done whole or not at all. While a data
set OUT/NAME is written, there are

    OUT/.NAME.incomplete/begun.json       what is being written, and by whom
    OUT/.NAME.incomplete/shards/*.json    what became of the pictures of every shard that is there
    OUT/NAME/1.0.0/                       the data set without features.json

features.json, which TFDS and flaxcls look for first, comes last: without it there is no data set.
Of two processes that write the same at a time both do, and the same, until one is done and the
other stops; of two that write something else the first one stops before its next shard.
"""

import json
import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from flaxcls import remote
from flaxcls.data import metadata as written
from flaxcls.data.array_record import RemoteArrayRecords
from flaxcls.data.storage import exists, read_bytes
from flaxcls.data.writer import METADATA, VERSION, DatasetWriter, Tally, check_metadata, shard_names
from flaxcls.errors import ConfigError, DataError

_MAX_JSON = 2**28  # bytes


class _Part(NamedTuple):
    """A whole file, as `flaxcls.data.tfrecord.FilePart` has it."""

    filename: str
    take: int
    examples_in_shard: int
    skip: int = 0


def is_complete(target: epath.Path, metadata: Mapping[str, Any]) -> bool:
    """Whether the data set is there already; ConfigError if something else is."""
    folder = os.fspath(target / VERSION)
    try:
        if exists(f"{folder}/{written.FEATURES}"):
            check_metadata(_read_json(f"{folder}/{METADATA}"), metadata, target)
            _remove_all(_staging(target))
            return True
        if remote.entries(os.fspath(target)) and not exists(f"{_staging(target)}/begun.json"):
            check_metadata({}, metadata, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be read: {error.strerror}") from error
    return False


class BucketWriter(DatasetWriter):
    """As `DatasetWriter`, for a `target` in the cloud, OUT/NAME."""

    def __init__(self, target: epath.Path, metadata: dict[str, Any]):
        self._target, self._metadata = target, metadata
        self._there, self._notes = os.fspath(target / VERSION), _staging(target)

    def __enter__(self) -> "BucketWriter":
        self._local = tempfile.TemporaryDirectory(prefix="flaxcls-")
        self._folder = Path(self._local.name)
        try:
            self._begin()
        except BaseException:
            self._local.cleanup()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._local.cleanup()

    def _begin(self) -> None:
        found = _read_json(f"{self._notes}/begun.json")
        if found.get("metadata") == self._metadata:
            self._begun = found
            return
        self._begun = {"metadata": self._metadata, "writer": uuid.uuid4().hex}
        # First: what is left of the rest is not to be used. And stays: it is this command's.
        _write_json(f"{self._notes}/begun.json", {"writer": self._begun["writer"]})
        _remove_all(self._there)
        _remove_all(f"{self._notes}/shards")
        _write_json(f"{self._notes}/begun.json", self._begun)

    def _check_begun(self) -> None:
        """Raises ConfigError where another process has begun to write something else."""
        if _read_json(f"{self._notes}/begun.json") != self._begun:
            raise self._interfered()

    def _interfered(self) -> ConfigError:
        return ConfigError(f"another process is writing {self._target}")

    def _complete_shards(self) -> set[str]:
        return {entry.name for entry in remote.entries(self._there)}

    def _tally(self, name: str) -> Tally:
        found = _read_json(f"{self._notes}/shards/{name}.json")
        if not found:  # it was there before the shard was
            raise self._interfered()
        return Tally(**found)

    def _keep_shard(self, temporary: Path, name: str, tally: dict[str, Any]) -> None:
        self._check_begun()
        _write_json(f"{self._notes}/shards/{name}.json", tally)
        remote.upload(temporary, f"{self._there}/{name}")
        temporary.unlink()

    def _write_metadata(self, tallies: Mapping[str, Sequence[Tally]], *given: Any) -> None:
        stand_ins = [  # TFDS takes a folder's data for what the names of its files say
            self._folder / name
            for split, parts in tallies.items()
            for name in shard_names(self._target.name, split, len(parts))
        ]
        for path in stand_ins:
            path.touch()
        super()._write_metadata(tallies, *given)
        for path in stand_ins:
            path.unlink()

    def _check(self, tallies: Mapping[str, Sequence[Tally]], class_names: Sequence[str]) -> None:
        info = written.read_info(self._folder)
        if written.class_names(info, self._folder, "label") != list(class_names):
            raise DataError(f"{self._target} does not give back the names of the classes")
        for split, parts in tallies.items():
            names = shard_names(self._target.name, split, len(parts))
            counts = [tally.written for tally in parts]
            RemoteArrayRecords(  # counts the records
                [
                    _Part(f"{self._there}/{name}", count, count)
                    for name, count in zip(names, counts, strict=True)
                ]
            )

    def _publish(self) -> None:
        self._check_begun()
        files = sorted(self._folder.iterdir(), key=lambda path: path.name == written.FEATURES)
        for path in files:
            remote.upload(path, f"{self._there}/{path.name}")
        _remove_all(self._notes)


def _staging(target: epath.Path) -> str:
    return os.fspath(target.parent / f".{target.name}.incomplete")


def _read_json(path: str) -> dict[str, Any]:
    """A JSON file; nothing if it isn't there or is broken. OSError if the cloud does not say."""
    try:
        return json.loads(read_bytes(path, _MAX_JSON))
    except (FileNotFoundError, ValueError):
        return {}


def _write_json(path: str, value: Mapping[str, Any]) -> None:
    remote.write(path, json.dumps(value, indent=1).encode())


def _remove_all(folder: str) -> None:
    with ThreadPoolExecutor(16) as threads:  # waiting for the cloud
        list(threads.map(remote.remove, [entry.path for entry in remote.below(folder)]))
