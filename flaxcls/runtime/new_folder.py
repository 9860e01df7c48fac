"""The folder that `--out` names: it is there when all that is in it is written, or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flaxcls.buckets import AnyPath, BucketPath
from flaxcls.errors import ConfigError, OutputError
from flaxcls.runtime.output import printable
from flaxcls.runtime.scratch import scratch_folder


@contextlib.contextmanager
def new_folder(out: AnyPath) -> Iterator[Path]:
    """Yields a folder that becomes `out` when the block ends well, and goes if it does not.

    In a bucket it is uploaded then. ConfigError where there is something at `out`, or no folder for
    it; OutputError where it can't be renamed at the end. What the block writes in it should be
    `written`.
    """
    if isinstance(out, BucketPath):
        with written(out, ConfigError):
            if out.exists():
                raise ConfigError(f"--out={out} is there already; name a new folder")
        folder = scratch_folder()
        yield folder
        with written(out):
            out.upload_folder(folder)
        return
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out={printable(out)} is there already; name a new folder")
    with written(out, ConfigError):
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    try:
        folder.chmod(0o777 & ~_umask())  # mkdtemp's are private
        yield folder
        with written(out):
            os.replace(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@contextlib.contextmanager
def written(out: AnyPath, kind: type[Exception] = OutputError) -> Iterator[None]:
    """Around writing into `out`: OutputError in a sentence for what the system says."""
    try:
        yield
    except OSError as error:
        raise kind(f"--out={printable(out)} can't be written: {error.strerror or error}") from error
