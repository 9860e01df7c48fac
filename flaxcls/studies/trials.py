"""The trials of a sweep: runs in processes of their own, and how each of them ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from flaxcls.buckets import AnyPath, BucketPath
from flaxcls.config.recipes import load_recipe
from flaxcls.errors import DivergedError, FlaxclsError
from flaxcls.runs import run_folder
from flaxcls.runtime.scratch import scratch_folder
from flaxcls.studies.space import Values, overrides_of
from flaxcls.training.initial import complete
from flaxcls.training.recipe import completed

PREEMPTED = 42  # the exit code of a run that was asked to end, and is to be resumed


class Trial(NamedTuple):
    """Values of config fields, and the name of the folder of the run that has them."""

    name: str
    values: Values


class Outcome(NamedTuple):
    """How a trial ended.

    Attributes:
      status: "finished"; "pruned", because others were better; "failed".
      step: of the last evaluation, 0 if there was none.
      results: of the last evaluation: {"accuracy", "loss", "count", ...}.
      seconds: that the run has taken, where it has finished.
      exit_code: of its process.
      sentence: why it failed.
    """

    status: Literal["finished", "pruned", "failed"]
    step: int = 0
    results: Mapping[str, float] = {}
    seconds: float | None = None
    exit_code: int = 0
    sentence: str = ""


class Runs(NamedTuple):
    """What all trials of a sweep have in common: the recipe, its overrides and the folder."""

    recipe: str
    overrides: Sequence[str]
    workdir: AnyPath

    def earlier(self, trial: Trial, known: Outcome | None) -> Outcome | None:
        """How a trial has ended before; None if there is something left to do.

        One that has diverged would diverge again; another failure may have passed. Raises
        ConfigError where the folder has a run of another config.

        Args:
          known: what the sweep has noted of it.
        """
        folder = self.workdir / trial.name
        if not (folder / "config.json").exists():
            return known if known and known.exit_code == DivergedError.exit_code else None
        overrides = [*self.overrides, *overrides_of(trial.values)]
        config = completed(load_recipe(self.recipe, overrides), folder)
        complete(config, folder)
        try:
            before, summary = run_folder.claim(folder, config)
        except FlaxclsError as error:
            error.args = (f"{trial.name}: {error}",)
            raise
        if summary:
            results = summary.get("ema") or summary["eval"]
            return Outcome("finished", summary["step"], results, summary["seconds"])
        is_same = known is not None and before is not None and before.duration == config.duration
        return known if is_same and known.exit_code == DivergedError.exit_code else None

    def start(self, trial: Trial, environment: Mapping[str, str]) -> "Process":
        """Starts or resumes a trial in a process of its own, with its output in NAME.log."""
        overrides = [*self.overrides, *overrides_of(trial.values)]
        flags = [f"--config={self.recipe}", f"--workdir={self.workdir / trial.name}"]
        command = [sys.executable, "-m", "flaxcls.studies.trial_process", *flags]
        command += [f"--config.{override}" for override in overrides]
        return Process(trial, self.workdir / trial.name, command, environment)


class Process:
    """A trial that is running.

    Attributes:
      trial: which one.
      is_pruned: whether it was asked to end because others are better.
    """

    def __init__(
        self, trial: Trial, folder: AnyPath, command: Sequence[str], environment: Mapping[str, str]
    ):
        self.trial, self.is_pruned = trial, False
        self._folder, self._log = folder, folder.with_name(f"{folder.name}.log")
        if isinstance(self._log, BucketPath):  # it is there when the trial has ended
            self._uploaded = self._log
            self._log = scratch_folder(self) / self._log.name
        self._seen = 0
        with self._log.open("ab") as log:
            self._begin = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C comes to the sweep alone, which passes it on
            )

    def new_evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """The number and the results of each evaluation since the last time it was asked."""
        if isinstance(self._folder, BucketPath):  # of a grid, which asks nobody to end
            return []
        rows = evaluations(self._folder)
        new = [(number, row) for number, (_, row) in enumerate(rows)][self._seen :]
        self._seen = max(self._seen, len(rows))
        return new

    def prune(self) -> None:
        """Asks it to save itself and end."""
        self.is_pruned = True
        self.stop()

    def stop(self) -> None:
        """As `prune`, of a trial that is to be resumed."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def wait(self) -> None:
        self._process.wait()
        self._process.stdin.close()

    def outcome(self) -> Outcome | None:
        """How it ended; None while it runs."""
        code = self._process.poll()
        if code is None:
            return None
        self._process.stdin.close()
        if isinstance(self._folder, BucketPath):
            with contextlib.suppress(OSError):
                self._uploaded.write_bytes(self._log.read_bytes())
        rows = evaluations(self._folder)
        step, results = rows[-1] if rows else (0, {})
        if self.is_pruned and code in (0, PREEMPTED, -signal.SIGTERM):
            return Outcome("pruned", step, results)
        if code:
            return Outcome("failed", step, results, None, code, self._why(code))
        summary = run_folder.read_summary(self._folder) or {}
        return Outcome("finished", step, results, summary.get("seconds"))

    def _why(self, code: int) -> str:
        """The sentence with which a process ended, as its log has it."""
        with self._log.open("rb") as log:
            log.seek(self._begin)
            lines = log.read().decode(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("flaxcls: ")]
        if code > 0 and (said or lines):
            return (said or lines)[-1].removeprefix("flaxcls: ")
        return f"its process ended with {f'signal {-code}' if code < 0 else f'code {code}'}"


def evaluations(folder: AnyPath) -> list[tuple[int, dict[str, float]]]:
    """The step and the results of each evaluation of a run: of the averaged parameters if kept."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # a row that is being written
                row: dict[str, Any] = json.loads(line)
                if "eval" in row:
                    rows.append((row["step"], row.get("ema") or row["eval"]))
    return rows


def wait_a_moment() -> None:
    """Between two looks at the processes."""
    time.sleep(0.2)
