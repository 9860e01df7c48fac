"""Where processes that save together wait for one another.

Orbax lets each write its part and wait until all have written theirs, for as long as a save may
take: minutes. A process whose disk fails does not come there. It goes on to the end of its save
instead, and on its way tells the others here, who then need not wait.
"""

import contextlib
import itertools
import sys
import threading

import jax

from flaxcls.errors import CheckpointError
from flaxcls.runs.checkpoint_reader import cause_of
from flaxcls.runtime import processes

# As Orbax names them, in their order; were it to rename them, the others would wait their time.
_WRITTEN, _COMMITTED = "async_write_complete", "async_commit_complete"
UPLOADED = "flaxcls_parts_uploaded"  # in between, where what they write goes to a bucket
_ALL = (_WRITTEN, UPLOADED, _COMMITTED)
_saves = itertools.count(1)  # of this process; in step with the others


class SaveBarrier:
    """What Orbax calls, in the thread that saves, to wait for the other processes.

    `begin` is to be called before each save, by all processes, when none is still saving, in the
    thread that asks for it.

    Attributes:
      failure: why this save failed, and in which process; "" if it did not.
    """

    def __init__(self):
        self._save, self.failure = 0, ""
        self._asking: int | None = None  # the thread

    def begin(self) -> None:
        """Forgets the last save."""
        for name in _ALL:
            processes.withdraw(self._key(name))
        self._save, self.failure, self._asking = next(_saves), "", threading.get_ident()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes are here.

        Raises CheckpointError at once if one of them failed to write its part or, in process 0, to
        complete the checkpoint; JaxRuntimeError when the time is up.
        """
        error = None if threading.get_ident() == self._asking else sys.exception()
        if error:  # Orbax comes here while it handles that
            self.failure = self.failure or f"process {processes.index()}: {cause_of(error)}"
            for name in _ALL:
                self._post(name, self.failure)
        for name in _ALL:
            if name in key:
                self._post(name, "")
                told = processes.posted(self._key(name), timeout_ms / 1000)
                self.failure = next(filter(None, told), "")
                if self.failure:
                    raise CheckpointError(self.failure)
                return
        processes.wait_at_barrier(key, timeout_ms / 1000)

    def _post(self, name: str, text: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # what is said first stays
            processes.post(self._key(name), text)

    def _key(self, name: str) -> str:
        return f"flaxcls/save/{self._save}/{name}"
