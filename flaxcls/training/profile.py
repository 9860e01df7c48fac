"""The trace of a range of steps that config.profile asks for."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax

from flaxcls.buckets import AnyPath
from flaxcls.remote import is_remote
from flaxcls.runtime import processes, trace
from flaxcls.runtime.output import printable
from flaxcls.runtime.scratch import scratch_folder

MOST_ROWS = 20


class Profile:
    """Traces the steps of a range in process 0; to be entered, and left when the run ends.

    What goes wrong with it is said and ends no run. A process traces once: a run that is resumed
    inside of the range traces the rest of it, one that is rolled back into it nothing more.

    Args:
      steps: the updates, counted from 0.
      folder: where the trace is written.
      say: prints a line of the run.
      compiled: gives the compiled step as text, or None, to tell where its operators come from.
      spending: is entered while the trace is written.
    """

    def __init__(
        self,
        steps: range,
        folder: AnyPath,
        say: Callable[[str], None],
        compiled: Callable[[], str | None],
        spending: Callable[[], AbstractContextManager[Any]],
    ):
        self._steps, self._target, self._say = steps, folder, say
        self._folder = scratch_folder(self) if is_remote(folder) else folder
        self._compiled, self._spending = compiled, spending
        self._is_due = bool(steps) and processes.is_first()
        self._step = 0
        self._first: int | None = None  # the step that the trace under way began with

    def begin(self, step: int, state: Any) -> None:
        """Begins the trace if `step` updates were made and the next one is the range's."""
        if not self._is_due or step not in self._steps:
            return
        self._is_due = False
        jax.block_until_ready(state)  # what was dispatched before is not of the range
        try:
            trace.start(self._folder)
            self._first, self._step = step, step
        except (OSError, RuntimeError) as error:
            self._say(f"there will be no trace of these steps: {error}")

    def end(self, step: int, state: Any) -> None:
        """Ends the trace, and prints what took the most time, if the next step is beyond it."""
        if self._first is None:
            return
        self._step = step
        if step not in self._steps:
            jax.block_until_ready(state)
            self._write(self._first)

    def _write(self, first: int) -> None:
        self._first = None
        with self._spending():
            began, before = time.perf_counter(), trace.newest(self._folder)
            try:
                trace.stop()
                path = trace.newest(self._folder)
                if path is None or path == before:
                    raise RuntimeError("it is not there")
                table = operator_table(trace.operators(path), trace.origins(self._compiled() or ""))
                if self._folder != self._target:
                    self._target.upload_folder(self._folder)
            except (OSError, RuntimeError, ValueError) as error:
                self._say(f"the trace can't be written to {printable(self._target)}: {error}")
                return
            seconds = time.perf_counter() - began
        where = printable(path.parent if self._folder == self._target else self._target)
        self._say(
            f"traced {self._step - first} steps, from {first + 1} to {self._step}; written in "
            f"{seconds:.1f} s to {where}, for XProf and https://ui.perfetto.dev\n"
            f"{table}"
        )

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._first is not None:  # a signal or an error has ended the run inside of the range
            self._write(self._first)


def operator_table(
    operators: Sequence[trace.Operator], origins: Mapping[tuple[str, str], str]
) -> str:
    """Those that took most, a line each, with their share of all the time and their `origins`."""
    total = sum(operator.seconds for operator in operators)
    if not total:
        return "no operator is in the trace"
    lines = [f"{'share':>7} {'total ms':>10} {'calls':>7}  {'operator':32} of"]
    for program, name, calls, seconds in operators[:MOST_ROWS]:
        origin = origins.get((program, name)) or program
        lines.append(
            f"{100 * seconds / total:5.1f} % {1e3 * seconds:10.2f} {calls:7,}  {name:32} {origin}"
        )
    if rest := operators[MOST_ROWS:]:
        spent, calls = sum(o.seconds for o in rest), sum(o.calls for o in rest)
        name = f"{len(rest):,} others"
        lines.append(f"{100 * spent / total:5.1f} % {1e3 * spent:10.2f} {calls:7,}  {name}")
    return "\n".join(line.rstrip() for line in lines)
