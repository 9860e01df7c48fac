"""Parts of files, on this machine or in the cloud ("gs://bucket/file", "s3://bucket/file").

Local files are read by the operating system alone. For the others fsspec is needed with its
package for the cloud (gcsfs, s3fs, adlfs, huggingface_hub).
"""

import contextlib
import errno
import functools
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from flaxcls.errors import DataError

MAX_BYTES = 2**28  # of a picture's file; more is taken for a mistake or an attack
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_BLOCK = 2**23  # bytes that are fetched at a time from a file that is scanned


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path names a file in the cloud."""
    return "://" in os.fspath(path)


def open_regular(path: str | os.PathLike, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a file that is one, and nothing that never ends or waits for a writer.

    It can be the `opener` of Python's `open`.

    Raises:
      OSError: there is no such file, it can't be opened, or it is a pipe, a device or a folder.
    """
    _refuse_others(os.stat(path))  # first: opening a device can do something
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_others(os.fstat(descriptor))  # it may have been exchanged in between
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_others(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a file")


def read_picture(path: str | os.PathLike, where: str, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a picture's file; what is no file or too large is refused before it is read.

    Raises:
      DataError: it can't be read; the sentence begins with `where`.
    """
    try:
        descriptor = open_regular(path)
        try:
            size = os.fstat(descriptor).st_size
            if size > max_bytes:
                raise DataError(
                    f"{where} has {size:,} bytes, more than the {max_bytes:,} that "
                    "config.input.max_bytes allows"
                )
            # So much and no more: there are files in /proc that have no size and never end.
            content = os.read(descriptor, size)
            while len(content) < size and (more := os.read(descriptor, size - len(content))):
                content += more
            return content
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror}") from error


def size_and_version(path: str) -> tuple[int, int]:
    """A file's bytes, and a number that changes when the file is written again.

    Raises:
      OSError: there is no such file, or it can't be reached.
    """
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    with _os_errors():
        filesystem, name = _filesystem(path)
        info = filesystem.info(name)
    tag = next((info[key] for key in ("etag", "ETag", "mtime", "created") if key in info), "")
    return info["size"], zlib.crc32(str(tag).encode())


def read_part(path: str, size: int, begin: int) -> bytes:
    """`size` bytes of a file from `begin` on; fewer only where the file ends.

    Raises:
      OSError: the file can't be read.
    """
    if is_remote(path):
        with _os_errors():
            filesystem, name = _filesystem(path)
            return filesystem.cat_file(name, start=begin, end=begin + size)
    descriptor = os.open(path, os.O_RDONLY)  # no file stays open: a data set may have thousands
    try:
        return os.pread(descriptor, size, begin)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def open_to_scan(path: str) -> Iterator[Callable[[int, int], bytes]]:
    """Opens a file for many small `read(size, begin)`, from its beginning to its end.

    In the cloud, where every request takes its time, this fetches the whole file.

    Raises:
      OSError: the file can't be opened or, by `read`, can't be read.
    """
    if not is_remote(path):
        with open(path, "rb", buffering=0) as file:
            yield functools.partial(os.pread, file.fileno())
        return
    with _os_errors():
        filesystem, name = _filesystem(path)
        file = filesystem.open(name, block_size=_BLOCK, cache_type="readahead")

    def read(size: int, begin: int) -> bytes:
        with _os_errors():
            file.seek(begin)
            return file.read(size)

    with file:
        yield read


def _filesystem(path: str) -> tuple[Any, str]:
    """fsspec's file system for a path, which it keeps and which threads may share, and the rest."""
    from fsspec.core import url_to_fs

    return url_to_fs(path)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """Makes an OSError of whatever a cloud's client raises."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise OSError(errno.EIO, f"{type(error).__name__}: {reason}") from error
