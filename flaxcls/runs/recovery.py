"""Resuming after any failure, from the newest intact checkpoint."""

import re
import shutil
from collections.abc import Callable
from typing import Any

from flaxcls.buckets import AnyPath, BucketPath
from flaxcls.errors import CheckpointError
from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.checkpoint_reader import CheckpointMismatch, cause_of
from flaxcls.runs.manifest import Damaged
from flaxcls.runtime import processes

QUARANTINED = 5  # checkpoints that are kept there: a failing disk must not fill up with them


def restore_newest(
    checkpoints: Checkpoints, shapes: Any, shardings: Any, say: Callable[[str], None]
) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest intact step, its state and its metadata; None if there is none.

    Steps that are damaged, or whose arrays are not those of `shapes`, are moved to the folder
    quarantine beside the checkpoints, and `say` gets a sentence for each, in the first process.
    There the QUARANTINED that were saved last are kept, and `say` is told which are deleted.
    Raises CheckpointMismatch, and moves nothing, if none is left because of their arrays.
    """
    checkpoints.settle()
    rejected: list[tuple[int, Damaged | CheckpointMismatch]] = []
    found = None
    steps = checkpoints.steps()
    while not found and (step := processes.agree(steps.pop() if steps else -1)) >= 0:
        try:
            _inspect(checkpoints, step, shapes)
            found = step, *_restore(checkpoints, step, shapes, shardings)
        except (Damaged, CheckpointMismatch) as error:
            rejected.append((step, error))
    mismatches = [error for _, error in rejected if isinstance(error, CheckpointMismatch)]
    if mismatches and not found:
        raise mismatches[0]

    if processes.is_first():
        for step, error in rejected:
            checkpoints.check()
            moved = _quarantine(checkpoints, step)
            say(f"{error}; it is moved to {moved}")
            if deleted := _delete_oldest(moved.parent):
                say(
                    f"{moved.parent} keeps the {QUARANTINED} checkpoints that were saved last: "
                    f"{', '.join(deleted)} {'is' if len(deleted) == 1 else 'are'} deleted"
                )
        if rejected and not found:
            say("no checkpoint is left: the run starts from scratch")
        if found and not checkpoints.verify(found[0]):
            say(f"the checkpoint of step {found[0]} has no manifest: it is used unchecked")
    if rejected:
        processes.agree(0)  # all are moved before any process looks again
        checkpoints.reload()
    checkpoints.free_copies()
    return found


def _inspect(checkpoints: Checkpoints, step: int, shapes: Any) -> None:
    """Raises Damaged or CheckpointMismatch in all processes if the first one, which looks, does."""
    problem = None
    if processes.is_first():
        try:
            checkpoints.verify(step)
            checkpoints.compare(step, shapes, exact=True)
        except (Damaged, CheckpointMismatch) as error:
            problem = error
    _raise_in_all(problem)


def _restore(
    checkpoints: Checkpoints, step: int, shapes: Any, shardings: Any
) -> tuple[Any, dict[str, Any]]:
    """State and metadata; Damaged in all processes if any of them can't read them."""
    problem = restored = None
    try:
        if checkpoints.is_remote:  # each process has a copy of its own
            checkpoints.verify(step)
        restored = checkpoints.state_and_metadata(step, shapes, shardings)
    except Damaged as error:
        problem = error
    _raise_in_all(problem)
    return restored


def _raise_in_all(problem: Damaged | CheckpointMismatch | None) -> None:
    """Raises a problem that any process has in all of them, so that they all go the same way."""
    kinds = {kind.__name__: kind for kind in (Damaged, CheckpointMismatch)}
    for message in processes.gather(f"{type(problem).__name__} {problem}" if problem else ""):
        if message:
            kind, _, sentence = message.partition(" ")
            raise kinds[kind](sentence)


def _quarantine(checkpoints: Checkpoints, step: int) -> AnyPath:
    """Moves a checkpoint out of the way; where to."""
    try:
        return checkpoints.quarantine(step)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} can't be moved to quarantine: {cause_of(error)}"
        ) from error


def _delete_oldest(quarantine: AnyPath) -> list[str]:
    """Deletes all but the checkpoints that were saved last; what is deleted."""
    there = [path for path in quarantine.iterdir() if re.fullmatch(r"\d+(\.\d+)?", path.name)]
    there.sort(key=_saved)
    for path in there[:-QUARANTINED]:
        if isinstance(path, BucketPath):
            path.rmtree()
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return [path.name for path in there if not path.exists() and not path.is_symlink()]


def _saved(checkpoint: AnyPath) -> float:
    """When it was moved into a bucket's quarantine or, on a disk, saved: moving keeps its time."""
    if isinstance(checkpoint, BucketPath):
        return max(status.st_mtime for status in checkpoint.files().values())
    return checkpoint.lstat().st_mtime
