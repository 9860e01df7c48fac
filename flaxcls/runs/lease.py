"""A run belongs to one job: lease.json in its folder says to which.

Who trains in a folder holds its lease, from before anything is read until the end. Another job is
refused with RunTakenError. The lease of a job that is dead is taken over:

- A process of this machine (see `machine.identity`) is known to be dead, at once.
- Any other one is dead when its lease has not been renewed for SILENT_SECONDS. The holder renews it
  every RENEWAL_SECONDS, by the time of the file's last change, for which a full disk has room, or
  by a new version of the object; and who waits measures by its own clock for how long that stays as
  it is, as clocks of hosts differ.

A job that was suspended or cut off meanwhile finds another one's token in the file. `Lease.check`
is therefore asked before anything is written to the run's folder: what is left is the moment
between a check and the write that it is for, and checkpoints, which are as they were written or
are not used.

What this rests on is in `lease_file`. In a bucket, where each look takes a request, a lease that
was renewed just now is not looked at: nobody takes it over so soon.
"""

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator

from flaxcls.buckets import AnyPath
from flaxcls.errors import ConfigError, FlaxclsError, RunTakenError
from flaxcls.remote import is_remote
from flaxcls.runs import lease_file
from flaxcls.runs.lease_file import FILE, BucketLease, FolderLease, Holder
from flaxcls.runtime.output import printable

RENEWAL_SECONDS = 5.0
SILENT_SECONDS = 60.0  # without renewal, after which the holder is dead
ENDING_SECONDS = 120.0  # that a holder which was asked to end has to save; launchers give as much
_POLL_SECONDS = 0.5
# Where nobody can make a file, so that nobody trains: read-only, forbidden, no folder at all.
_NO_FOLDER = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
_NO_FOLDER += (errno.ENAMETOOLONG,)


class Lease:
    """The right to write into a run's folder; see `hold`.

    Args:
      file: None for what needs no lease, such as a process whose first one has it.
    """

    def __init__(self, file: FolderLease | BucketLease | None = None, holder: Holder | None = None):
        self._file, self._holder = file, holder
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="flaxcls-lease", daemon=True)

    def is_held(self) -> bool:
        """Whether this job still holds it; a file that can't be read does not say the contrary.

        A bucket that can't be read does when the time is up after which another job may take over.
        """
        if self._file is None:
            return True
        silent = time.monotonic() - self._file.renewed_at
        if silent < SILENT_SECONDS / 2:
            return True
        try:
            with self._lock:
                return self._file.holds(self._holder)
        except OSError:  # what is to be written will fail by itself
            return silent < SILENT_SECONDS or isinstance(self._file, FolderLease)

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
        new = self._holder.another(is_ending=True)
        lease_file.held.add(new.token)
        with self._lock, contextlib.suppress(OSError):
            if self._file.replace(self._holder, new):
                lease_file.held.discard(self._holder.token)
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
            lease_file.held.discard(self._holder.token)

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL_SECONDS):
            with contextlib.suppress(OSError), self._lock:
                if not self._file.renew(self._holder):
                    return


NO_LEASE = Lease()


@contextlib.contextmanager
def hold(folder: AnyPath | None, say: Callable[[str], None]) -> Iterator[Lease]:
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
    lease, new = NO_LEASE, list[AnyPath]()
    try:
        if not is_remote(folder):  # in a bucket there are no folders
            new = [path for path in (folder, *folder.parents) if not path.exists()]
        lease = _take(lease_file.lease_file(folder), folder, say)
    except OSError as error:
        if is_remote(folder) and isinstance(error, FileNotFoundError):
            raise ConfigError(f"there is no bucket for {folder}, or no right to see it") from error
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


def _take(file: FolderLease | BucketLease, folder: AnyPath, say: Callable[[str], None]) -> Lease:
    """Takes the lease where it is free or its holder dead."""
    mine = Holder.this(folder, time.time())
    lease_file.held.add(mine.token)
    try:
        while True:
            found = file.read()
            if found is None:
                if file.create(mine):
                    return Lease(file, mine)
            elif _is_dead(found, file, folder, say) and file.replace(found, mine):
                return Lease(file, mine)
    except BaseException:
        lease_file.held.discard(mine.token)
        raise


def _is_dead(
    found: Holder, file: FolderLease | BucketLease, folder: AnyPath, say: Callable[[str], None]
) -> bool:
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


def _taken(folder: AnyPath, holder: Holder) -> RunTakenError:
    note = ""
    if holder.state == "suspended":
        note = f" (it is suspended: `kill -CONT {holder.pid}` resumes, `kill -KILL` ends it)"
    return RunTakenError(
        f"another job trains in {printable(folder)}: {holder}{note}; end it first, or give another "
        "--workdir"
    )
