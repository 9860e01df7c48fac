"""Where the checkpoints of a run are, a folder for each step: on a file system or in a bucket.

Orbax reads and writes local folders alone: what is in a bucket is downloaded before it is read, and
uploaded when it is written. So a checkpoint has the same files there as here.
"""

import asyncio
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from flaxcls.buckets import AnyPath, BucketPath
from flaxcls.errors import CheckpointError
from flaxcls.runs import manifest
from flaxcls.runtime.scratch import scratch_folder

_STEP = re.compile("0|[1-9][0-9]{0,17}")
UNFINISHED = ".orbax-checkpoint-tmp"  # ends the name of the folder that Orbax is writing


class LocalCheckpoints:
    """Checkpoints on a file system, which all processes share.

    Attributes:
      path: the folder that holds them.
      working: where Orbax writes.
    """

    def __init__(self, path: Path):
        self.path = self.working = path.resolve()

    def steps(self) -> list[int]:
        """The steps that are saved, oldest first; OSError if that can't be known."""
        try:
            names = os.listdir(self.path)
        except FileNotFoundError:
            return []
        return sorted(int(name) for name in names if _STEP.fullmatch(name))

    def local(self, step: int) -> Path:
        """The folder of a step, to read."""
        return self.path / str(step)

    def forget(self) -> None:
        """What was downloaded is looked at anew."""

    def remove_unfinished(self) -> None:
        """Frees the space of what a failure or the end of a process left half written."""
        for folder in self.path.glob(f"*{UNFINISHED}"):
            shutil.rmtree(folder, ignore_errors=True)

    def quarantine(self, step: int) -> AnyPath:
        """Moves a step into the folder quarantine beside the checkpoints; where to."""
        target = _free(self.path.parent / "quarantine", step)
        target.parent.mkdir(exist_ok=True)
        return (self.path / str(step)).rename(target)


class BucketCheckpoints:
    """Checkpoints in a bucket. A step is one from the moment when its manifest is there.

    Each process has a copy of what it reads and writes in a temporary folder.
    """

    def __init__(self, path: BucketPath):
        self.path = path
        scratch = scratch_folder(self)
        self.working, self._copies = scratch / "written", scratch / "read"

    def steps(self) -> list[int]:
        """The steps that are saved, oldest first; OSError if that can't be known."""
        return _whole(self.path.files())

    def local(self, step: int) -> Path:
        """A copy of a step, to read; CheckpointError if the bucket can't be read."""
        copy = self._copies / str(step)
        if not copy.exists():
            partial = copy.with_name(f"{step}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir(parents=True)
                self._download(step, partial)
                partial.rename(copy)
            except OSError as error:
                raise CheckpointError(
                    f"the checkpoint of step {step} can't be copied from {self.path}: "
                    f"{error.strerror or error}"
                ) from error
        return copy

    def _download(self, step: int, target: Path, below: str = "") -> None:
        """The files of a step whose path begins with `below`, which may be none."""
        names = (self.path / str(step)).files()
        wanted = {name: target / name for name in names if name.startswith(below)}
        (self.path / str(step)).download(wanted)

    def forget(self) -> None:
        """What was downloaded is looked at anew."""
        shutil.rmtree(self._copies, ignore_errors=True)

    def remove_unfinished(self) -> None:
        """Removes objects of steps without manifest, and frees the space of this process's copy."""
        shutil.rmtree(self.working, ignore_errors=True)
        names = self.path.files()
        whole = set(map(str, _whole(names)))
        for step in {name.partition("/")[0] for name in names} - whole:
            (self.path / step).rmtree()

    def clear_working(self) -> None:
        """Frees the space of what was written, which is in the bucket now."""
        shutil.rmtree(self.working, ignore_errors=True)
        self.working.mkdir(parents=True)

    def publish_part(self, step: int, folder: Path, process: int) -> None:
        """Uploads what one of several processes has written into the state of a step."""
        files = _part(folder, process)
        (self.path / str(step)).upload({name: folder / name for name in files})

    def merge(self, step: int, folder: Path, processes: Collection[int]) -> None:
        """Adds to `folder` what other processes have uploaded, as Orbax does on a shared disk."""
        for process in processes:
            for below in _below(process):
                self._download(step, folder, below)
        if processes:
            asyncio.run(_merge(folder / "state"))

    def publish(
        self, step: int, folder: Path, uploaded: Collection[int], check: Callable[[], None]
    ) -> None:
        """Uploads a step that has its manifest, which comes last, so that it is whole or not there.

        Args:
          uploaded: the processes whose parts are there already.
          check: raises where nothing may be written any more; asked before the manifest is.
        """
        there = {name for process in uploaded for name in _part(folder, process)}
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        last = {manifest.NAME: files.pop(manifest.NAME)}
        target = self.path / str(step)
        target.upload({name: path for name, path in files.items() if name not in there})
        check()  # that may have taken minutes
        target.upload(last)

    def remove(self, step: int) -> None:
        """Removes a step, its manifest first, so that it is not taken for whole meanwhile."""
        (self.path / str(step) / manifest.NAME).unlink(missing_ok=True)
        (self.path / str(step)).rmtree()

    def quarantine(self, step: int) -> AnyPath:
        """Moves a step into the folder quarantine beside the checkpoints; where to."""
        target = _free(self.path.parent / "quarantine", step)
        (self.path / str(step)).copy_to(target)
        self.remove(step)
        return target


def checkpoint_folder(path: AnyPath) -> LocalCheckpoints | BucketCheckpoints:
    return BucketCheckpoints(path) if isinstance(path, BucketPath) else LocalCheckpoints(path)


def _free(folder: AnyPath, step: int) -> AnyPath:
    """The first of the names STEP, STEP.1, ... that there is not yet."""
    names = (f"{step}.{number}" if number else str(step) for number in range(10**6))
    return next(folder / name for name in names if not (folder / name).exists())


def _whole(names: Iterable[str]) -> list[int]:
    """The steps whose manifest is among some names, oldest first."""
    parts = (name.split("/") for name in names)
    return sorted(
        int(step) for step, *rest in parts if rest == [manifest.NAME] and _STEP.fullmatch(step)
    )


def _below(process: int) -> tuple[str, str]:
    """How the paths of what a process has written begin: its arrays, and their metadata."""
    return f"state/ocdbt.process_{process}/", f"state/array_metadatas/process_{process}"


def _part(folder: Path, process: int) -> list[str]:
    """The files of a checkpoint that a process has written for itself alone."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name.startswith(_below(process)))


async def _merge(state: Path) -> None:
    from etils import epath
    from orbax.checkpoint._src.serialization import ocdbt_utils, tensorstore_utils

    await ocdbt_utils.merge_ocdbt_per_process_files(
        epath.Path(state), tensorstore_utils.get_ts_context(), use_zarr3=False
    )
