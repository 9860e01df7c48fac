"""Files and parts of them, on this machine or in the cloud ("gs://bucket/file", "s3://...").

Local files are read by the operating system alone, the others by `flaxcls.remote`.
"""

import contextlib
import errno
import functools
import io
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from typing import TextIO

from flaxcls import remote
from flaxcls.errors import DataError, UnreachableError
from flaxcls.remote import is_remote

MAX_BYTES = 2**28  # of a picture's file; more is taken for a mistake or an attack
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_BLOCK = 2**23  # bytes that are fetched at a time from a file that is scanned


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


def read_bytes(path: str | os.PathLike, max_bytes: int | None = None) -> bytes:
    """All of a file, or one byte more than `max_bytes` of it.

    Raises:
      OSError: it can't be read; `strerror` says why.
    """
    if is_remote(path):
        size = remote.information(path)["size"] if max_bytes is None else max_bytes + 1
        return remote.read(os.fspath(path), size)
    with open(path, "rb", opener=open_regular) as file:
        return file.read(-1 if max_bytes is None else max_bytes + 1)


@contextlib.contextmanager
def open_text(path: str) -> Iterator[TextIO]:
    """A file of UTF-8 text, with its ends of lines as they are.

    Raises:
      OSError: as `read_bytes`.
    """
    options = {"encoding": "utf-8-sig", "newline": ""}
    if is_remote(path):
        yield io.TextIOWrapper(io.BytesIO(read_bytes(path)), **options)
        return
    with open(path, **options, opener=open_regular) as file:
        yield file


def read_picture(
    path: str | os.PathLike, where: str, max_bytes: int = MAX_BYTES, size: int = -1
) -> bytes:
    """The bytes of a picture's file; what is no file or too large is refused before it is read.

    Of a file in the cloud whose `size` is not known (-1) no more than `max_bytes` are fetched.

    Raises:
      DataError: it can't be read; the sentence begins with `where`.
    """
    try:
        if not is_remote(path):
            return _read_local_picture(path, where, max_bytes)
        _check_size(size, where, max_bytes)
        content = remote.read(os.fspath(path), max_bytes + 1)
        if len(content) > max_bytes:
            _check_size(remote.information(os.fspath(path))["size"], where, max_bytes)
        return content
    except OSError as error:
        raise data_error(f"{where} cannot be read", error) from error


def _read_local_picture(path: str | os.PathLike, where: str, max_bytes: int) -> bytes:
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        _check_size(size, where, max_bytes)
        # So much and no more: there are files in /proc that have no size and never end.
        content = os.read(descriptor, size)
        while len(content) < size and (more := os.read(descriptor, size - len(content))):
            content += more
        return content
    finally:
        os.close(descriptor)


def _check_size(size: int, where: str, max_bytes: int) -> None:
    if size > max_bytes:
        raise DataError(
            f"{where} has {size:,} bytes, more than the {max_bytes:,} that "
            "config.input.max_bytes allows"
        )


def data_error(what: str, error: OSError) -> DataError:
    """The error of a file that can't be read; `what` begins its sentence."""
    kind = UnreachableError if isinstance(error, remote.Fault) else DataError
    return kind(f"{what}: {error.strerror or error}")


def exists(path: str) -> bool:
    """Whether there is a file; OSError where the cloud does not say."""
    if not is_remote(path):
        return os.path.exists(path)
    try:
        remote.information(path)
    except FileNotFoundError:
        return False
    return True


def size_and_version(path: str) -> tuple[int, int]:
    """A file's bytes, and a number that changes when the file is written again.

    Raises:
      OSError: there is no such file, or it can't be reached.
    """
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    info = remote.information(path)
    tag = next((info[key] for key in ("etag", "ETag", "mtime", "created") if key in info), "")
    return info["size"], zlib.crc32(str(tag).encode())


def read_part(path: str, size: int, begin: int) -> bytes:
    """`size` bytes of a file from `begin` on; fewer only where the file ends.

    Raises:
      OSError: the file can't be read.
    """
    if is_remote(path):
        return remote.read(path, size, begin)
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
    with remote.open_to_read(path, _BLOCK) as file:

        def read(size: int, begin: int) -> bytes:
            with remote.os_errors(path):
                file.seek(begin)
                return file.read(size)

        yield read
