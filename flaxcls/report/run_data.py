"""All that the page of a run is made of."""

import shlex
from pathlib import Path
from typing import NamedTuple

from flaxcls.errors import FlaxclsError, one_line
from flaxcls.report.answers import Answers, answers_of, seconds_of_a_pass
from flaxcls.report.run_files import RunFiles, read_run


class RunData(NamedTuple):
    """A run's folder, and what its network says of the evaluation split.

    `answers` is None where that was left out; `left_out` is the sentence that says why.
    """

    files: RunFiles
    answers: Answers | None
    left_out: str = ""


def load_run(
    workdir: Path, *, data_dir: str | None = None, max_seconds: float | None = None
) -> RunData:
    """Reads a run and makes its predictions.

    Args:
      workdir: the run's folder.
      data_dir: where the data is, if it has moved.
      max_seconds: how long a pass over the evaluation split may take, by those of training; a
        longer one is left out, and with 0 any. None: any is made.

    Raises ConfigError where there is no run. What is wrong with checkpoints or data leaves out the
    answers.
    """
    files = read_run(workdir)
    seconds = seconds_of_a_pass(files)
    if max_seconds is not None and (not max_seconds or (seconds or 0) > max_seconds):
        command = f"python -m flaxcls.report {shlex.quote(f'--run={workdir}')}"
        takes = f", a pass takes about {seconds:.0f} s" if seconds else ""
        why = (
            f"Predictions of the evaluation split are left out{takes}. They are made by: {command}"
        )
        return RunData(files, None, why)
    try:
        return RunData(files, answers_of(workdir, data_dir))
    except FlaxclsError as error:
        return RunData(files, None, f"Predictions are left out: {one_line(error)}")
