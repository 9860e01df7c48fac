"""TensorBoard's event files, of scalars alone: written and read.

Such a file is TFRECORDs of protocol buffers of the type Event
(https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/util/event.proto). The few
fields that scalars need are written here: tensorboardX imports PyTorch where that is installed,
which takes as long as the rest of a start, and TensorBoard's own writer needs TensorFlow.
"""

import contextlib
import ctypes
import errno
import math
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flaxcls.buckets import AnyPath
from flaxcls.data.tfrecord import framed
from flaxcls.files import open_to_append

# How a field of a protocol buffer is written.
_VARINT, _64_BITS, _LENGTH, _32_BITS = 0, 1, 2, 5
_HEADER, _FOOTER = 12, 4  # bytes around a record
_START = 1  # of a SessionLog's values of `status`


class TensorBoard:
    """Event files in a folder, or none; what can't be written is dropped.

    They are written at once: a thread would end where a disk is full, and the run wait for it.
    """

    def __init__(self, folder: AnyPath | None):
        self._folder = folder
        self._file: Any = None

    def open(self, step: int) -> None:
        """Starts a file at a step; TensorBoard drops what earlier ones have of it and later."""
        self.flush()
        self.close()
        if self._folder is None:
            return
        with self._trying():
            self._folder.mkdir(parents=True, exist_ok=True)
            # Two starts within a second: a name of its own for each.
            start = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
            self._file = open_to_append(self._folder / f"events.out.tfevents.{start}")
            self._write(0, _field(3, b"brain.Event:2"))  # file_version
            self._write(step, _field(7, _key(1, _VARINT) + _varint(_START)))  # session_log

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars by name, except those that are NaN, the mean of nothing."""
        if self._file is None:
            self.open(step)
        if self._file is not None:
            known = {name: value for name, value in values.items() if not math.isnan(value)}
            with self._trying():
                self._write(step, _field(5, b"".join(map(_scalar, known, known.values()))))

    def flush(self) -> None:
        """Returns when it is written, or can't be."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.flush()

    def close(self) -> None:
        file, self._file = self._file, None
        if file:
            with contextlib.suppress(OSError):
                file.close()

    def _write(self, step: int, content: bytes) -> None:
        """Writes an Event: its time and step, and one field more."""
        wall_time = _key(1, _64_BITS) + struct.pack("<d", time.time())
        event = framed(wall_time + _key(2, _VARINT) + _varint(step) + content)
        if self._file.write(event) < len(event):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """After a failure the next file begins: what comes after half an event can't be read."""
        try:
            yield
        except OSError:
            self.close()


class Event(NamedTuple):
    """What is read of an event: its step, whether a process or a rollback begins at it, scalars."""

    step: int
    is_start: bool
    values: dict[str, float]


def read_events(path: AnyPath) -> Iterator[Event]:
    """The events of a file, as far as it is whole: what wrote it may have been killed."""
    content, place = path.read_bytes(), 0
    while place + _HEADER <= len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        begin, place = place + _HEADER, place + _HEADER + length + _FOOTER
        if place > len(content):
            return
        try:
            event = dict(_fields(content[begin : begin + length]))
            summary = [dict(_fields(each)) for _, each in _fields(event.get(5, b""))]
            values = {
                each[1].decode(): struct.unpack("<f", each[2])[0] for each in summary if 2 in each
            }
            yield Event(event.get(2, 0), 7 in event, values)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error):
            return


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: a number and an int or the bytes of each."""
    place = 0
    while place < len(message):
        number, kind, place = message[place] >> 3, message[place] & 7, place + 1
        if kind in (_VARINT, _LENGTH):
            value, shift = 0, 0
            while True:
                value |= (message[place] & 127) << shift
                place, shift = place + 1, shift + 7
                if message[place - 1] < 128:
                    break
            if kind == _VARINT:
                yield number, value
                continue
        else:
            value = {_64_BITS: 8, _32_BITS: 4}[kind]
        yield number, message[place : place + value]
        place += value


def _scalar(name: str, value: float) -> bytes:
    """A Summary's `value`: `tag` and `simple_value`, infinite where float32 has no such number."""
    simple_value = _key(2, _32_BITS) + bytes(ctypes.c_float(value))
    return _field(1, _field(1, name.encode()) + simple_value)


def _field(number: int, content: bytes) -> bytes:
    """A field that is text or a message of its own."""
    return _key(number, _LENGTH) + _varint(len(content)) + content


def _key(number: int, kind: int) -> bytes:
    return bytes([number << 3 | kind])


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])
