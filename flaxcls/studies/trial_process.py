"""`python -m flaxcls.main` as a trial of a sweep: it saves itself and ends when the sweep has gone.

A sweep keeps the other end of standard input; that closes however the sweep ends.
"""

import os
import runpy
import signal
import sys
import threading


def _end_with_sweep() -> None:
    while os.read(sys.stdin.fileno(), 1):  # sys.stdin itself could not be closed at the end
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_end_with_sweep, daemon=True).start()
    runpy.run_module("flaxcls.main", run_name="__main__", alter_sys=True)
