"""Folders and processes for the time of a measurement, which end with it, by a signal as well."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flaxcls.errors import SIGNAL_EXIT_CODES


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """An empty folder that is removed at the end."""
    name = tempfile.mkdtemp(prefix="flaxcls-bench-")
    with at_signal(lambda: shutil.rmtree(name, ignore_errors=True)):
        try:
            yield Path(name)
        finally:
            shutil.rmtree(name, ignore_errors=True)


@contextlib.contextmanager
def at_signal(clean_up: Callable[[], None]) -> Iterator[None]:
    """Cleans up before a signal ends the process, which it does at once: see `cli.run`."""
    before = {number: signal.getsignal(number) for number in SIGNAL_EXIT_CODES}
    handled = [number for number, handler in before.items() if handler != signal.SIG_IGN]

    def end(number: int, frame: Any) -> None:
        clean_up()
        handler = before[number]
        if callable(handler):
            handler(number, frame)
        os._exit(SIGNAL_EXIT_CODES[number])

    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, before[number])
