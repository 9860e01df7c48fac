"""What lease.json says, and how it changes from one holder to the next in one step.

In a folder (`FolderLease`) and in a bucket (`BucketLease`) that rests on different things.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from flaxcls.buckets import ABSENT, AnyPath, BucketPath, Changed
from flaxcls.config import options
from flaxcls.errors import ConfigError, FlaxclsError
from flaxcls.runtime import machine
from flaxcls.runtime.output import printable

FILE = "lease.json"
_UNKNOWN = "an unknown process"
_RELEASED = b"{}\n"  # in a bucket, where an object can't be removed on a condition everywhere

held = set[str]()  # tokens of this process, which may have several jobs: in threads, notebooks


class Holder(NamedTuple):
    """Who holds a lease: what is in the file, and a value that changes when it is renewed."""

    token: str  # of 32 hexadecimal digits, another one for each job
    host: str
    pid: int
    machine: str  # where the process has this number
    began: int | None  # as `machine.began` has it: another process may get the number
    folder: str  # of the run, on that machine: a lease may have been copied with the folder
    since: float  # seconds since 1970, by the clock of the host
    is_ending: bool = False  # it was asked to end, and is saving
    renewed: int | str = 0

    @classmethod
    def this(cls, folder: AnyPath, since: float) -> "Holder":
        """A new one for this process."""
        pid = os.getpid()
        process = (socket.gethostname(), pid, machine.identity(), machine.began(pid))
        return cls(secrets.token_hex(16), *process, str(folder.resolve()), since)

    def another(self, is_ending: bool) -> "Holder":
        """The same one with another token."""
        return self._replace(token=secrets.token_hex(16), is_ending=is_ending)

    def __str__(self) -> str:
        if not self.pid:
            return _UNKNOWN
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {printable(self.host)}, since {when}"

    @property
    def state(self) -> str:
        """As `machine.state_of`; "unknown" on another machine, and of a copied lease."""
        if self == _NOBODY:
            return "gone"
        if self.machine != machine.identity():
            return "unknown"
        if (self.pid, self.began) == (os.getpid(), machine.began(os.getpid())):
            return "running" if self.token in held else "gone"
        return machine.state_of(self.pid, self.began)


_NOBODY = Holder("0" * 32, "", 0, "", None, "", 0.0)


class FolderLease:
    """lease.json in a folder: one of several who create a file does so.

    Whoever wants to be the next creates lease.TOKEN.json, with the token of the one before, which
    only one can, and renames it. Who dies in between counts as the holder.
    """

    renewed_at = float("-inf")  # to look whether it is held costs nothing

    def __init__(self, folder: Path):
        self._path = folder / FILE

    def read(self) -> Holder | None:
        """The holder, or who is about to be it; FlaxclsError if that can't be known."""
        try:
            found = _read(self._path)
            return found and (_read(self._next(found)) or found)
        except OSError as error:
            raise FlaxclsError(f"{self._path} can't be read: {error.strerror}") from error

    def holds(self, holder: Holder) -> bool:
        """Whether the file still says so."""
        found = _read(self._path)
        return found is not None and found.token == holder.token

    def create(self, new: Holder) -> bool:
        """Whether the lease was free and is now that of `new`; makes the folder."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return _create(self._path, new)
        except FileNotFoundError:  # another job has made the folder, and taken it away again
            return False

    def replace(self, old: Holder, new: Holder) -> bool:
        """Whether the lease was that of `old` and is now that of `new`."""
        first = _read(self._path)
        if first and first.token != old.token:
            found = _read(self._next(first))
            if found is None or found.token != old.token:
                return False
            with contextlib.suppress(FileNotFoundError):  # another one has done it
                os.replace(self._next(first), self._path)  # what `old` did not come to
        if not _create(self._next(old), new):
            return False
        if not self.holds(old):  # it has ended, or another one was faster
            self._next(old).unlink(missing_ok=True)
            return False
        os.replace(self._next(old), self._path)
        return True

    def renew(self, holder: Holder) -> bool:
        """Says that the holder lives, if it still is the holder; whether it is."""
        if self.holds(holder):
            os.utime(self._path)
            return True
        return False

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _next(self, holder: Holder) -> Path:
        return self._path.with_suffix(f".{holder.token}.json")


class BucketLease:
    """lease.json in a bucket: an object is written only where its version is the expected one.

    Attributes:
      renewed_at: when its holder has last written it, by time.monotonic().
    """

    def __init__(self, folder: BucketPath):
        self._path = folder / FILE
        self._version, self.renewed_at = ABSENT, float("-inf")

    def read(self) -> Holder | None:
        """The holder; FlaxclsError if that can't be known."""
        try:
            found = self._read()
            return found and found[0]
        except OSError as error:
            kind = ConfigError if error.errno == errno.EACCES else FlaxclsError
            raise kind(f"{self._path} can't be read: {error.strerror}") from error

    def holds(self, holder: Holder) -> bool:
        """Whether the object still says so."""
        found = self._read()
        return found is not None and found[0].token == holder.token

    def create(self, new: Holder) -> bool:
        """Whether there was no lease and it is now that of `new`."""
        return self._put(_content(new), ABSENT)

    def replace(self, old: Holder, new: Holder) -> bool:
        """Whether the lease was that of `old` and is now that of `new`."""
        found = self._read()
        if found is None or found[0].token != old.token:
            return False
        return self._put(_content(new), found[1])

    def renew(self, holder: Holder) -> bool:
        """Says that the holder lives, if it still is the holder; whether it is."""
        return self._put(_content(holder, renewed=time.time_ns()), self._version)

    def remove(self) -> None:
        """It is nobody's from now on; nothing where it is that of another one."""
        self._put(_RELEASED, self._version)

    def _put(self, content: bytes, version: str) -> bool:
        began = time.monotonic()
        try:
            self._version = self._path.put(content, version)
        except Changed:
            self.renewed_at = float("-inf")
            return False
        self.renewed_at = began
        return True

    def _read(self) -> tuple[Holder, str] | None:
        """Who is in the object, and a version that it had then or just before."""
        version = self._path.version()
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        return _parsed(content, version, str(self._path.parent)), version


def lease_file(folder: AnyPath) -> FolderLease | BucketLease:
    return BucketLease(folder) if isinstance(folder, BucketPath) else FolderLease(folder)


def _create(path: Path, holder: Holder) -> bool:
    """Writes a new file; False where there is one."""
    try:
        file = path.open("xb")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(_content(holder))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _read(path: Path) -> Holder | None:
    """Who is in a file; one that is damaged, or not yet written, is that of an unknown process."""
    try:
        with path.open("rb") as file:  # opening asks a file server anew
            content, renewed = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _parsed(content, renewed, str(path.parent.resolve()))


def _content(holder: Holder, renewed: int = 0) -> bytes:
    """What is written; it is different each time where `renewed` is."""
    content = holder._asdict() | {"renewed": renewed}
    if not renewed:
        del content["renewed"]
    return (json.dumps(content, indent=2) + "\n").encode()


def _parsed(content: bytes, renewed: int | str, folder: str) -> Holder:
    """Who is in what was read; one whose lease was copied from another folder may be anywhere."""
    if content == _RELEASED:
        return _NOBODY
    try:
        holder = _holder(json.loads(content))._replace(renewed=renewed)
        return holder if holder.folder == folder else holder._replace(machine="")
    except (ValueError, TypeError, RecursionError):
        token = hashlib.sha256(content).hexdigest()[:32]
        return Holder(token, "", 0, "", None, "", 0.0, renewed=renewed)


def _holder(content: Any) -> Holder:
    """Raises ValueError or TypeError if it is none."""
    holder = Holder(**content)
    kinds = (str, str, int, str, int | None, str, float, bool)
    if not all(map(options.fits, holder, kinds)) or holder.pid < 1:
        raise ValueError
    if not 0 <= holder.since < 1e11:  # more than 3,000 years
        raise ValueError
    if not re.fullmatch("[0-9a-f]{32}", holder.token):  # it becomes the name of a file
        raise ValueError
    return holder
