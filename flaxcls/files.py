"""Files and objects that are written atomically, that grow, and JSON or CSV in them."""

import contextlib
import csv
import errno
import io
import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from flaxcls.buckets import ABSENT, AnyPath, BucketPath, Changed
from flaxcls.errors import ConfigError

UPLOAD_SECONDS = 10.0  # between two writes of an object that grows
_TRIES = 20  # to add lines to an object, while others do so, too


@contextlib.contextmanager
def atomic_write(
    path: AnyPath, mode: str = "wb", *, fsync: bool = False, shared: bool = False
) -> Iterator[IO]:
    """Opens a temporary file, NAME.tmp, which replaces `path` when the block ends.

    If the block or writing raises, `path` is as it was and the temporary is removed; a process that
    is killed leaves the temporary, and the next one writes over it. An object in a bucket is
    written when the block ends, in one step.

    Args:
      path: the file to write; its folder exists.
      mode: as `open` takes it, to write.
      fsync: whether the content is on the disk, safe from a power cut, before it replaces `path`.
      shared: whether several processes may write `path` at the same time: each has a temporary with
        a name of its own, and the last one wins.

    Raises:
      OSError: it can't be written.
    """
    if isinstance(path, BucketPath):
        content = io.BytesIO()
        file = content if "b" in mode else io.TextIOWrapper(content, encoding="utf-8", newline="")
        yield file
        file.flush()
        path.write_bytes(content.getvalue())
        return
    suffix = f".{secrets.token_hex(8)}.tmp" if shared else ".tmp"
    temporary = path.with_name(path.name + suffix)
    try:
        with temporary.open(mode) as file:
            yield file
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


class GrowingObject:
    """An object in a bucket that is appended to, like a file that is opened with "ab".

    As an object is written whole, what is in it is in memory, too. It is written in the background,
    no more often than every UPLOAD_SECONDS and only when something comes to it, and by `flush`.
    """

    def __init__(self, path: BucketPath):
        self._path, self._version = path, path.version()
        self._content = b"" if self._version == ABSENT else path.read_bytes()
        self._written = len(self._content)
        self._began = time.monotonic()  # the last writing
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="flaxcls-upload")
        self._uploading: Future[None] | None = None

    def write(self, more: bytes) -> int:
        """Appends; the number of bytes, which is that of all."""
        self._content += more
        busy = self._uploading and not self._uploading.done()
        if not busy and time.monotonic() - self._began >= UPLOAD_SECONDS:
            self._begin()
        return len(more)

    def flush(self) -> None:
        """Returns when all is in the bucket; OSError, and it is still here, if that fails."""
        if self._uploading:
            with contextlib.suppress(Exception):  # it is tried again
                self._uploading.result()
        if self._written < len(self._content):
            self._begin().result()

    def close(self) -> None:
        """Ends the writing that is under way, and begins none: `flush` comes before."""
        self._pool.shutdown()

    def _begin(self) -> "Future[None]":
        self._began = time.monotonic()
        self._uploading = self._pool.submit(self._upload, self._content)
        return self._uploading

    def _upload(self, content: bytes) -> None:
        self._version = self._path.put(content, self._version)
        self._written = len(content)


def open_to_append(path: AnyPath) -> Any:
    """A file or a GrowingObject: its `write(bytes)` returns how many there was room for."""
    return GrowingObject(path) if isinstance(path, BucketPath) else path.open("ab", buffering=0)


def append_line(path: AnyPath, line: str) -> int:
    """Adds a line to a file that several processes may write to; returns its bytes now."""
    content = (line + "\n").encode(errors="surrogateescape")
    if not isinstance(path, BucketPath):
        with path.open("ab", buffering=0) as file:
            file.write(content)
            return file.tell()
    for _ in range(_TRIES):
        version = path.version()
        before = b"" if version == ABSENT else path.read_bytes()
        with contextlib.suppress(Changed):
            path.put(before + content, version)
            return len(before + content)
    raise Changed(errno.EAGAIN, "too many write to it at a time", str(path))


def write_json(path: AnyPath, content: Any, *, fsync: bool = False) -> None:
    """Writes a JSON file atomically; see `atomic_write`."""
    text = json.dumps(content, indent=2) + "\n"
    with atomic_write(path, "w", fsync=fsync) as file:
        file.write(text)


def write_csv(path: AnyPath, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a table in UTF-8, atomically; file names that are in no encoding keep their bytes."""
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
        text.flush()
        text.detach()


def read_json(path: AnyPath) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no file.

    Raises ConfigError, with the file's name, for whatever else is there.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{path} is not readable as JSON: {why}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__} instead of an object of JSON")
    return content
