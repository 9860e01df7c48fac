"""Resuming after any failure, from the newest intact checkpoint."""

from collections.abc import Callable
from typing import Any

from flaxcls.buckets import AnyPath
from flaxcls.errors import CheckpointError
from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.checkpoint_reader import CheckpointMismatch, cause_of
from flaxcls.runs.manifest import Damaged
from flaxcls.runtime import processes


def restore_newest(
    checkpoints: Checkpoints, shapes: Any, shardings: Any, say: Callable[[str], None]
) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest intact step, its state and its metadata; None if there is none.

    Steps that are damaged, or whose arrays are not those of `shapes`, are moved to the folder
    quarantine beside the checkpoints, and `say` gets a sentence for each, in the first process.
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
            say(f"{error}; it is moved to {_quarantine(checkpoints, step)}")
        if rejected and not found:
            say("no checkpoint is left: the run starts from scratch")
        if found and not checkpoints.verify(found[0]):
            say(f"the checkpoint of step {found[0]} has no manifest: it is used unchecked")
    if rejected:
        processes.agree(0)  # all are moved before any process looks again
        checkpoints.reload()
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
