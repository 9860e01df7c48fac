"""Reads the checkpoints of a run, which may still be training.

Nothing is restored that is not what was saved: digests, the arrays' names, shapes and dtypes are
checked first. Steps saved before there were manifests are restored without that check.
"""

import contextlib
import functools
import json
import logging
import os
import re
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from flaxcls.buckets import AnyPath
from flaxcls.errors import CheckpointError, ConfigError, did_you_mean
from flaxcls.remote import is_remote
from flaxcls.runs import manifest
from flaxcls.runs.checkpoint_folder import WRITTEN_LAST, checkpoint_folder
from flaxcls.runs.manifest import Damaged

SECONDS_TO_SAVE = 600  # then a save in the background has failed, also where a process is missing
SECONDS_TO_DELETE = 2  # a step that can't be read may be one that is just being deleted
TRIES = 50  # to read a step of a run that deletes it meanwhile
T = TypeVar("T")


@functools.cache
def _quiet_orbax() -> None:
    """Silences what Orbax logs of a failure, which flaxcls reports; from the first call on.

    It has a long traceback for each of its threads and each write that it has begun or not.
    """
    logging.getLogger("absl").addFilter(lambda said: f"{os.sep}orbax{os.sep}" not in said.pathname)
    logging.getLogger("asyncio").addFilter(lambda record: not _is_of_orbax(record))
    unawaited = r"coroutine '.*serialize.*' was never awaited"
    warnings.filterwarnings("ignore", unawaited, RuntimeWarning)


def _is_of_orbax(record: logging.LogRecord) -> bool:
    """Whether what asyncio logs is about a write of Orbax's, by its words or its traceback."""
    trace = traceback.extract_tb(record.exc_info[2]) if record.exc_info else ()
    within = any(f"{os.sep}orbax{os.sep}" in frame.filename for frame in trace)
    return within or "orbax" in record.getMessage()


class CheckpointMismatch(ConfigError):
    """The arrays of a checkpoint are not those that are asked for."""


class CheckpointReader:
    """The checkpoints in a folder, one folder per step; changes nothing there.

    Args:
      directory: of the checkpoints.

    Attributes:
      is_remote: whether they are in a bucket, and what each process reads is a copy of its own.
    """

    def __init__(self, directory: AnyPath):
        _quiet_orbax()
        self._folder = checkpoint_folder(directory)
        self.is_remote = is_remote(directory)
        self._has_manifest: dict[int, bool] = {}  # of the steps that are verified

    def steps(self) -> list[int]:
        """The steps that are saved, oldest first."""
        try:
            return self._folder.steps()
        except OSError as error:
            raise CheckpointError(
                f"{self._folder.path} can't be read: {cause_of(error)}"
            ) from error

    def find(self, which: str) -> int:
        """The step that "last", "best" or a number means; ConfigError if there is none."""
        steps = self.steps()
        if not steps:
            raise ConfigError(f"there is no checkpoint in {self._folder.path}")
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self.metadata(steps[-1])["progress"]["best"]
            if not best:
                raise ConfigError("the run has no best checkpoint yet: it was not evaluated")
            which = str(best["step"])
        known = [str(step) for step in steps]
        if which not in known:
            raise ConfigError(f"there is no checkpoint {which!r}{did_you_mean(which, known)}")
        return int(which)

    def read(self, which: str, restore: Callable[[int], T]) -> tuple[int, T]:
        """The step that `which` means, as in `find`, and what `restore(step)` reads of it.

        A run that is still training deletes older steps. If that happens to this one before it is
        read, the newest or the best one, which is another one then, is read instead.
        """
        for _ in range(TRIES):
            seen = self.steps()
            try:
                step = self.find(which)
                return step, restore(step)
            except CheckpointError:
                if not self._is_changing(which, seen):
                    raise
            self._forget()
        raise CheckpointError(
            f"no checkpoint in {self._folder.path} is kept for long enough to be read: a larger "
            "config.checkpoint.keep or config.checkpoint.every would help"
        )

    def free_copies(self) -> None:
        """Frees the space of what was downloaded from a bucket; what is verified stays so."""
        self._folder.forget()

    def _forget(self) -> None:
        """All is verified again before it is read."""
        self._has_manifest.clear()
        self._folder.forget()

    def _is_changing(self, which: str, seen: list[int]) -> bool:
        """Whether the run is still training: the step of `which` is deleted, or another one now.

        It has a newer step before it deletes an older one.
        """
        end = time.monotonic() + SECONDS_TO_DELETE
        while time.monotonic() < end:
            now = self.steps()
            if now != seen and (which in ("last", "best") or which not in map(str, now)):
                return True
            time.sleep(0.02)
        return False

    def newest_metadata(self) -> tuple[int, dict[str, Any]]:
        """The newest intact step, and its metadata; ConfigError if there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(CheckpointError):
                return step, self.metadata(step)
        raise ConfigError(f"there is no checkpoint in {self._folder.path}")

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint; Damaged if a file of the checkpoint is."""
        self.verify(step)
        return self._metadata(step)

    def state(self, step: int, shapes: Any, shardings: Any) -> Any:
        """The arrays of a checkpoint that `shapes` names, sharded as `shardings` says.

        `shapes` may be a part of what was saved, such as the parameters without the optimizer.
        Raises Damaged if a file of the checkpoint is, and ConfigError if an array is not there or
        has another shape or dtype.
        """
        self.verify(step)
        self.compare(step, shapes)
        return self._state(step, shapes, shardings)

    def arrays(self, step: int, names: Collection[str]) -> dict[str, Any]:
        """What a checkpoint has under some names, such as "params", as trees of NumPy's arrays.

        Needs no shapes and no devices. Raises Damaged if a file of the checkpoint is.
        """
        import orbax.checkpoint as ocp

        self.verify(step)
        with self._reading(step):
            handler, folder = ocp.PyTreeCheckpointHandler(), self.folder(step) / "state"
            saved = handler.metadata(folder).tree
            wanted = {name: saved[name] for name in names if saved.get(name)}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            arguments = ocp.args.PyTreeRestore(
                item=wanted, restore_args=as_numpy, partial_restore=True
            )
            return handler.restore(folder, args=arguments)

    def state_and_metadata(
        self, step: int, shapes: Any, shardings: Any
    ) -> tuple[Any, dict[str, Any]]:
        """All of a checkpoint, unverified; Damaged if it can't be read."""
        return self._state(step, shapes, shardings), self._metadata(step)

    def _metadata(self, step: int) -> dict[str, Any]:
        with self._reading(step):
            metadata = json.loads((self.folder(step) / "facts" / "metadata").read_bytes())
            if not isinstance(metadata, dict):
                raise ValueError("facts/metadata holds no object of JSON")
            return metadata

    def _state(self, step: int, shapes: Any, shardings: Any) -> Any:
        import orbax.checkpoint as ocp

        as_sharded = jax.tree.map(
            lambda shape, sharding: ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=shape.shape, dtype=shape.dtype
            ),
            shapes,
            shardings,
        )
        arguments = ocp.args.PyTreeRestore(
            item=shapes, restore_args=as_sharded, partial_restore=True
        )
        with self._reading(step):
            return ocp.PyTreeCheckpointHandler().restore(
                self.folder(step) / "state", args=arguments
            )

    def verify(self, step: int) -> bool:
        """Whether a step has a manifest; Damaged if a file of the step is. Once is enough."""
        if step not in self._has_manifest:
            try:
                self._has_manifest[step] = self._verified(step)
            except Damaged as error:
                raise Damaged(f"the checkpoint of step {step} is damaged: {error}") from error
        return self._has_manifest[step]

    def _verified(self, step: int) -> bool:
        """As `manifest.verify`; a copy that is damaged is made anew once, it may be that alone."""
        try:
            return manifest.verify(self.folder(step), WRITTEN_LAST)
        except Damaged:
            if not self._folder.forget():
                raise
            return manifest.verify(self.folder(step), WRITTEN_LAST)

    def compare(self, step: int, shapes: Any, exact: bool = False) -> None:
        """Raises CheckpointMismatch unless a step has the arrays of `shapes`, if `exact` no others.

        Orbax itself casts silently to another dtype.
        """
        import orbax.checkpoint as ocp

        with self._reading(step):
            folder = self.folder(step) / "state"
            saved = ocp.PyTreeCheckpointHandler().metadata(folder).tree
        saved, expected = _arrays(saved), _arrays(shapes)
        names = [*expected, *(sorted(saved.keys() - expected.keys()) if exact else ())]
        for name in names:
            if saved.get(name) != expected.get(name):
                raise CheckpointMismatch(
                    f"the checkpoint of step {step} does not match: {name} is "
                    f"{saved.get(name, 'not there')} and should be {expected.get(name, 'absent')}"
                )

    def folder(self, step: int) -> Path:
        """The folder of a step on this machine, to read."""
        return self._folder.local(step)

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
                    f"the checkpoint of step {step} is intact but can't be read: {cause_of(error)}"
                ) from error
            raise Damaged(
                f"the checkpoint of step {step} is damaged: it can't be read: {cause_of(error)}"
            ) from error


def _arrays(tree: Any) -> dict[str, str]:
    """`params/layer/kernel` -> `float32[128, 256]`, of arrays, shapes or Orbax's metadata."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


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
