"""Random access to ARRAY_RECORD files in the cloud, which are read in parts, by HTTP ranges.

The package array_record reads files of this machine. Its format is Riegeli's
(https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md): chunks of
records, interrupted by a header every 64 KiB. The last 64 KiB say where the chunk is that lists all
others, https://github.com/google/array_record/blob/main/cpp/layout.proto. Checksums are not looked
at: the connection has its own.
"""

import importlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from flaxcls.data.storage import data_error, read_part, size_and_version
from flaxcls.data.tfrecord import FilePart, check_count
from flaxcls.errors import ConfigError, DataError

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 2**16, 24, 40  # bytes
_MAGIC = 0x71930E704FDAE05E
_TAIL = 2**18  # bytes at the end of a file in which the list of most files is
_MAX_RECORD = 2**30  # bytes


class RemoteArrayRecords:
    """The records of a sequence of file parts. Reading is safe in threads, a request a record.

    Raises:
      DataError: a file is missing, damaged, or has another number of records than it should.
    """

    def __init__(self, parts: Sequence[FilePart]):
        self._paths = [part.filename for part in parts]
        with ThreadPoolExecutor(32) as threads:  # waiting for the cloud, not computing
            chunks = list(threads.map(_part_chunks, parts))
        self._file = np.repeat(np.arange(len(parts)), [part.take for part in parts])
        self._begin, self._end, self._number = np.concatenate(chunks, axis=1)

    def __len__(self) -> int:
        return len(self._begin)

    def __getitem__(self, index: int) -> bytes:
        path = self._paths[self._file[index]]
        begin, end = int(self._begin[index]), int(self._end[index])
        content = read_part(path, end - begin, begin)
        return _records(path, content, begin)[self._number[index]]


def _part_chunks(part: FilePart) -> np.ndarray:
    """Of each record that a part takes the chunk's begin and end, and its number there: [3, N]."""
    path = part.filename
    try:
        offsets, counts = _chunks(path)
    except OSError as error:
        raise data_error(f"{path} cannot be read", error) from error
    check_count(part, int(counts.sum()))
    of = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.stack([offsets[:-1][of], offsets[1:][of], number])
    return found[:, part.skip : part.skip + part.take]


def _chunks(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each chunk of records begins, and the last one ends, and how many records it has."""
    size, _ = size_and_version(path)
    begin = max(0, size - _TAIL) // _BLOCK * _BLOCK
    tail = read_part(path, size - begin, begin)
    if len(tail) < size - begin or size < 2 * _BLOCK or size % _BLOCK:
        raise _damaged(path)
    place = dict(_fields(path, _records(path, tail[-_BLOCK:], size - _BLOCK)[0]))
    if place.get(2) != _MAGIC or not 0 < place.get(1, 0) < size - _BLOCK:
        raise _damaged(path)
    if place[1] < begin:
        tail, begin = read_part(path, size - place[1], place[1]), place[1]
    listed = _records(path, tail[place[1] - begin : -_BLOCK], place[1])[1:]
    chunks = [dict(_fields(path, record)) for record in listed]
    if any(value > size for chunk in chunks for value in (chunk.get(1, 0), chunk.get(3, 0))):
        raise _damaged(path)
    offsets = np.array([*(chunk.get(1, 0) for chunk in chunks), place[1]], np.int64)
    counts = np.array([chunk.get(3, 0) for chunk in chunks], np.int64)
    if np.any(np.diff(offsets) < _CHUNK_HEADER) or offsets[0] < 0 or np.any(counts < 1):
        raise _damaged(path)
    return offsets, counts


def _records(path: str, content: bytes, begin: int) -> list[bytes]:
    """The records of the chunk at byte `begin` of a file, with which `content` begins."""
    first = -begin % _BLOCK  # where the header of a block interrupts it
    starts = [0, *(at + _BLOCK_HEADER for at in range(first, len(content), _BLOCK))]
    ends = [*range(first, len(content), _BLOCK), len(content)]
    chunk = b"".join(content[start:end] for start, end in zip(starts, ends, strict=True))
    header, data = chunk[:_CHUNK_HEADER], chunk[_CHUNK_HEADER:]
    size, kind = int.from_bytes(header[8:16], "little"), header[24:25]
    count, decoded = (int.from_bytes(header[i:j], "little") for i, j in ((25, 32), (32, 40)))
    if kind == b"t":
        raise ConfigError(f"{path} is written transposed, which is read from local folders only")
    if kind != b"r" or len(data) < size or decoded > _MAX_RECORD:
        raise _damaged(path)
    data = data[:size]
    compressed, at = _varint(path, data, 1)
    sizes = _decompress(path, data[:1], data[at : at + compressed])
    values = _decompress(path, data[:1], data[at + compressed :])
    ends, at = [0], 0
    for _ in range(count):
        length, at = _varint(path, sizes, at)
        ends.append(ends[-1] + length)
    if ends[-1] != len(values) or len(values) != decoded:
        raise _damaged(path)
    return [values[start:end] for start, end in itertools.pairwise(ends)]


def _decompress(path: str, kind: bytes, data: bytes) -> bytes:
    if kind == b"\0":
        return data
    size, at = _varint(path, data, 0)
    if kind == b"z" and size <= _MAX_RECORD:
        zstd = _zstd(path)
        try:
            return zstd.ZstdDecompressor().decompress(data[at:], max_length=size)
        except zstd.ZstdError as error:
            raise _damaged(path) from error
    raise ConfigError(f"{path} is compressed in a way that is read from local folders only")


def _zstd(path: str) -> Any:
    """Python's module from 3.14 on, or its double for older ones."""
    try:
        if sys.version_info >= (3, 14):
            return importlib.import_module("compression.zstd")
        return importlib.import_module("backports.zstd")
    except ImportError as error:
        raise ConfigError(f"{path} is compressed: pip install backports.zstd") from error


def _fields(path: str, message: bytes) -> Iterator[tuple[int, int]]:
    """The numbers in a protocol buffer that has nothing else, each with that of its field."""
    at = 0
    while at < len(message):
        tag, at = _varint(path, message, at)
        if tag & 7:
            raise _damaged(path)
        value, at = _varint(path, message, at)
        yield tag >> 3, value


def _varint(path: str, data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, and where the next one begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise _damaged(path)


def _damaged(path: str) -> DataError:
    return DataError(f"{path} is damaged or not an ARRAY_RECORD file")
