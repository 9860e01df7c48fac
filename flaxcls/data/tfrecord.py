"""Random access to TFRECORD files, TFDS's default format, which has no index of its own.

A file is a sequence of records: uint64 length, uint32 checksum, data, uint32 checksum
(https://www.tensorflow.org/tutorials/load_data/tfrecord). One pass over the lengths finds where
every record begins; the offsets are kept in a small .npy file, so that the pass is made once.
"""

import hashlib
import io
import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from flaxcls.data.storage import (
    data_error,
    is_remote,
    open_regular,
    open_to_scan,
    read_part,
    size_and_version,
)
from flaxcls.errors import DataError
from flaxcls.files import atomic_write

_LENGTH = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<I")
_HEADER, _FOOTER = 12, 4  # bytes around a record's data
_NPY_HEADER = 128  # bytes before the values of a .npy file with one dimension


class FilePart(Protocol):
    """`take` records of a file from number `skip` on: what TFDS calls a file instruction."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class TfRecords:
    """The records of a sequence of file parts. Reading is safe in threads.

    Raises:
      DataError: a file is missing, cut short, or has another number of records than it should.
    """

    def __init__(self, parts: Sequence[FilePart]):
        self._paths = [part.filename for part in parts]
        with ThreadPoolExecutor(16) as threads:  # waiting for disks, not computing
            bounds = list(threads.map(_part_offsets, parts))
        self._file = np.repeat(np.arange(len(parts)), [part.take for part in parts])
        self._begin = np.concatenate([offsets[:-1] for offsets in bounds])
        self._end = np.concatenate([offsets[1:] for offsets in bounds])

    def __len__(self) -> int:
        return len(self._begin)

    def __getitem__(self, index: int) -> bytes:
        return self._record(index)[_HEADER:-_FOOTER]

    def verify(self, index: int) -> None:
        """Raises DataError unless the checksums of a record are those of its length and data.

        Reading a record does not check them.
        """
        record = self._record(index)
        length, data = record[: _LENGTH.size], record[_HEADER:-_FOOTER]
        stored = record[_LENGTH.size : _HEADER], record[-_FOOTER:]
        if stored != (_masked_crc(length), _masked_crc(data)):
            path, begin = self._paths[self._file[index]], int(self._begin[index])
            raise DataError(
                f"{path} is damaged: the checksum of the record at byte {begin} differs"
            )

    def _record(self, index: int) -> bytes:
        """All of a record, its length and checksums included."""
        path = self._paths[self._file[index]]
        begin, size = int(self._begin[index]), int(self._end[index] - self._begin[index])
        record = read_part(path, size, begin)
        if len(record) < size or _LENGTH.unpack_from(record)[0] != size - _HEADER - _FOOTER:
            raise DataError(f"{path} has changed since it was opened: no record at byte {begin}")
        return record


def framed(data: bytes) -> bytes:
    """The record that holds `data`, as a file has it."""
    length = _LENGTH.pack(len(data))
    return length + _masked_crc(length) + data + _masked_crc(data)


def _masked_crc(data: bytes) -> bytes:
    """The checksum of TFRECORD: CRC-32C, rotated by 15 bits and added to a constant."""
    from google_crc32c import value

    crc = value(data)
    return _CHECKSUM.pack(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _part_offsets(part: FilePart) -> np.ndarray:
    try:
        offsets = record_offsets(part.filename)
    except OSError as error:
        raise data_error(f"{part.filename} cannot be read", error) from error
    check_count(part, len(offsets) - 1)
    return offsets[part.skip : part.skip + part.take + 1]


def check_count(part: FilePart, found: int) -> None:
    """Raises DataError unless a file has as many records as the data set's metadata say."""
    if found != part.examples_in_shard:
        raise DataError(
            f"{part.filename} holds {found} records where dataset_info.json says "
            f"{part.examples_in_shard}: it is damaged, or from another version of the data set"
        )


def record_offsets(path: str) -> np.ndarray:
    """Where every record of a file begins, and the last one ends: int64 [records + 1].

    Cached beside the file or, where that is read-only or in the cloud, in $XDG_CACHE_HOME/flaxcls
    (~/.cache/flaxcls), until the file is written again.
    """
    version = np.array(size_and_version(path))
    index_paths = _index_paths(path)
    for index_path in index_paths:
        offsets = _load_index(index_path, version)
        if offsets is not None:
            return offsets
    offsets = _scan(path, size=int(version[0]))
    for index_path in index_paths:
        if _store_index(index_path, np.concatenate([version, offsets])):
            break
    return offsets


def _scan(path: str, size: int) -> np.ndarray:
    begins = [0]
    with open_to_scan(path) as read:
        while begins[-1] < size:
            length = read(_LENGTH.size, begins[-1])
            if len(length) < _LENGTH.size:
                break
            begins.append(begins[-1] + _HEADER + _LENGTH.unpack(length)[0] + _FOOTER)
    if begins[-1] != size:
        raise DataError(
            f"{path} is cut short or not a TFRECORD file: record {len(begins) - 2} should end "
            f"at byte {begins[-1]}, the file ends at {size}"
        )
    return np.array(begins)


def _index_paths(path: str) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flaxcls"
    absolute = path if is_remote(path) else os.path.abspath(path)
    key = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:32]
    beside = [] if is_remote(path) else [Path(path).with_name(f".{Path(path).name}.offsets.npy")]
    return [*beside, cache / f"{key}.offsets.npy"]


def _load_index(path: Path, version: np.ndarray) -> np.ndarray | None:
    """The offsets in an index file, unless it is missing, broken or of another version."""
    index = _read_array(
        path, largest=8 * (int(version[0]) // (_HEADER + _FOOTER) + 3) + _NPY_HEADER
    )
    if index is None or not np.array_equal(index[:2], version):
        return None
    offsets = index[2:]
    is_valid = (
        len(offsets) > 0
        and offsets[0] == 0
        and offsets[-1] == version[0]
        and np.all(np.diff(offsets) >= _HEADER + _FOOTER)
    )
    return offsets if is_valid else None


def _read_array(path: Path, largest: int) -> np.ndarray | None:
    """The int64 [N] in a .npy file of at most `largest` bytes; None if it holds anything else.

    np.load would believe a header that claims more than any memory holds.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            if os.fstat(file.fileno()).st_size > largest:
                return None
            content = file.read()
    except OSError:
        return None
    if len(content) <= _NPY_HEADER or len(content) % 8:
        return None
    array = np.frombuffer(content, np.int64, offset=_NPY_HEADER)
    expected = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(expected, header)
    return array if content.startswith(expected.getvalue()) else None


def _store_index(path: Path, index: np.ndarray) -> bool:
    """Writes an index file atomically; False where nothing can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.stat().st_mode & 0o222:  # read-only means that to root, too
            return False
        with atomic_write(path, shared=True) as file:  # by all processes that read the data
            np.save(file, index)
    except OSError:
        return False
    return True
