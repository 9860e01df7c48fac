"""What Python users may have called while a run is under way."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class StopTraining(Exception):
    """Raised in a hook: the run is saved and `train` returns; the same call resumes it."""


class Hooks(NamedTuple):
    """Functions that process 0 calls; an exception in one ends the run after saving it.

    Attributes:
      on_log: with {"step", "epoch", "loss", "accuracy", "learning_rate", "grad_norm",
        "images_per_second", "data_wait", ...} after every log step.
      on_evaluation: with {"step", "epoch", "eval": {"accuracy", "loss", "count", ...}}, and "ema"
        where an average of the parameters is kept, after every evaluation.
    """

    on_log: Callable[[Row], Any] | None = None
    on_evaluation: Callable[[Row], Any] | None = None

    def __bool__(self) -> bool:
        return any(self)


NO_HOOKS = Hooks()
