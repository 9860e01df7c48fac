"""Metrics for Weights & Biases and MLflow, which may never stop or slow a run.

Each service has a process of its own (`tracker_process`): its client may hang, fail, print or
change the interpreter as it likes. What it is sent goes into a pipe, which holds some hundred rows;
the run never waits for room in it, and at its end only some seconds for the process.
"""

import contextlib
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxcls.buckets import AnyPath
from flaxcls.errors import ConfigError
from flaxcls.files import read_json, write_json
from flaxcls.runs.tracker_process import MOST_LETTERS

FILE = "trackers.json"
_SCRIPT = Path(__file__).with_name("tracker_process.py")
CLOSING_SECONDS = 10  # that the end of a run waits for the services


class Trackers:
    """The services that a run is logged to. No method waits or raises, but `close` waits a little.

    Args:
      log_to: which services.
      workdir: the run's folder; FILE in it keeps the id by which a resumed run is continued.
      config: the run's, flat.
      say: prints a line.
    """

    def __init__(
        self,
        log_to: Sequence[str],
        workdir: AnyPath,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        self._pipes: list[_Pipe] = []
        if not log_to:
            return
        run = {
            "id": _run_id(workdir, say),
            "name": workdir.resolve().name,
            "config": {name: _short(value) for name, value in config.items()},
        }
        for name in log_to:
            try:
                self._pipes.append(_Pipe(name, say))
            except OSError as error:
                say(f"note: the process that logs to {name} can't be started: {error.strerror}")
            else:
                self._pipes[-1].send({"service": name, **run})

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Sends a row of metrics, except those that are NaN, the mean of nothing."""
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        row = {"step": step, "milliseconds": round(1000 * time.time()), "values": known}
        for pipe in self._pipes:
            pipe.send(row)

    def close(self, end: str) -> None:
        """Says that the run has "finished", "failed" or was "preempted"; waits CLOSING_SECONDS."""
        deadline = time.monotonic() + CLOSING_SECONDS
        for pipe in self._pipes:
            pipe.end(end)
        for pipe in self._pipes:
            pipe.close(deadline)
        self._pipes = []


def _run_id(workdir: AnyPath, say: Callable[[str], None]) -> str:
    """The id of the run at all services, for good: 16 hexadecimal digits."""
    with contextlib.suppress(ConfigError):
        kept = str((read_json(workdir / FILE) or {}).get("id"))
        if re.fullmatch("[0-9a-f]{16}", kept):
            return kept
    new = secrets.token_hex(8)
    try:
        write_json(workdir / FILE, {"id": new})
    except OSError as error:
        say(f"{workdir / FILE} can't be written: {error.strerror}; resumed, it is another run")
    return new


def _short(value: Any) -> Any:
    """A value of the config as JSON; a long one as the beginning of its text."""
    return value if len(json.dumps(value)) <= MOST_LETTERS else str(value)[:MOST_LETTERS]


class _Pipe:
    """To and from the process of one service, without ever waiting for it."""

    def __init__(self, name: str, say: Callable[[str], None]):
        self._name, self._say = name, say
        self._unsent, self._unread = b"", b""
        self._has_warned = False
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],  # -P: beside it are modules with common names
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run
        )
        for stream in (self._process.stdin, self._process.stdout):
            os.set_blocking(stream.fileno(), False)

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message or, where there is no room for it, drops it."""
        self._listen()
        self._flush()
        if not self._unsent:
            self._unsent = _line(message)
            self._flush()
        elif self._process.poll() is None:
            self._warn_once("does not keep up")
        else:
            self._warn_once("has lost its process")

    def end(self, end: str) -> None:
        self._unsent += _line({"end": end})
        self._flush()

    def close(self, deadline: float) -> None:
        """Waits until the process has ended, and ends it at the deadline."""
        while self._process.poll() is None and time.monotonic() < deadline:
            self._flush()
            self._listen()
            time.sleep(0.01)
        self._listen()
        if self._process.poll() is None:
            self._warn_once(f"has not answered in {CLOSING_SECONDS} s")
            with contextlib.suppress(OSError):
                if hasattr(os, "killpg"):
                    os.killpg(self._process.pid, signal.SIGKILL)  # and what it has started
                else:
                    self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()

    def _warn_once(self, what: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._say(f"note: {self._name} {what}: rows are missing there; metrics.jsonl has all")

    def _flush(self) -> None:
        with contextlib.suppress(OSError):  # it has ended
            while self._unsent:
                sent = self._process.stdin.write(self._unsent)
                if not sent:
                    return
                self._unsent = self._unsent[sent:]

    def _listen(self) -> None:
        """Prints what the process has to say."""
        while part := self._process.stdout.read(2**16):
            self._unread += part
        *lines, self._unread = self._unread.split(b"\n")
        for line in lines:
            self._say(line.decode(errors="replace"))


def _line(message: Mapping[str, Any]) -> bytes:
    return (json.dumps(message) + "\n").encode()
