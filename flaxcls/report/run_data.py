"""All that the page of a run is made of."""

import shlex
from typing import NamedTuple

from flaxcls.buckets import AnyPath
from flaxcls.errors import FlaxclsError, one_line
from flaxcls.report.answers import Answers, answers_of
from flaxcls.report.run_files import RunFiles, number_in, read_run


class RunData(NamedTuple):
    """A run's folder, and what its network says of the evaluation split.

    `answers` is None where that was left out; `left_out` is the sentence that says why.
    """

    files: RunFiles
    answers: Answers | None
    left_out: str = ""


def load_run(
    workdir: AnyPath, *, data_dir: str | None = None, max_seconds: float | None = None
) -> RunData:
    """Reads a run and makes its predictions.

    Args:
      workdir: the run's folder.
      data_dir: where the data is, if it has moved.
      max_seconds: how long a pass over the evaluation split may take, by those of training; a
        longer one is left out, and with 0 any. Explanations are left out if compiling took as long.
        None: all is made.

    Raises ConfigError where there is no run. What is wrong with checkpoints or data leaves out the
    answers.
    """
    files = read_run(workdir)
    seconds, compiled = _seconds_of_a_pass(files), _seconds_of_compiling(files)
    if max_seconds is not None and (not max_seconds or seconds > max_seconds):
        command = f"python -m flaxcls.report {shlex.quote(f'--run={workdir}')}"
        takes = f", a pass takes about {seconds:.0f} s" if seconds else ""
        why = (
            f"Predictions of the evaluation split are left out{takes}. They are made by: {command}"
        )
        return RunData(files, None, why)
    explain = max_seconds is None or seconds + compiled <= max_seconds
    try:
        return RunData(files, answers_of(workdir, data_dir, explain=explain))
    except FlaxclsError as error:
        return RunData(files, None, f"Predictions are left out: {one_line(error)}")


def _seconds_of_a_pass(run: RunFiles) -> float:
    """How long a pass over the evaluation split takes, by those of training; 0 if none was."""
    passes = sum(name in row for row in run.rows for name in ("eval", "ema"))
    return (number_in(run.goodput, "seconds", "evaluate") or 0.0) / max(passes, 1)


def _seconds_of_compiling(run: RunFiles) -> float:
    """How long the last start took to compile a step; a gradient alone takes no longer."""
    stages = [number_in(run.goodput, "start", stage) for stage in ("initialised", "compiled")]
    return stages[1] - stages[0] if None not in stages else 0.0
