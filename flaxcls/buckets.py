"""Objects in buckets ("gs://bucket/run/config.json", "s3://..."), with the methods of pathlib.Path.

`flaxcls.remote` reads and writes them. What is different from a file system:

- An object is written whole, in one step, and nothing is renamed or appended to.
- Folders are only the beginnings of names: they are there as long as something is in them.
- An object has a version, another one each time it is written: `put` replaces only the one that is
  expected, which is what one of several writers can rely on.
"""

import contextlib
import errno
import fnmatch
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeAlias

from flaxcls import remote
from flaxcls.errors import ConfigError

SCHEMES = ("gs", "s3")  # of stores that can write an object on a condition
ABSENT = ""  # the version of an object that is not there


class Status(NamedTuple):
    """What os.stat says, as far as objects have it."""

    st_size: int  # bytes
    st_mtime: float  # seconds since 1970

    @property
    def st_mtime_ns(self) -> int:
        return int(self.st_mtime * 1e9)


class Changed(OSError):
    """An object has another version than was expected: somebody else has written it."""


class BucketPath:
    """The name of an object, or of the folder that objects are in; str() is its URL.

    Whatever the store answers, what is raised is an OSError with a `strerror`: FileNotFoundError,
    PermissionError, `Changed` and so on. It has no __fspath__, so that nothing takes it for a file.
    """

    def __init__(self, url: str):
        self._scheme, _, name = url.partition("://")
        self._name = PurePosixPath(name)

    # The name.

    def __str__(self) -> str:
        return f"{self._scheme}://{self._name}"

    def __repr__(self) -> str:
        return f"BucketPath('{self}')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BucketPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: "BucketPath") -> bool:
        return str(self) < str(other)

    def __truediv__(self, name: str | PurePosixPath) -> "BucketPath":
        return self._with(self._name / name)

    @property
    def name(self) -> str:
        return self._name.name

    @property
    def parent(self) -> "BucketPath":
        return self._with(self._name.parent)

    @property
    def parents(self) -> list["BucketPath"]:
        """The folders above, as far as the bucket."""
        return [self._with(path) for path in self._name.parents if path.name]

    def with_name(self, name: str) -> "BucketPath":
        return self._with(self._name.with_name(name))

    def match(self, pattern: str) -> bool:
        return self._name.match(pattern)

    def resolve(self) -> "BucketPath":
        return self

    absolute = expanduser = resolve

    def _with(self, name: PurePosixPath) -> "BucketPath":
        return BucketPath(f"{self._scheme}://{name}")

    # What is there.

    def exists(self) -> bool:
        return self._info() is not None

    def is_file(self) -> bool:
        return (self._info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self._info() or {}).get("type") == "directory"

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> Status:
        info = remote.information(str(self))
        return Status(info.get("size") or 0, remote.modified(info) / 1e9)

    def iterdir(self) -> Iterator["BucketPath"]:
        yield from (BucketPath(entry.path) for entry in remote.entries(str(self)))

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """What is directly in the folder and has such a name."""
        yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def files(self) -> dict[str, Status]:
        """All that is below the folder, by its path from there; empty where there is no folder."""
        return {
            entry.path.removeprefix(f"{self}/"): Status(entry.size, entry.time / 1e9)
            for entry in remote.below(str(self))
        }

    # Reading.

    def read_bytes(self) -> bytes:
        with self._os_errors():
            return self._client.cat_file(str(self))

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def open(self, mode: str = "r") -> io.IOBase:
        """A file in memory of what is in the object; "r" or "rb"."""
        content = io.BytesIO(self.read_bytes())
        return content if mode == "rb" else io.TextIOWrapper(content, encoding="utf-8")

    def version(self) -> str:
        """What `put` takes; ABSENT where there is no object."""
        info = self._info()
        return str(info.get("generation") or info.get("ETag")) if info else ABSENT

    # Writing.

    def write_bytes(self, content: bytes) -> None:
        remote.write(str(self), content)

    def write_text(self, text: str) -> None:
        self.write_bytes(text.encode())

    def put(self, content: bytes, version: str) -> str:
        """Writes an object of which there is a version, or none; returns the new one.

        Raises:
          Changed: the object has another version, and is as it was.
        """
        try:
            with self._os_errors():
                return _PUT[self._scheme](self._client, self._name, content, version)
        except OSError:
            now = self.version()
            if now == version:
                raise
            # A request whose answer is lost is repeated, and then finds what it wrote itself.
            if now == ABSENT or self.read_bytes() != content:
                what = "another process has written or removed it"
                raise Changed(errno.EEXIST, what, str(self)) from None
            return now

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            remote.remove(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a folder is there when something is in it."""

    def rmdir(self) -> None:
        """Nothing: an empty folder is not there."""

    def rmtree(self, check: Callable[[], None] = lambda: None) -> None:
        """Removes everything below the folder, what there is of it; `check` is asked before."""
        with contextlib.suppress(FileNotFoundError), self._os_errors():
            if names := self._client.find(str(self)):
                check()
                self._client.rm(names)

    def upload(self, files: Mapping[str, Path]) -> None:
        """Writes local files as objects below the folder, several at a time.

        Raises:
          Changed: one is there already, and is not the same.
        """
        if not files:
            return
        try:
            with self._os_errors():
                self._client.put(
                    [str(path) for path in files.values()],
                    [str(self / name) for name in files],
                    mode="create",
                    chunksize=remote.CHUNK,
                )
        except FileExistsError:  # see `put`
            for name, path in files.items():
                (self / name).put(path.read_bytes(), ABSENT)

    def upload_folder(self, folder: Path) -> None:
        """Writes all files of a local folder, at any depth, as objects below this one."""
        self.upload(local_files(folder))

    def copy_to(self, target: "BucketPath") -> None:
        """Copies all that is below the folder, within the store."""
        with self._os_errors():
            names = [self._with(PurePosixPath(name)) for name in self._client.find(str(self))]
            targets = [str(target / name._name.relative_to(self._name)) for name in names]
            self._client.copy(list(map(str, names)), targets)

    def download(self, files: Mapping[str, Path]) -> None:
        """Writes objects below the folder, by their path in it, into local files."""
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        if files:
            with self._os_errors():
                self._client.get(
                    [str(self / name) for name in files], [str(path) for path in files.values()]
                )

    # How.

    @property
    def _client(self) -> Any:
        return remote.client_and_name(str(self))[0]

    def _info(self) -> dict[str, Any] | None:
        try:
            return remote.information(str(self))
        except FileNotFoundError:
            return None

    def _os_errors(self) -> contextlib.AbstractContextManager[None]:
        return remote.os_errors(str(self))


def local_files(folder: Path) -> dict[str, Path]:
    """What `BucketPath.upload` takes: all files of a local folder by their path in it."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


AnyPath: TypeAlias = Path | BucketPath


def as_path(path: str | os.PathLike | BucketPath, what: str = "") -> AnyPath:
    """The path of a file or, for "gs://bucket/name" and "s3://bucket/name", of an object.

    Args:
      what: for a sentence, such as "--workdir=".

    Raises:
      ConfigError: it is in another cloud, or the package for this one is not installed.
    """
    if isinstance(path, BucketPath):
        return path
    if not remote.is_remote(path):
        return Path(path).expanduser()
    url = os.fspath(path)
    scheme, _, name = url.partition("://")
    if scheme not in SCHEMES or not name.strip("/"):
        raise ConfigError(f"{what}{url} must be a folder, gs://BUCKET/... or s3://BUCKET/...")
    remote.client_and_name(url)
    return BucketPath(url)


def _put_gs(client: Any, name: PurePosixPath, content: bytes, version: str) -> str:
    """https://cloud.google.com/storage/docs/request-preconditions, which gcsfs has for ABSENT."""
    bucket, *key = name.parts
    answer = client.call(
        "POST",
        f"{client.base.replace('/storage/v1/', '/upload/storage/v1/')}b/{bucket}/o",
        uploadType="media",
        name="/".join(key),
        ifGenerationMatch=version or "0",
        data=content,
        headers={"Content-Type": "application/octet-stream"},
        json_out=True,
    )
    return str(answer["generation"])


def _put_s3(client: Any, name: PurePosixPath, content: bytes, version: str) -> str:
    """https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html"""
    bucket, *key = name.parts
    condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
    answer = client.call_s3(
        "put_object", Bucket=bucket, Key="/".join(key), Body=content, **condition
    )
    return str(answer["ETag"])


_PUT = {"gs": _put_gs, "s3": _put_s3}
