"""Signals that ask a run to end, in one process or several."""

import os
import signal
import threading
from typing import Any

from jax.experimental import multihost_utils

from flaxcls.errors import SIGNAL_EXIT_CODES
from flaxcls.runtime import processes


class StopRequest:
    """While it is entered, signals to end (SIGNAL_EXIT_CODES) ask the run to end after a step.

    A second Ctrl-C acts at once; the others, which schedulers may send again, don't. Of several
    processes any may get it: JAX's preemption service, which SIGTERM wakes, finds the step at
    which all can stop.
    """

    _received: int | None = None
    _asked = 0  # how often; in step with the other processes
    _stops = False

    def __enter__(self) -> "StopRequest":
        self._alone = processes.count() == 1
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self  # where Python takes no handlers: who has started the thread gets signals
        # What is ignored stays so, as a hang-up is by nohup; but Ctrl-C, which shells make all that
        # they start in the background ignore, may be sent on purpose.
        ignored = {n for n in SIGNAL_EXIT_CODES if signal.getsignal(n) == signal.SIG_IGN}
        ignored.discard(signal.SIGINT)
        # JAX's own handler of SIGTERM, which notifies the others, is not Python's.
        kept = ignored if self._alone else {*ignored, signal.SIGTERM}
        handled = [n for n in SIGNAL_EXIT_CODES if n not in kept]
        self._before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            self.__exit__()
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self) -> int | None:
        """The signal, if the run is to end after this step; to be asked after every step."""
        if self._alone:
            return self._received
        self._asked += 1
        if multihost_utils.reached_preemption_sync_point(self._asked):
            self._stops = True
        return signal.SIGTERM if self._stops else None

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
