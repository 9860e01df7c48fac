"""Checkpoints of a run, saved in the background; the only file that knows Orbax.

A checkpoint holds the whole training state and, as JSON, all else that using or resuming it needs:
the resolved config, class names, normalisation, best metrics so far. What is promised:

- A step is there whole or not at all. Orbax writes it into a temporary folder; when all files are
  there a manifest of their digests is added, all is flushed to the disk, and the folder is renamed.
- Nothing is restored that is not what was saved: digests, the arrays' names, shapes and dtypes are
  checked first. Steps saved before there were manifests are restored without that check.
- An older step is deleted only when the newer one is complete.
- What could not be saved is told in one sentence, and saving can be tried again.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from flaxcls import manifest, processes
from flaxcls.errors import CheckpointError, ConfigError, did_you_mean
from flaxcls.manifest import Damaged

UNFINISHED = ocp.utils.TMP_DIR_SUFFIX  # ends the name of the folder that is being written
# Orbax writes these after the manifest, with the time of the commit; restoring needs neither.
WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")
SECONDS_TO_SAVE = 600  # then a save in the background has failed, also where a process is missing

# What Orbax says of a failed save, with a long traceback for each of its threads and for each write
# that it has begun or not yet begun, is told in a sentence here.
logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
warnings.filterwarnings("ignore", r"coroutine '.*serialize.*' was never awaited", RuntimeWarning)


class OtherCode(ConfigError):
    """The arrays of a checkpoint are not those that are asked for."""


class _NewestAndBest(checkpoint_managers.PreservationPolicy):
    """Keeps the newest steps and the best one."""

    def __init__(self, newest: int):
        self.newest = newest
        self.best_step: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        count = len(checkpoints)
        return [
            index >= count - self.newest or info.step == self.best_step
            for index, info in enumerate(checkpoints)
        ]


class Checkpoints:
    """The checkpoints in one folder, which all processes share; all of them make the same calls.

    Args:
      directory: where they lie, one folder a step; made when the first one is saved.
      keep: how many of the newest are kept; the best one is kept besides.
    """

    def __init__(self, directory: Path, keep: int = 1):
        self._directory = directory.resolve()
        self._policy = _NewestAndBest(keep)
        self._saving: int | None = None  # the step whose saving began last
        self._failure: CheckpointError | None = None  # of that step, until it is told
        self._bytes = 0  # of the step that was written last
        self._has_manifest: dict[int, bool] = {}  # of the steps that are verified
        self._manager = self._open()

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Starts saving `state` (arrays) and `facts` (JSON) and returns.

        The step that `facts["progress"]["best"]` names is kept from then on.

        Raises CheckpointError, and saves nothing, if the folder can't be written, the disk is too
        full, or the previous save failed in the background, which neither `wait` nor `failure` has
        told yet.
        """
        failure = self._told_failure()
        if not failure and processes.is_first():
            failure = self._obstacle(step, state)
        for told in processes.gather(str(failure or "")):
            if told:
                raise CheckpointError(told) from failure
        self._policy.best_step = facts["progress"]["best"].get("step")
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), facts=ocp.args.JsonSave(facts)
        )
        self._saving, sys.unraisablehook = step, _ignore_late_writes
        try:
            # Without `force` Orbax does nothing, and says nothing, at a step before the newest one.
            self._manager.save(step, args=arguments, force=True)
        except Exception as error:
            self._reopen()
            if isinstance(error, OSError):
                raise _not_saved(step, cause_of(error)) from error
            raise

    def failure(self) -> CheckpointError | None:
        """What went wrong with the last save, if that is known by now; never waits.

        A failure is told once: here, or raised by `wait` or the next `save`. The processes need
        not learn of it at the same time.
        """
        if self._manager.is_saving_in_progress():
            return None
        return self._told_failure()

    def wait(self) -> None:
        """Returns when everything is saved; raises CheckpointError if it could not be."""
        if failure := self._told_failure():
            raise failure

    def close(self) -> None:
        """`wait`, and ends what saves in the background."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps that are saved, oldest first."""
        return sorted(self._manager.all_steps())

    def find(self, which: str) -> int:
        """The step that "last", "best" or a number means; ConfigError if there is none."""
        steps = self.steps()
        if not steps:
            raise ConfigError(f"there is no checkpoint in {self._directory}")
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self.facts(steps[-1])["progress"]["best"]
            if not best:
                raise ConfigError("the run has no best checkpoint yet: it was not evaluated")
            which = str(best["step"])
        known = [str(step) for step in steps]
        if which not in known:
            raise ConfigError(f"there is no checkpoint {which!r}{did_you_mean(which, known)}")
        return int(which)

    def facts(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint; Damaged if a file of the checkpoint is."""
        self.verify(step)
        return self._restore(step, facts=ocp.args.JsonRestore()).facts

    def state(self, step: int, shapes: Any, shardings: Any) -> Any:
        """The arrays of a checkpoint that `shapes` names, placed as `shardings` says.

        `shapes` may be a part of what was saved, such as the parameters without the optimizer.
        Raises Damaged if a file of the checkpoint is, and ConfigError if an array is not there or
        has another shape or dtype.
        """
        self.verify(step)
        self.compare(step, shapes)
        return self._restore(step, state=_restore_arguments(shapes, shardings)).state

    def state_and_facts(self, step: int, shapes: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """The whole of a checkpoint, unchecked; Damaged if it can't be read."""
        restored = self._restore(
            step, state=_restore_arguments(shapes, shardings), facts=ocp.args.JsonRestore()
        )
        return restored.state, restored.facts

    def verify(self, step: int) -> bool:
        """Whether a step has a manifest; Damaged if a file of the step is. Once is enough."""
        if step not in self._has_manifest:
            try:
                self._has_manifest[step] = manifest.verify(self.folder(step), WRITTEN_LAST)
            except Damaged as error:
                raise Damaged(f"the checkpoint of step {step} is damaged: {error}") from error
        return self._has_manifest[step]

    def compare(self, step: int, shapes: Any, whole: bool = False) -> None:
        """Raises OtherCode unless the step has the arrays of `shapes`, and if `whole` no others.

        Orbax itself casts silently to another dtype.
        """
        with self._reading(step):
            folder = self.folder(step) / "state"
            saved = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        saved, expected = _arrays(saved), _arrays(shapes)
        names = [*expected, *(sorted(saved.keys() - expected.keys()) if whole else ())]
        for name in names:
            if saved.get(name) != expected.get(name):
                raise OtherCode(
                    f"the checkpoint of step {step} is from other code: {name} is "
                    f"{saved.get(name, 'not there')} and should be {expected.get(name, 'absent')}"
                )

    def folder(self, step: int) -> Path:
        """Where a step lies."""
        return self._directory / str(step)

    def settle(self) -> None:
        """Waits for the save under way, whose failure is told later; all is to be verified anew."""
        self._finish()
        self._has_manifest.clear()

    def reload(self) -> None:
        """Looks anew at what is on the disk, after others have changed it."""
        self._reopen()

    # Saving.

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._directory,
            item_names=("state", "facts"),
            options=ocp.CheckpointManagerOptions(
                create=False,
                preservation_policy=self._policy,
                async_options=ocp.AsyncOptions(
                    timeout_secs=SECONDS_TO_SAVE,
                    post_finalization_callback=self._write_manifest,
                    create_directories_asynchronously=False,
                ),
            ),
        )

    def _reopen(self) -> None:
        """Begins again with what is on the disk, after a failure or a change by others."""
        with contextlib.suppress(Exception):  # told already
            self._manager.close()
        self._remove_unfinished()
        self._has_manifest.clear()
        self._manager = self._open()

    def _finish(self) -> None:
        """Waits for the save that is under way, and notes its failure."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failure = _not_saved(self._saving, cause_of(error))
            self._failure.__cause__ = error
            self._reopen()

    def _told_failure(self) -> CheckpointError | None:
        self._finish()
        failure, self._failure = self._failure, None
        return failure

    def _write_manifest(self) -> None:
        """Orbax calls this in the first process, when all have written, before the renaming."""
        self._bytes = manifest.write(self._unfinished(self._saving), WRITTEN_LAST)

    def _obstacle(self, step: int, state: Any) -> CheckpointError | None:
        """Why `state` can't be saved now."""
        self._remove_unfinished()
        arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        needed = max(int(1.02 * arrays) + 2**20, self._bytes)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory):
                free = shutil.disk_usage(self._directory).free
        except OSError as error:
            return _not_saved(step, f"{self._directory} can't be written: {cause_of(error)}")
        if free < needed:
            room = f"{_size(needed)} needed, {_size(free)} free in {self._directory}"
            return _not_saved(step, room)
        return None

    def _remove_unfinished(self) -> None:
        """Frees the space of what a failure or the end of a process left half written."""
        if processes.is_first():
            for folder in self._directory.glob(f"*{UNFINISHED}"):
                shutil.rmtree(folder, ignore_errors=True)

    def _unfinished(self, step: int) -> Path:
        return self._directory / f"{step}{UNFINISHED}"

    # Restoring.

    def _restore(self, step: int, **items: Any) -> Any:
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Says what it means that Orbax can't read a step.

        It is damaged, unless its digests are right or the devices, not the files, failed.
        """
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            if self._has_manifest.get(step):
                raise CheckpointError(
                    f"the checkpoint of step {step} is whole but can't be read: {cause_of(error)}"
                ) from error
            raise Damaged(
                f"the checkpoint of step {step} is damaged: it can't be read: {cause_of(error)}"
            ) from error


def _restore_arguments(shapes: Any, shardings: Any) -> ocp.args.PyTreeRestore:
    arguments = jax.tree.map(
        lambda shape, sharding: ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=shape.shape, dtype=shape.dtype
        ),
        shapes,
        shardings,
    )
    return ocp.args.PyTreeRestore(item=shapes, restore_args=arguments, partial_restore=True)


def _arrays(tree: Any) -> dict[str, str]:
    """`params/layer/kernel` -> `float32[128, 256]`, of arrays, shapes or Orbax's metadata."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _ignore_late_writes(unraisable: Any) -> None:
    """Prints an exception that nobody can handle, but not what follows from a save that failed.

    TensorStore then tells the other writes, begun already, to an event loop that Orbax has closed.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _not_saved(step: int, why: str) -> CheckpointError:
    return CheckpointError(f"checkpoint of step {step} not saved: {why}")


def cause_of(error: BaseException) -> str:
    """One line of what went wrong; of what TensorStore says, what the system said."""
    while _is_late(error) and error.__context__:  # a failure has made this process late
        error = error.__context__
    if _is_late(error):
        return f"not all processes wrote their part within {SECONDS_TO_SAVE} s"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip() or type(error).__name__
    code = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(code[1])) if code else text.splitlines()[0][:300]


def _is_late(error: BaseException) -> bool:
    """Whether it says that the processes have waited for one another in vain."""
    text = str(error)
    return "DEADLINE_EXCEEDED" in text or "Timed out while waiting for async" in text


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
