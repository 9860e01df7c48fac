"""What a run tells while it goes: the terminal, metrics.jsonl and TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from tensorboardX import SummaryWriter


class Watch:
    """Writes one row at a time to `metrics.jsonl`, TensorBoard and the terminal.

    Without a folder it does nothing, for processes that leave writing to another one.

    Rows of `metrics.jsonl` hold nothing that depends on the clock, so that the file of a resumed
    run is byte for byte that of one that was never interrupted. Rows after `start_step`, from which
    the run goes on, are cut off.
    """

    def __init__(self, workdir: Path | None, start_step: int, total_steps: int, batch_size: int):
        self._total_steps, self._batch_size = total_steps, batch_size
        self._workdir = workdir
        self._console = Console(highlight=False, soft_wrap=True, quiet=workdir is None)
        self._live = None
        if workdir and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._open(start_step)

    def _open(self, start_step: int) -> None:
        writes = self._workdir is not None
        self._path = self._workdir / "metrics.jsonl" if writes else Path(os.devnull)
        if writes:
            self._keep_until(start_step)
        self._file = self._path.open("a")
        folder = str(self._workdir / "tensorboard") if writes else None
        self._board = SummaryWriter(folder, purge_step=start_step + 1, write_to_disk=writes)

    def cut(self, step: int) -> None:
        """Forgets what came after a step, to which the run has gone back."""
        self._close()
        self._open(step)

    def _keep_until(self, start_step: int) -> None:
        kept = []
        for line in self._path.read_text().splitlines() if self._path.exists() else []:
            try:
                if json.loads(line)["step"] <= start_step:
                    kept.append(line + "\n")
            except ValueError:  # torn off when the run was killed
                break
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self._path)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        self._console.print(text, markup=False)

    def training(
        self, step: int, epoch: float, row: dict[str, float], lap: tuple[float, float]
    ) -> None:
        """A row of training metrics, and the live line; `lap` is the stopwatch's."""
        self._write(step, epoch, {"train": row})
        steps_per_second, data_wait = lap
        rate = self._batch_size * steps_per_second
        self._board.add_scalar("time/images_per_second", rate, step)
        self._board.add_scalar("time/data_wait", data_wait, step)
        eta = (self._total_steps - step) / steps_per_second
        line = (
            f"step {step}/{self._total_steps}  epoch {epoch:.2f}  loss {row['loss']:.4f}  "
            f"accuracy {100 * row['accuracy']:.2f} %  lr {row['learning_rate']:.3g}  "
            f"{rate:,.0f} images/s  data wait {100 * data_wait:.0f} %  "
            f"ETA {_clock(eta)}"
        )
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
        row = {"step": step, "epoch": round(epoch, 4), **groups}
        self._file.write(json.dumps(_json(row)) + "\n")
        self._file.flush()
        for group, values in groups.items():
            for name, value in values.items():
                if not math.isnan(value):
                    self._board.add_scalar(f"{group}/{name}", value, step)

    def __enter__(self) -> "Watch":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()
        self._close()

    def _close(self) -> None:
        self._board.close()
        self._file.close()


def _json(value: Any) -> Any:
    """The value with None for NaN, the mean of nothing: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _json(each) for key, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def describe(row: Mapping[str, float]) -> str:
    """`accuracy 98.61 % (355 of 360), loss 0.0512`."""
    parts = []
    for name, label in (("accuracy", "accuracy"), ("accuracy_top5", "top-5 accuracy")):
        if name in row:
            right = round(row[name] * row["count"])
            parts.append(f"{label} {100 * row[name]:.2f} % ({right:,} of {row['count']:,})")
    return ", ".join([*parts, f"loss {row['loss']:.4f}"])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
