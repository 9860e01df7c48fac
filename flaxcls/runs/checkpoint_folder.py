"""Where the checkpoints of a run are, a folder for each step: on a file system or in a bucket.

Orbax reads and writes local folders alone: what is in a bucket is downloaded before it is read, and
uploaded when it is written. So a checkpoint has the same files there as here.
"""

import asyncio
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from flaxcls.buckets import AnyPath, BucketPath, local_files
from flaxcls.errors import CheckpointError
from flaxcls.runs import manifest
from flaxcls.runtime.scratch import scratch_folder

_STEP = re.compile("0|[1-9][0-9]{0,17}")
# Orbax writes these after the manifest, with the time of the commit; restoring needs neither.
WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")
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

    def forget(self) -> bool:
        """What was downloaded is looked at anew; whether anything was."""
        return False

    def remove_unfinished(self, _: Callable[[], None]) -> None:
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
                there = self.path / str(step)
                names = _belonging(there, there.files())
                there.download({name: partial / name for name in names})
                partial.rename(copy)
            except OSError as error:
                raise CheckpointError(
                    f"the checkpoint of step {step} can't be copied from {self.path}: "
                    f"{error.strerror or error}"
                ) from error
        return copy

    def forget(self) -> bool:
        """What was downloaded is looked at anew; whether anything was."""
        had_any = self._copies.exists()
        shutil.rmtree(self._copies, ignore_errors=True)
        return had_any

    def remove_unfinished(self, check: Callable[[], None]) -> None:
        """Removes objects of steps without manifest, and frees the space of this process's copy."""
        shutil.rmtree(self.working, ignore_errors=True)
        names = self.path.files()
        whole = set(map(str, _whole(names)))
        for step in {name.partition("/")[0] for name in names} - whole:
            (self.path / step).rmtree(check)

    def clear_working(self) -> None:
        """Frees the space of what was written, which is in the bucket now."""
        shutil.rmtree(self.working, ignore_errors=True)
        self.working.mkdir(parents=True)

    def publish_part(self, step: int, folder: Path, process: int) -> None:
        """Uploads what one of several processes has written for itself alone: arrays and more."""
        arrays, more = f"state/ocdbt.process_{process}/", f"state/array_metadatas/process_{process}"
        files = local_files(folder).items()
        own = {name: path for name, path in files if name.startswith(arrays) or name == more}
        (self.path / str(step)).upload(own)

    def merge_parts(self, step: int, folder: Path) -> set[str]:
        """Adds to `folder` what other processes have uploaded, as Orbax does on a shared disk.

        Returns the paths of the files.
        """
        there = self.path / str(step)
        names = there.files()
        there.download({name: folder / name for name in names})
        asyncio.run(_merge(folder / "state"))
        return set(names)

    def publish(
        self, step: int, folder: Path, uploaded: Collection[str], check: Callable[[], None]
    ) -> None:
        """Uploads a step that has its manifest, which comes last, so that it is whole or not there.

        Args:
          uploaded: the files that are there already.
          check: raises where nothing may be written any more; asked before the manifest is.
        """
        files = local_files(folder)
        last = {manifest.NAME: files.pop(manifest.NAME)}
        target = self.path / str(step)
        target.upload({name: path for name, path in files.items() if name not in uploaded})
        check()  # that may have taken minutes
        target.upload(last)

    def remove(self, step: int, check: Callable[[], None] = lambda: None) -> None:
        """Removes a step, its manifest first, so that it is not taken for whole meanwhile.

        `check` is asked before each request: whoever was suspended meanwhile may not go on.
        """
        check()
        (self.path / str(step) / manifest.NAME).unlink(missing_ok=True)
        (self.path / str(step)).rmtree(check)

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


def _belonging(step: BucketPath, names: Collection[str]) -> Collection[str]:
    """Those files of a step that its manifest lists, and those that Orbax writes after it.

    A job that was suspended in the middle of an upload, and has lost the run, may have added others
    when it woke up; they are not read. Where the manifest says nothing all are, and it is damaged.
    """
    try:
        listed = json.loads((step / manifest.NAME).read_bytes())["files"].keys()
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return names
    last = (manifest.NAME, *WRITTEN_LAST)
    return [name for name in names if name in listed or name in last]


def _whole(names: Iterable[str]) -> list[int]:
    """The steps whose manifest is among some names, oldest first."""
    parts = (name.split("/") for name in names)
    return sorted(
        int(step) for step, *rest in parts if rest == [manifest.NAME] and _STEP.fullmatch(step)
    )


async def _merge(state: Path) -> None:
    from etils import epath
    from orbax.checkpoint._src.serialization import ocdbt_utils, tensorstore_utils

    await ocdbt_utils.merge_ocdbt_per_process_files(
        epath.Path(state), tensorstore_utils.get_ts_context(), use_zarr3=False
    )
