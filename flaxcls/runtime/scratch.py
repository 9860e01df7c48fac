"""Temporary folders, of what is copied from buckets and to them, that no dead process keeps."""

import hashlib
import os
import re
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from flaxcls.runtime import machine


class _Process:
    """What lives as long as this process."""


_PROCESS = _Process()


def scratch_folder(owner: Any = _PROCESS) -> Path:
    """A new folder, which is removed when its owner is or, at the latest, the process ends.

    A process that is killed leaves its folders. They are removed here, by the next one that needs
    any on the same machine. They are in $TMPDIR, or /tmp.
    """
    place = Path(tempfile.gettempdir())
    here = f"flaxcls-{hashlib.sha256(machine.identity().encode()).hexdigest()[:8]}"
    for left in place.glob(f"{here}-*"):
        process = re.fullmatch(rf"{here}-(\d+)-(\d+)-\w+", left.name)
        if process and machine.state_of(*map(int, process.groups())) == "gone":
            shutil.rmtree(left, ignore_errors=True)
    pid = os.getpid()
    folder = tempfile.mkdtemp(prefix=f"{here}-{pid}-{machine.began(pid) or 0}-", dir=place)
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
