"""The log of broken images in a run's folder."""

import contextlib
from collections.abc import Callable

from flaxcls.buckets import AnyPath
from flaxcls.files import append_line
from flaxcls.runs.lease import NO_LEASE, Lease
from flaxcls.runtime import output, processes

MOST_BYTES = 4_000_000  # of a log: each restart names the same images again


def broken_images_log(workdir: AnyPath, lease: Lease = NO_LEASE) -> Callable[[str], None]:
    """Notes a sentence about a broken image in broken_images.log and on standard error.

    Every process notes those that it meets itself, but 0 in a file with its number. A log that has
    MOST_BYTES takes no more, which its last line says.
    """
    number = "" if processes.is_first() else f".{processes.index()}"
    path = workdir / f"broken_images{number}.log"

    def report(sentence: str) -> None:
        output.say(f"flaxcls: {sentence}", error=True)
        if not lease.is_held():  # which ends the run soon
            return
        with contextlib.suppress(OSError):  # a full disk
            workdir.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size >= MOST_BYTES:
                return
            if append_line(path, sentence) >= MOST_BYTES:
                size = f"{MOST_BYTES / 1e6:g} MB"
                full = f"{path} has {size} and is full: more is said on standard error only"
                append_line(path, full)
                output.say(f"flaxcls: {full}", error=True)

    return report
