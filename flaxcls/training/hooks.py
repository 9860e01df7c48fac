"""What Python users may have called while a run is under way."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from flaxcls.errors import ProcessesError
from flaxcls.runtime import processes

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


NO_HOOKS = Hooks()


class HookCalls:
    """Calls the hooks in process 0; what they raise waits until the run is saved.

    Attributes:
      is_stopped: whether the run is to end, in every process.
      error: what ends it, if that is an error.
    """

    def __init__(self, hooks: Hooks):
        self._hooks = hooks
        self.is_stopped = False
        self.error: Exception | None = None

    def on_log(self, row: Row) -> None:
        self._call(self._hooks.on_log, row)

    def on_evaluation(self, row: Row) -> None:
        self._call(self._hooks.on_evaluation, row)

    def _call(self, hook: Callable[[Row], Any] | None, row: Row) -> None:
        if hook is None or self.is_stopped or not processes.is_first():
            return
        try:
            with jax.transfer_guard("allow"):
                hook(row)
        except StopTraining:
            self.is_stopped = True
        except Exception as error:
            self.is_stopped, self.error = True, error

    def end_the_run(self) -> bool:
        """Whether a hook of process 0 has ended the run; all processes ask at the same steps."""
        if not any(self._hooks):
            return False
        said = processes.agree(self.is_stopped + 2 * (self.error is not None))
        self.is_stopped = bool(said)
        if said == 3 and not processes.is_first():
            self.error = ProcessesError("a hook of process 0 has raised an error")
        return self.is_stopped
