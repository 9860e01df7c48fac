"""Ends a process that hangs, so that it can be restarted."""

import contextlib
import faulthandler
import os
import signal
import threading
from collections.abc import Iterator

from flaxcls.errors import HUNG_EXIT_CODE

STANDARD_ERROR = 2
TICKS = 20  # how often the watchdog checks in the time that it allows
PRINTING_SECONDS = 30


class Watchdog:
    """While it is entered, ends the process when there is no sign of life for `seconds`.

    It then prints which step was the last one and the stacks of all threads, and exits with
    HUNG_EXIT_CODE. Only time in which the process could run counts: not that of a suspended
    computer or of a process that was stopped and continued. None never ends anything.

    A thread that hangs in native code without giving Python's lock back can't be seen; JAX gives it
    back wherever it waits.
    """

    def __init__(self, seconds: float | None):
        self._seconds, self._paused = seconds, False
        self._sign: tuple[int | None] = (None,)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="flaxcls-watchdog", daemon=True)

    def alive(self, step: int) -> None:
        """A sign of life, with the number of the last step; as cheap as an assignment."""
        self._sign = (step,)  # another object every time, which is what the watchdog checks

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around what may take any time; not to be entered twice."""
        self._paused = True
        try:
            yield
        finally:
            self._sign = (self._sign[0],)
            self._paused = False

    def __enter__(self) -> "Watchdog":
        if self._seconds is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        # Checks are counted, not seconds: however long the process did not run, that is one check.
        seen, silent = self._sign, 0
        while not self._ended.wait(self._seconds / TICKS):
            if self._paused or self._sign is not seen:
                seen, silent = self._sign, 0
            else:
                silent += 1
            if silent == TICKS:
                self._end(seen[0])

    def _end(self, step: int | None) -> None:
        if hasattr(signal, "alarm"):  # printing may hang as well, in a pipe that no one reads
            signal.alarm(PRINTING_SECONDS)
        last = "there was none before" if step is None else f"the last one was step {step}"
        names = "".join(
            f"  0x{thread.ident:016x} {thread.name}\n" for thread in threading.enumerate()
        )
        text = f"flaxcls: no step for {self._seconds:g} s; {last}; the stacks of all threads follow"
        try:
            # Not by sys.stderr, whose lock the thread that hangs may hold.
            os.write(STANDARD_ERROR, f"\n{text}\n{names}".encode())
            faulthandler.dump_traceback(STANDARD_ERROR, all_threads=True)
        finally:
            os._exit(HUNG_EXIT_CODE)
