"""Which machine this is, and what has become of a process on it."""

import os
import socket
import uuid
from pathlib import Path
from typing import Literal


def identity() -> str:
    """The same for all processes that know each other by number, and for no others.

    That is a start of the kernel and, as containers of one host count their processes each for
    itself, a namespace of processes. On other systems than Linux it is the host.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"


def began(pid: int) -> int | None:
    """When a process of this machine began, in ticks since that did; None where that is unknown.

    With its number it is the process's for good: numbers are given again.
    """
    return stat[1] if (stat := _stat(pid)) else None


def state_of(pid: int, when: int | None) -> Literal["gone", "suspended", "running", "unknown"]:
    """What a process of this machine does that `began` then.

    "unknown" where the system does not tell: the process runs, or another one has its number.
    """
    if os.name != "posix":
        return "unknown"  # os.kill would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:  # another user's
        pass
    stat = _stat(pid)
    if stat is None or when is None:
        return "unknown"
    state, now = stat
    if now != when or state in "ZX":  # killed, and nobody has asked for its exit code yet
        return "gone"
    return "suspended" if state in "Tt" else "running"


def _stat(pid: int) -> tuple[str, int] | None:
    """State and beginning of a process, as Linux has them."""
    try:
        # The name, in parentheses, may hold spaces; the beginning is field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
