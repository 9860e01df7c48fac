"""When a run that diverges may go back to its last good checkpoint, and what it notes then.

It may config.divergence.max_rollbacks times within config.divergence.within: a rollback counts
until the run has made that many updates more than it had when it diverged. To go back takes the run
away from there and to skip updates no nearer, so one that diverges for ever at one place ends,
however far apart its checkpoints are, and so does one that makes a few good updates between; in N
updates there are at most max_rollbacks * (N / within + 1) rollbacks.

What is noted is in a run's progress, which checkpoints hold: "rollbacks", how many there were;
"diverged_at", the updates made, without those skipped, before each of them; and "data_offset", the
steps that the order of the examples is ahead by, so that others follow than those it diverged on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flaxcls.errors import DivergedError

NONE = {"rollbacks": 0, "diverged_at": [], "data_offset": 0}


def dated(progress: dict[str, Any], updates_made: Callable[[], int]) -> dict[str, Any]:
    """The progress of a checkpoint, also of before "diverged_at" was noted: all still count."""
    if "diverged_at" in progress:
        return progress
    return {**progress, "diverged_at": [updates_made()] * progress["rollbacks"]}


def recent(progress: Mapping[str, Any], updates: int, within: float) -> int:
    """How many rollbacks count when the run has made so many updates."""
    return sum(earlier > updates - within for earlier in progress["diverged_at"])


def after(progress: Mapping[str, Any], updates: int, steps: int) -> dict[str, Any]:
    """What is noted after one more, so many steps back."""
    return {
        "rollbacks": progress["rollbacks"] + 1,
        "diverged_at": [*progress["diverged_at"], updates],
        "data_offset": progress["data_offset"] + steps,
    }


def too_many(
    trouble: DivergedError, count: int, within: float, saved: Sequence[int]
) -> DivergedError:
    """What ends a run that has gone back so often: the trouble, and what may help.

    Args:
      saved: the steps that have a checkpoint, in order.
    """
    good = f"the checkpoint of step {saved[-1]} is good" if saved else "nothing is saved"
    return DivergedError(
        f"{trouble}, after {count} rollback{'s' * (count != 1)} within {within:,.0f} updates; "
        f"{good}; a lower config.optimizer.learning_rate, a warm-up or "
        "config.optimizer.gradient_clip_norm may help"
    )
