"""Checkpoints of a run, saved in the background; only this module and the reader use Orbax.

It is imported when it is first needed: that takes a tenth of a second, and a new run has made its
first steps by then.

A checkpoint holds the training state and, as JSON, the metadata that using or resuming it needs:
the resolved config, class names, normalisation, best metrics so far. Guarantees:

- A step is saved atomically. Orbax writes it into a temporary folder; when all files are there a
  manifest of their digests is added, all is flushed to the disk, and the folder is renamed. In a
  bucket, where nothing can be renamed, the manifest is what is uploaded last.
- Nothing is restored that is not what was saved (see `checkpoint_reader`).
- An older step is deleted only when the newer one is complete.
- A save that fails is reported in one sentence, and can be tried again. Where one of several
  processes can't write, all of them know at once (see `save_barrier`).
"""

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from flaxcls.buckets import AnyPath
from flaxcls.errors import CheckpointError, ProcessesError
from flaxcls.runs import manifest
from flaxcls.runs.checkpoint_folder import UNFINISHED, WRITTEN_LAST
from flaxcls.runs.checkpoint_reader import (
    SECONDS_TO_SAVE,
    CheckpointReader,
    cause_of,
)
from flaxcls.runs.save_barrier import UPLOADED, SaveBarrier
from flaxcls.runtime import processes

if TYPE_CHECKING:
    import orbax.checkpoint as ocp


class _NewestAndBest:
    """Keeps the newest steps and the best one; a PreservationPolicy of Orbax."""

    def __init__(self, newest: int):
        self.newest = newest
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        count = len(checkpoints)
        return [
            index >= count - self.newest or info.step == self.best_step
            for index, info in enumerate(checkpoints)
        ]


class Checkpoints(CheckpointReader):
    """The checkpoints in one folder, which all processes share; all of them make the same calls.

    Args:
      directory: holds one folder per step; made when the first one is saved.
      keep: how many of the newest are kept; the best one is kept besides.
      check: raises where nothing may be written any more; asked before each change in the folder,
        also by the thread that saves.
    """

    def __init__(self, directory: AnyPath, keep: int = 1, check: Callable[[], None] = lambda: None):
        super().__init__(directory)
        self.check = check
        self._policy = _NewestAndBest(keep)
        self._saving: int | None = None  # the step whose saving began last
        self._failure: CheckpointError | None = None  # of that step, until it is reported
        self._bytes = 0  # of the step that was written last
        self._manager: ocp.CheckpointManager | None = None  # from the first save on
        self._barrier = SaveBarrier() if processes.count() > 1 else None

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Starts saving `state` (arrays) and `metadata` (JSON) and returns.

        The step that `metadata["progress"]["best"]` names is kept from then on.

        Raises CheckpointError, and saves nothing, if the folder can't be written, the disk is too
        full, or the previous save failed in the background, which neither `wait` nor `failure` has
        reported yet; in any of the processes. ProcessesError if saving can't begin in one of them
        while the others have begun.
        """
        import orbax.checkpoint as ocp

        failure = self._take_failure()
        if self.is_remote:
            self._begin_upload()
        if not failure and (processes.is_first() or self.is_remote):
            failure = self._obstacle(step, state)
        for message in processes.gather(str(failure or "")):
            if message:
                raise CheckpointError(message) from failure
        if len({*processes.gather("opened" if self._manager else "")}) > 1:
            self.reload()  # one has failed alone, after the others were through
        if self._barrier:
            self._barrier.begin()
        self._policy.best_step = metadata["progress"]["best"].get("step")
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), facts=ocp.args.JsonSave(metadata)
        )
        self._saving, sys.unraisablehook = step, _ignore_late_writes
        self._manager = self._manager or self._open()
        try:
            # Without `force` Orbax does nothing, and says nothing, at a step before the newest one.
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            self.reload()
            if not isinstance(error, OSError):
                raise
            failure = _not_saved(step, cause_of(error))
            raise ProcessesError(str(failure)) if self._barrier else failure from error

    def failure(self) -> CheckpointError | None:
        """What went wrong with the last save, if that is known by now; never waits.

        A failure is reported once: here, or raised by `wait` or the next `save`. The processes need
        not learn of it at the same time.
        """
        if self._manager and self._manager.is_saving_in_progress():
            return None
        return self._take_failure()

    def wait(self) -> None:
        """Returns when everything is saved; raises CheckpointError if it could not be."""
        if failure := self._take_failure():
            raise failure

    def close(self) -> None:
        """`wait`, and ends what saves in the background."""
        try:
            self.wait()
        finally:
            if self._manager:
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def settle(self) -> None:
        """Waits for the save under way, whose failure is reported later; all is verified again."""
        self._finish()
        self._forget()

    def quarantine(self, step: int) -> AnyPath:
        """Moves a step into the folder quarantine beside the checkpoints; where to. May fail."""
        return self._folder.quarantine(step)

    def reload(self) -> None:
        """Sees what is on the disk anew, after a failure or a change by others."""
        if self._manager:
            with contextlib.suppress(Exception):  # reported already
                self._manager.close()
        self._manager = None
        self._remove_unfinished()
        self._forget()

    # Saving.

    def _open(self) -> "ocp.CheckpointManager":
        import orbax.checkpoint as ocp

        # In a bucket's case each process has a folder of its own, of which it is in charge.
        among = ocp.options.MultiprocessingOptions(primary_host=None if self.is_remote else 0)
        # It has a part of the arrays there: that none is missing is seen when they are merged.
        arrays = ocp.BasePyTreeCheckpointHandler(
            multiprocessing_options=among, enable_post_merge_validation=not self.is_remote
        )
        return ocp.CheckpointManager(
            self._folder.working,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(
                    multiprocessing_options=among, handler_impl=arrays
                ),
                "facts": ocp.JsonCheckpointHandler(multiprocessing_options=among),
            },
            options=ocp.CheckpointManagerOptions(
                create=False,
                preservation_policy=self._policy,
                multiprocessing_options=among,
                async_options=ocp.AsyncOptions(
                    timeout_secs=SECONDS_TO_SAVE,
                    barrier_sync_fn=self._barrier,
                    post_finalization_callback=self._upload if self.is_remote else self._commit,
                    create_directories_asynchronously=False,
                ),
            ),
        )

    def _finish(self) -> None:
        """Waits for the save that is under way, and notes its failure."""
        try:
            if self._manager:
                self._manager.wait_until_finished()
        except Exception as error:
            told = self._barrier.failure if self._barrier else ""
            failure = _not_saved(self._saving, told or cause_of(error))
            failure.__cause__ = error
            self.reload()
            self._failure = failure

    def _take_failure(self) -> CheckpointError | None:
        self._finish()
        failure, self._failure = self._failure, None
        return failure

    def _commit(self) -> None:
        """Orbax calls this in the first process, when all have written, before the renaming."""
        self.check()
        self._bytes = manifest.write(self._unfinished(self._saving), WRITTEN_LAST)
        self.check()  # that may have taken minutes

    def _begin_upload(self) -> None:
        """Orbax's folder is emptied: what was in it is in the bucket, or not needed any more."""
        if self._manager:
            self._manager.close()
        self._manager = None
        self._folder.clear_working()

    def _upload(self) -> None:
        """Orbax calls this in each process, when that has written what it has of the state.

        The first one puts together what all have written, as Orbax does where they share a disk.
        """
        step, folder = self._saving, self._unfinished(self._saving)
        if not processes.is_first():
            self._folder.publish_part(step, folder, processes.index())
        if self._barrier:
            self._barrier(key=UPLOADED, timeout_ms=1000 * SECONDS_TO_SAVE)
        if processes.is_first():
            self.check()
            parts = self._folder.merge_parts(step, folder) if self._barrier else set()
            self._bytes = manifest.write(folder, WRITTEN_LAST)
            self.check()
            self._folder.publish(step, folder, parts, self.check)
            self._remove_old()

    def _remove_old(self) -> None:
        """Removes what Orbax would: all steps but the newest ones and the best."""
        steps = self._folder.steps()
        for step in steps[: -self._policy.newest]:
            if step != self._policy.best_step:
                self._folder.remove(step, self.check)

    def _obstacle(self, step: int, state: Any) -> CheckpointError | None:
        """Why `state` can't be saved now."""
        if self._saving is None or not self.is_remote:  # else a request for nothing
            self._remove_unfinished()
        folder = self._folder.working
        arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        needed = max(int(1.02 * arrays) + 2**20, self._bytes)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free
        except OSError as error:
            return _not_saved(step, f"{folder} can't be written: {cause_of(error)}")
        if free < needed:
            room = f"{_size(needed)} needed, {_size(free)} free in {folder}"
            return _not_saved(step, room)
        return None

    def _remove_unfinished(self) -> None:
        """Frees the space of what a failure or the end of a process left half written."""
        if processes.is_first():
            self.check()
            with contextlib.suppress(OSError):  # a bucket that does not answer: the next time
                self._folder.remove_unfinished(self.check)

    def _unfinished(self, step: int) -> Path:
        return self._folder.working / f"{step}{UNFINISHED}"


def _ignore_late_writes(unraisable: Any) -> None:
    """Prints an unraisable exception, but not what follows from a save that failed.

    TensorStore then reports the other writes, already begun, to an event loop that Orbax closed.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _not_saved(step: int, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint of step {step} not saved: {why}")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
