"""What a run logs while it trains: the terminal, metrics.jsonl, TensorBoard and trackers."""

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from flaxcls.buckets import AnyPath
from flaxcls.errors import ConfigError, FlaxclsError, Interrupted, RunTakenError
from flaxcls.files import atomic_write, open_to_append
from flaxcls.runs.tensorboard import TensorBoard
from flaxcls.runs.trackers import Trackers
from flaxcls.runtime.output import Guarded, printable_lines

FIRST_LINE_SECONDS = 3  # of steps, from which the rest is estimated


class MetricLog:
    """Writes one row at a time to `metrics.jsonl`, TensorBoard and the terminal.

    Without a folder it does nothing, for processes that leave writing to another one.

    Attributes:
      is_silent: whether nothing has been said of the steps yet.

    Before anything is written `check` is called, which raises where nothing may be any more.

    Rows of `metrics.jsonl` hold nothing that depends on the clock, so that the file of a resumed
    run is byte for byte that of one that was never interrupted. Rows after `start_step`, from which
    the run resumes, are dropped.
    """

    def __init__(
        self,
        workdir: AnyPath | None,
        start_step: int,
        total_steps: int,
        batch_size: int,
        check: Callable[[], None] = lambda: None,
    ):
        self._check = check
        self._total_steps, self._batch_size = total_steps, batch_size
        self._path = workdir / "metrics.jsonl" if workdir else Path(os.devnull)
        self._console = Console(
            highlight=False,
            soft_wrap=True,
            emoji=False,
            quiet=workdir is None,
            file=Guarded(),
            force_jupyter=False,
        )
        self._live = None
        if workdir and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._board = TensorBoard(workdir and workdir / "tensorboard")
        self._workdir, self._trackers = workdir, None
        self._open(start_step)
        self.begin(start_step)

    def _open(self, start_step: int) -> None:
        self._check()
        try:
            if self._path != Path(os.devnull):
                self._keep_until(start_step)
            self._file = open_to_append(self._path)
        except OSError as error:
            passes = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
            kind = FlaxclsError if passes else ConfigError
            raise kind(f"{self._path} can't be written: {error.strerror}") from error
        self._pending, self._waiting = b"", False  # rows that a full disk has no room for
        self._board.open(start_step + 1)

    def track(self, services: Sequence[str], config: Mapping[str, Any]) -> None:
        """From now on the rows go to these services of `trackers`, too."""
        if self._workdir:
            self._trackers = Trackers(services, self._workdir, config, self.say)

    def cut(self, step: int) -> None:
        """Drops the rows after a step, to which the run was rolled back."""
        self._file.close()
        self._open(step)

    def _keep_until(self, start_step: int) -> None:
        content, kept = self._path.read_bytes() if self._path.exists() else b"", []
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            step = _step_of(line)
            if step is None:
                if line.endswith(b"\n"):  # else it was torn off when the run was killed
                    lost = len(lines) - number + 1
                    self.say(
                        f"{self._path}, line {number} is damaged: it and what comes after it, "
                        f"{lost} line{'s' * (lost > 1)}, is dropped"
                    )
                break
            if step <= start_step:
                kept.append(line.rstrip() + b"\n")
        with atomic_write(self._path) as file:
            file.writelines(kept)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(printable_lines(text), markup=False)

    def begin(self, step: int) -> None:
        """Now the loop begins, or begins again, after a step."""
        self._begin, self._began, self.is_silent = step, time.perf_counter(), True
        self._first: int | None = None  # step after the first dispatch
        self._first_step_ended = self._began

    def stepped(self, step: int, epoch: float) -> None:
        """Says how fast it is and how long it takes, once, some seconds after the first step.

        Rows may be far apart, and who waits wants to know. Nothing is said after the first row.
        """
        if not self.is_silent:
            return
        now = time.perf_counter()
        if self._first is None:
            self._first, self._first_step_ended = step, now
        # The first step waits for the first data; where steps take long it is all there is.
        seconds, steps = now - self._first_step_ended, step - self._first
        if not steps and now - self._began >= 2 * FIRST_LINE_SECONDS:
            seconds, steps = now - self._began, step - self._begin
        if steps and seconds >= FIRST_LINE_SECONDS and step < self._total_steps:
            self.is_silent = False
            remaining = (self._total_steps - step) * seconds / steps
            self.say(
                f"step {step}/{self._total_steps}  epoch {epoch:.2f}  "
                f"{self._batch_size * steps / seconds:,.0f} images/s  {_about(remaining)} to go"
            )

    def _remaining(self, step: int) -> float:
        """Seconds, at the pace since the loop began, evaluations and saves included."""
        elapsed = time.perf_counter() - self._began
        return (self._total_steps - step) * elapsed / max(step - self._begin, 1)

    def training(
        self, step: int, epoch: float, row: dict[str, float], lap: tuple[float, float]
    ) -> None:
        """A row of training metrics, and the live line; `lap` is the stopwatch's."""
        self._write(step, epoch, {"train": row})
        steps_per_second, data_wait = lap
        rate = self._batch_size * steps_per_second
        self._add(step, {"time/images_per_second": rate, "time/data_wait": data_wait})
        self.is_silent = False
        line = (
            f"step {step}/{self._total_steps}  epoch {epoch:.2f}  loss {row['loss']:.4f}  "
            f"accuracy {100 * row['accuracy']:.2f} %  lr {row['learning_rate']:.3g}  "
            f"{rate:,.0f} images/s  data wait {100 * data_wait:.0f} %  "
            f"ETA {_clock(self._remaining(step))}"
        )
        if row.get("skipped_updates"):
            line += f"  {row['skipped_updates']} updates skipped"
        if self._live:
            self._live.update(Text(line))
        else:
            self.say(line)

    def evaluation(self, step: int, epoch: float, results: dict[str, dict[str, float]]) -> None:
        """Rows of evaluation metrics by name ("eval", "ema")."""
        self._write(step, epoch, results)
        for name, row in results.items():
            self.say(f"step {step}  epoch {epoch:.2f}  {name}: {describe(row)}")

    def _write(self, step: int, epoch: float, groups: Mapping[str, Mapping[str, float]]) -> None:
        self._check()
        row = {"step": step, "epoch": round(epoch, 4), **groups}
        self._pending += (json.dumps(_json(row)) + "\n").encode()
        with self._noting_failure():
            self._write_pending()
        for group, values in groups.items():
            self._add(step, {f"{group}/{name}": value for name, value in values.items()})

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        self._board.add(step, values)
        if self._trackers:
            self._trackers.add(step, values)

    def flush(self) -> bool:
        """Writes the rows that there was no room for when they came; whether all are written."""
        with self._noting_failure():
            self._write_pending()
            self._file.flush()
        return not self._waiting

    def _write_pending(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
            self._waiting = False
        except OSError as error:
            if not self._waiting:  # said once
                self.say(f"{self._path} can't be written: {error.strerror}; its rows are kept")
            self._waiting = True

    def __enter__(self) -> "MetricLog":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        if self._live:
            self._live.stop()
        if kind is None or not issubclass(kind, RunTakenError):
            self.flush()
            self._board.flush()
        self._file.close()
        self._board.close()
        if self._trackers:
            preempted = kind is not None and issubclass(kind, Interrupted)
            self._trackers.close("preempted" if preempted else "failed" if kind else "finished")


def _step_of(line: bytes) -> int | None:
    """The step of a row of metrics.jsonl; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if type(step) is int else None


def _json(value: Any) -> Any:
    """The value with None for NaN, the mean of nothing: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _json(each) for key, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def describe(row: Mapping[str, float]) -> str:
    """`accuracy 98.61 % (355 of 360), loss 0.0512`, and balanced accuracy where it is there."""
    parts = []
    for name, label in (("accuracy", "accuracy"), ("accuracy_top5", "top-5 accuracy")):
        if name in row:
            right = round(row[name] * row["count"])
            parts.append(f"{label} {100 * row[name]:.2f} % ({right:,} of {row['count']:,})")
    if "balanced_accuracy" in row:
        parts.append(f"balanced accuracy {100 * row['balanced_accuracy']:.2f} %")
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    return ", ".join(parts)


def describe_end(summary: Mapping[str, Any]) -> str:
    """The last results of summary.json and, where it is another one, the best result."""
    text, best = describe(summary["eval"]), summary["best"]
    if best and (best["step"], best["weights"]) != (summary["step"], "eval"):
        averaged = ", averaged parameters" if best["weights"] == "ema" else ""
        text += f"\nThe best was after step {best['step']:,}{averaged}: {describe(best)}"
    return text


def _about(seconds: float) -> str:
    """`about 50 seconds`, `about 12 minutes`, `about 3.5 hours`."""
    if seconds < 90:
        return f"about {seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.1f} hours"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
