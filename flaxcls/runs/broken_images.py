"""The log of broken images in a run's folder."""

import contextlib
from collections.abc import Callable

from flaxcls.buckets import AnyPath
from flaxcls.files import append_line
from flaxcls.runs.lease import NO_LEASE, Lease
from flaxcls.runtime import output, processes


def broken_images_log(workdir: AnyPath, lease: Lease = NO_LEASE) -> Callable[[str], None]:
    """Notes a sentence about a broken image in broken_images.log and on standard error.

    Every process notes those that it meets itself, but 0 in a file with its number.
    """
    number = "" if processes.is_first() else f".{processes.index()}"

    def report(sentence: str) -> None:
        output.say(f"flaxcls: {sentence}", error=True)
        if not lease.is_held():  # which ends the run soon
            return
        with contextlib.suppress(OSError):  # a full disk
            workdir.mkdir(parents=True, exist_ok=True)
            append_line(workdir / f"broken_images{number}.log", sentence)

    return report
