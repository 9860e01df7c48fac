"""Files in the cloud, such as "gs://bucket/file" or "s3://bucket/file", by fsspec.

Every function raises a FileNotFoundError or a Fault, whose `strerror` ends a sentence that begins
with the path, or a ConfigError where what reaches the cloud is not installed. What may pass by
itself (refused for load, cut off, slow) is tried again: gcsfs does for 34 seconds, s3fs for 12.
Safe in threads, not across a fork.
"""

import contextlib
import errno
import logging
import os
import posixpath
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flaxcls.errors import ConfigError, FlaxclsError

CONNECTIONS = 128  # of a process to a store at a time; s3fs would have 10
PATIENCE = 120  # seconds that a read is tried again
TIMEOUT = 60  # seconds without a byte, after which gcsfs would wait on
CHUNK = 2**24  # bytes that are uploaded at a time
_EXTRAS = {"gs": "cloud", "gcs": "cloud", "s3": "s3", "s3a": "s3"}
_CREDENTIALS = {
    "cloud": "`gcloud auth application-default login` or GOOGLE_APPLICATION_CREDENTIALS gives "
    "credentials",
    "s3": "`aws configure` or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY give credentials",
}
_DENIED = ("Unauthorized", "Forbidden", "AccessDenied", "Access Denied", "Anonymous caller")
_DENIED += ("Invalid Credentials", "InvalidAccessKeyId", "SignatureDoesNotMatch")


class Fault(OSError):
    """A store does not answer (EIO) or may not be read (EACCES): not one file is wrong but all."""


class Entry(NamedTuple):
    """A file or folder in the cloud, with its path, bytes and nanoseconds since 1970."""

    path: str
    is_folder: bool
    size: int
    time: int

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)


def is_remote(path: Any) -> bool:
    """Whether a path, of whatever kind, names a file in the cloud."""
    return "://" in str(path)


def join(root: str, path: str) -> str:
    """`os.path.join`, also in the cloud, where "a/../b" and "b" are two names."""
    if is_remote(path) or not is_remote(root) or os.path.isabs(path):
        return path if is_remote(path) else os.path.join(root, path)
    scheme, _, rest = root.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(rest, path))}"


def read(path: str, size: int, begin: int = 0) -> bytes:
    """`size` bytes of a file from `begin` on, in one request; fewer where the file ends.

    A store that fails is asked again for `PATIENCE` seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while size > 0:
        try:
            with os_errors(path):
                client, name = client_and_name(path)
                return client.cat_file(name, start=begin, end=begin + size)
        except Fault as error:
            if _is_beyond_the_end(error):
                break
            if error.errno != errno.EIO or time.monotonic() > deadline:
                raise
        time.sleep(1)
    return b""


def write(path: str, content: bytes) -> None:
    """Writes a file, whole or not at all."""
    with os_errors(path):
        client, name = client_and_name(path)
        client.pipe_file(name, content)


def upload(source: str | os.PathLike, path: str) -> None:
    """Copies a file from this machine, whole or not at all."""
    with os_errors(path):
        client, name = client_and_name(path)
        client.put_file(os.fspath(source), name, chunksize=CHUNK)


def remove(path: str) -> None:
    """Removes a file."""
    with os_errors(path):
        client, name = client_and_name(path)
        client.rm_file(name)


def information(path: str) -> dict[str, Any]:
    """What the store says of a file: "size" and others, by the names that it has for them."""
    with os_errors(path):
        client, name = client_and_name(path)
        return client.info(name)


def entries(folder: str) -> list[Entry]:
    """What is in a folder, by name; empty where there is no such folder."""
    with os_errors(folder):
        client, name = client_and_name(folder)
        with contextlib.suppress(FileNotFoundError):
            return _entries(folder, name, client.ls(name, detail=True))
    _check_bucket(folder)
    return []


def _check_bucket(path: str) -> None:
    """FileNotFoundError if there is no such bucket, which not everybody may ask."""
    scheme, _, rest = path.partition("://")
    try:
        information(f"{scheme}://{rest.partition('/')[0]}")
    except Fault as error:
        if error.errno != errno.EACCES:
            raise


def below(folder: str) -> list[Entry]:
    """All files in a folder and those below, by path: a request for every thousand of them."""
    with os_errors(folder):
        client, name = client_and_name(folder)
        found = client.find(name, detail=True)
    return [entry for entry in _entries(folder, name, found.values()) if not entry.is_folder]


def _entries(folder: str, name: str, found: Any) -> list[Entry]:
    """`found` as entries; without those that stand for the folder itself."""
    scheme, inside = folder.partition("://")[0], name.rstrip("/") + "/"
    result = []
    for info in found:
        path = info["name"]
        if path.startswith(inside) and path != inside:
            is_folder = info["type"] == "directory" or path.endswith("/")
            path = f"{scheme}://{path.rstrip('/')}"
            result.append(Entry(path, is_folder, info.get("size") or 0, modified(info)))
    return sorted(result)


def modified(info: Mapping[str, Any]) -> int:
    """When a file was written, in nanoseconds since 1970; 0 for a folder, which has no time."""
    written = info.get("LastModified", info.get("mtime"))
    return int(written.timestamp() * 1e6) * 1000 if written else 0


@contextlib.contextmanager
def open_to_read(path: str, block: int) -> Iterator[Any]:
    """A file for reading from its beginning to its end, `block` bytes a request."""
    with os_errors(path):
        client, name = client_and_name(path)
        file = client.open(name, block_size=block, cache_type="readahead")
    with file:
        yield file


@contextlib.contextmanager
def os_errors(path: str) -> Iterator[None]:
    """Makes an OSError of whatever a cloud's client raises."""
    try:
        yield
    except FlaxclsError:
        raise
    except Exception as error:
        raise os_error(path, error) from error


def os_error(path: str, error: Exception) -> OSError:
    """The error of a cloud's client about a path as one of an operating system."""
    reason = (str(error).strip() or "no reason given").splitlines()
    if isinstance(error, FileNotFoundError):
        no_bucket = "bucket does not exist" in reason[0]
        no_bucket |= "/" not in path.partition("://")[2].rstrip("/")
        what = "there is no such bucket" if no_bucket else os.strerror(errno.ENOENT)
        return FileNotFoundError(errno.ENOENT, what)
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    names = [type(each).__name__ for each in _chain(error)]
    text = f"{names} {error}"
    codes = {code for each in _chain(error) if type(code := getattr(each, "code", None)) is int}
    denied = isinstance(error, PermissionError) or codes & {401, 403}
    if denied or any(word in text for word in _DENIED):
        return Fault(errno.EACCES, f"access is denied ({reason[-1]}){_advice(path)}")
    if "NoCredentialsError" in names or "DefaultCredentialsError" in names:
        return Fault(errno.EACCES, f"there are no credentials{_advice(path)}")
    status = f" with status {max(codes)}" if codes else ""
    said = getattr(error, "strerror", None) or reason[0].strip(", ")
    return Fault(errno.EIO, f"the store fails{status} ({names[0]}: {said})")


def _advice(path: str) -> str:
    advice = _CREDENTIALS.get(_EXTRAS.get(path.partition("://")[0], ""))
    return f": {advice}" if advice else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_beyond_the_end(error: Exception) -> bool:
    """Whether a store refuses a range because the file ends before it, as an empty one does."""
    return any(
        getattr(each, "code", None) == 416 or "InvalidRange" in str(each) for each in _chain(error)
    )


def forget_listings(path: str) -> None:
    """Makes clients of others, as etils has them, ask again what is in a bucket."""
    client, _ = client_and_name(path)
    for other in [*type(client)._cache.values()]:
        other.invalidate_cache()


def client_and_name(path: str) -> tuple[Any, str]:
    """fsspec's file system for a path, which it keeps and which threads may share, and the rest."""
    import fsspec

    protocol = path.partition("://")[0]
    # Else gcsfs asks by gRPC for the kind of a bucket; where that is blocked, before each read, for
    # up to a minute. It is read when gcsfs is imported.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        install = f"pip install 'flaxcls[{extra}]'" if extra else str(error)
        raise ConfigError(f"{path} cannot be reached: {install}") from error
    except ValueError as error:
        raise ConfigError(f"{path} has an unknown URL scheme") from error
    known = {name for each in (protocol, "gcs") for name in fsspec.config.conf.get(each, ())}
    options = {name: value for name, value in _options(protocol).items() if name not in known}
    return kind(**options), kind._strip_protocol(path)


def _options(protocol: str) -> dict[str, Any]:
    """How a store's client is set up, unless fsspec's configuration says else."""
    options: dict[str, Any] = {"use_listings_cache": False}  # of a million files, and outdated
    extra = _EXTRAS.get(protocol)
    if extra == "cloud":
        import aiohttp

        logger = logging.getLogger("gcsfs")  # which logs what it raises besides
        logger.setLevel(logger.level or logging.CRITICAL)
        options["requests_timeout"] = aiohttp.ClientTimeout(sock_connect=10, sock_read=TIMEOUT)
    if extra == "s3":
        options["config_kwargs"] = {"max_pool_connections": CONNECTIONS}
    return options
