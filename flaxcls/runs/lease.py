"""A run belongs to one job: lease.json in its folder says to which.

Who trains in a folder holds its lease, from before anything is read until the end. Another job is
refused with RunTakenError. The lease of a job that is dead is taken over:

- A process of this machine (see `machine.identity`) is known to be dead, at once.
- Any other one is dead when its lease has not been renewed for SILENT_SECONDS. The holder renews it
  every RENEWAL_SECONDS, by the time of the file's last change, for which a full disk has room; and
  who waits measures by its own clock for how long that stays as it is, as clocks of hosts differ.

A job that was suspended or cut off meanwhile finds another one's token in the file. `Lease.check`
is therefore asked before anything is written to the run's folder: what is left is the moment
between a check and the write that it is for, and checkpoints, which are as they were written or
are not used.

What this rests on is that one of several who create a file does so (`_LeaseFile`); in a bucket that
is a condition on the object's generation.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flaxcls.config import options
from flaxcls.errors import FlaxclsError, RunTakenError
from flaxcls.runtime import machine
from flaxcls.runtime.output import printable

FILE = "lease.json"
RENEWAL_SECONDS = 5.0
SILENT_SECONDS = 60.0  # without renewal, after which the holder is dead
ENDING_SECONDS = 120.0  # that a holder which was asked to end has to save; launchers give as much
_POLL_SECONDS = 0.5
_UNKNOWN = "an unknown process"
# Where nobody can make a file, so that nobody trains: read-only, forbidden, no folder at all.
_NO_FOLDER = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
_NO_FOLDER += (errno.ENAMETOOLONG,)

_held = set[str]()  # tokens of this process, which may have several jobs: in threads, notebooks


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
    renewed: int = 0

    @classmethod
    def this(cls, folder: Path, since: float, is_ending: bool = False) -> "Holder":
        """A new one for this process."""
        pid = os.getpid()
        process = (socket.gethostname(), pid, machine.identity(), machine.began(pid))
        return cls(secrets.token_hex(16), *process, str(folder.resolve()), since, is_ending)

    def __str__(self) -> str:
        if not self.pid:
            return _UNKNOWN
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {printable(self.host)}, since {when}"

    @property
    def state(self) -> str:
        """As `machine.state_of`; "unknown" on another machine, and of a copied lease."""
        if self.machine != machine.identity():
            return "unknown"
        if (self.pid, self.began) == (os.getpid(), machine.began(os.getpid())):
            return "running" if self.token in _held else "gone"
        return machine.state_of(self.pid, self.began)


class _LeaseFile:
    """lease.json of a folder, which changes from one holder to the next in one step.

    Whoever wants to be the next creates lease.TOKEN.json, with the token of the one before, which
    only one can, and renames it. Who dies in between counts as the holder.
    """

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

    def renew(self) -> None:
        os.utime(self._path)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def _next(self, holder: Holder) -> Path:
        return self._path.with_suffix(f".{holder.token}.json")


class Lease:
    """The right to write into a run's folder; see `hold`.

    Args:
      file: None for what needs no lease, such as a process whose first one has it.
    """

    def __init__(self, file: _LeaseFile | None = None, holder: Holder | None = None):
        self._file, self._holder = file, holder
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="flaxcls-lease", daemon=True)

    def is_held(self) -> bool:
        """Whether this job still holds it; a file that can't be read does not say the contrary."""
        if self._file is None:
            return True
        try:
            with self._lock:
                return self._file.holds(self._holder)
        except OSError:  # what is to be written will fail by itself
            return True

    def check(self) -> None:
        """Raises RunTakenError if another job has taken the run over; asked before each write."""
        if not self.is_held():
            other = self._file.read()
            now = f"it is now that of {other}" if other else f"its {FILE} is gone"
            raise RunTakenError(
                f"this job was suspended or cut off, and the run was taken over: {now}; nothing "
                "more is written by this one"
            )

    def announce_end(self) -> None:
        """Says that the run was asked to end: who wants to resume it waits until it is saved."""
        if self._file is None:
            return
        new = Holder.this(Path(self._holder.folder), self._holder.since, is_ending=True)
        _held.add(new.token)
        with self._lock, contextlib.suppress(OSError):
            if self._file.replace(self._holder, new):
                _held.discard(self._holder.token)
                self._holder = new

    def begin(self) -> None:
        """From now on it is renewed."""
        if self._file:
            self._thread.start()

    def release(self) -> None:
        """Ends it, if it is still held: the next job need not wait."""
        self._ended.set()
        if self._file:
            if self._thread.is_alive():
                self._thread.join()
            with contextlib.suppress(OSError):
                if self._file.holds(self._holder):
                    self._file.remove()
            _held.discard(self._holder.token)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL_SECONDS):
            with contextlib.suppress(OSError):
                if not self.is_held():
                    return
                self._file.renew()


NO_LEASE = Lease()


@contextlib.contextmanager
def hold(folder: Path | None, say: Callable[[str], None]) -> Iterator[Lease]:
    """Holds the lease of a run's folder, which is made if it is not there, and goes if it is empty.

    Args:
      folder: of the run; None in processes whose first one holds the lease for all.
      say: gets a sentence where the lease may be that of a dead job, which takes SILENT_SECONDS to
        find out; at the longest, for one that is ending, ENDING_SECONDS more.

    Raises RunTakenError if another job holds it, and FlaxclsError where the disk fails or is full.
    Where nobody may write there is no lease: a run that has finished needs none there, and any
    other one ends when it begins to write.
    """
    if folder is None:
        yield NO_LEASE
        return
    lease, new = NO_LEASE, list[Path]()
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        lease = _take(_LeaseFile(folder), folder, say)
    except OSError as error:
        if error.errno not in _NO_FOLDER:
            raise FlaxclsError(f"{folder / FILE} can't be written: {error.strerror}") from error
    try:
        lease.begin()
        yield lease
    finally:
        lease.release()
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()


def _take(file: _LeaseFile, folder: Path, say: Callable[[str], None]) -> Lease:
    """Takes the lease where it is free or its holder dead."""
    mine = Holder.this(folder, time.time())
    _held.add(mine.token)
    try:
        while True:
            found = file.read()
            if found is None:
                if file.create(mine):
                    return Lease(file, mine)
            elif _is_dead(found, file, folder, say) and file.replace(found, mine):
                return Lease(file, mine)
    except BaseException:
        _held.discard(mine.token)
        raise


def _is_dead(found: Holder, file: _LeaseFile, folder: Path, say: Callable[[str], None]) -> bool:
    """True if the holder of a lease is dead, False if it has another holder by now.

    Raises RunTakenError if it is alive; that may take as long as `hold` says.
    """
    if found.state == "gone":
        return True
    if found.state != "unknown" and not found.is_ending:
        raise _taken(folder, found)
    what = "is about to end" if found.is_ending else "may still train there"
    waiting = (
        f"{printable(folder)} belongs to {found}, which {what}: waiting until it has ended, or for "
        f"{SILENT_SECONDS:g} s without a sign of life"
    )
    began = changed = time.monotonic()
    renewed = found.renewed
    while time.monotonic() - changed < SILENT_SECONDS:
        time.sleep(_POLL_SECONDS)
        now = file.read()
        if now is None or now.token != found.token or now.state == "gone":
            return False  # to be looked at anew
        if waiting:
            say(waiting)
            waiting = ""
        if now.renewed != renewed:
            renewed, changed = now.renewed, time.monotonic()
            if not found.is_ending or changed - began > ENDING_SECONDS:
                raise _taken(folder, found)
    say(f"no sign of life for {SILENT_SECONDS:g} s: this job takes the run over")
    return True


def _taken(folder: Path, holder: Holder) -> RunTakenError:
    note = ""
    if holder.state == "suspended":
        note = f" (it is suspended: `kill -CONT {holder.pid}` resumes, `kill -KILL` ends it)"
    return RunTakenError(
        f"another job trains in {printable(folder)}: {holder}{note}; end it first, or give another "
        "--workdir"
    )


def _create(path: Path, holder: Holder) -> bool:
    """Writes a new file; False where there is one."""
    try:
        file = path.open("x")
    except FileExistsError:
        return False
    try:
        with file:
            content = {name: value for name, value in holder._asdict().items() if name != "renewed"}
            file.write(json.dumps(content, indent=2) + "\n")
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
    try:
        holder = _holder(json.loads(content))._replace(renewed=renewed)
        is_copy = holder.folder != str(path.parent.resolve())
        return holder._replace(machine="") if is_copy else holder
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
