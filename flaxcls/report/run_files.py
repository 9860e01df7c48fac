"""What a run's folder tells without its checkpoints: config, metrics, speed and how it ended."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from flaxcls.buckets import AnyPath
from flaxcls.config import default
from flaxcls.config.fields import changes, plain
from flaxcls.errors import ConfigError
from flaxcls.files import read_json
from flaxcls.runs import run_folder
from flaxcls.runs.tensorboard import read_events
from flaxcls.runtime.output import printable

_MOST_EVENTS = 64 * 2**20  # bytes of them that are read: some million rows


class Speed(NamedTuple):
    """How fast the steps up to one were since the row before it, as TensorBoard shows it."""

    step: int
    images_per_second: float
    data_wait: float  # share of the time


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run's folder as it was found; whatever is missing in it is empty.

    Attributes:
      path: the folder.
      config: the tree as JSON has it.
      record: what config.json holds besides.
      rows: of metrics.jsonl, in order.
      summary, goodput: of the files of these names.
      speed: of each log step.
      starts: the step after which each process began, or the run went back to.
      problems: sentences about what is damaged.
    """

    path: AnyPath
    config: dict[str, Any]
    record: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    goodput: dict[str, Any]
    speed: list[Speed]
    starts: list[int]
    problems: list[str]

    @property
    def name(self) -> str:
        return printable(self.path.resolve().name)

    @property
    def last_step(self) -> int:
        return max([row["step"] for row in self.rows], default=0)

    @property
    def changed_fields(self) -> dict[str, tuple[Any, Any]]:
        """The fields that differ from the default, with the default and the run's value."""
        return changes(default(), self.config) if self.config else {}

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """The last row of each evaluation, "eval" and perhaps "ema"."""
        return {
            name: row[name]
            for row in self.rows
            for name in ("eval", "ema")
            if isinstance(row.get(name), dict)
        }

    def values(self, group: str, name: str, x: str = "step") -> list[tuple[float, float]]:
        """A metric by the step or the epoch: ("train", "loss") -> [(x, value), ...]."""
        found = ((number(row.get(x)), number_in(row, group, name)) for row in self.rows)
        return [(at, value) for at, value in found if at is not None and value is not None]


def number(value: Any) -> float | None:
    """The value if it is a finite number: files may hold anything."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def number_in(content: Any, *path: str) -> float | None:
    """The number at a path in JSON, if it is one: number_in(summary, "eval", "accuracy")."""
    for name in path:
        content = content.get(name) if isinstance(content, Mapping) else None
    return number(content)


def read_run(workdir: AnyPath) -> RunFiles:
    """Reads a run's folder, as far as it can be read.

    Raises ConfigError where there is no run: neither a config nor metrics.
    """
    problems: list[str] = []
    rows = list(_metric_rows(workdir / "metrics.jsonl", problems))
    config: dict[str, Any] = {}
    try:
        config = plain(run_folder.load_config(workdir))
    except ConfigError as error:
        if not rows:
            raise
        problems.append(str(error))
    speed, starts = _speed(workdir / "tensorboard")
    record, summary, goodput = (
        _json(workdir / f"{name}.json", problems) for name in ("config", "summary", "goodput")
    )
    record.pop("config", None)
    return RunFiles(
        workdir,
        config,
        record,
        rows,
        summary,
        goodput,
        speed,
        starts,
        list(dict.fromkeys(problems)),
    )


def _json(path: AnyPath, problems: list[str]) -> dict[str, Any]:
    try:
        return read_json(path) or {}
    except ConfigError as error:
        problems.append(str(error))
        return {}


def _metric_rows(path: AnyPath, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of metrics.jsonl that have a step; a sentence about the others."""
    damaged = 0
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict) and type(row.get("step")) is int:
                    yield row
                else:
                    damaged += 1
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path} can't be read: {error.strerror or error}")
    if damaged:
        problems.append(
            f"{damaged:,} line{'s' * (damaged > 1)} of {path} can't be read and "
            f"{'are' if damaged > 1 else 'is'} not shown"
        )


def _speed(folder: AnyPath) -> tuple[list[Speed], list[int]]:
    """What TensorBoard's files tell of the speed, and where each of them begins.

    Every process, and every rollback, begins a file, and what earlier ones have of its steps does
    not count any more.
    """
    speed: list[Speed] = []
    starts: list[int] = []
    try:
        files = sorted(path for path in folder.iterdir() if "tfevents" in path.name)
        if sum(path.stat().st_size for path in files) > _MOST_EVENTS:
            return [], []
        for path in files:
            begun = None
            for step, is_start, values in read_events(path):
                if is_start:
                    begun = step - 1
                    speed = [each for each in speed if each.step <= begun]
                rate = values.get("time/images_per_second")
                if rate is not None and math.isfinite(rate):
                    speed.append(Speed(step, rate, values.get("time/data_wait", 0.0)))
            if begun is not None:
                starts.append(begun)
    except OSError:  # there is no such folder, or it can't be read: nobody needs it
        pass
    return speed, starts


def training_examples(run: RunFiles) -> int | None:
    """How many examples an epoch has, which rows of metrics tell; None where rounding hides it."""
    batch_size, row = number_in(run.config, "batch_size"), run.rows[-1] if run.rows else {}
    epoch = number(row.get("epoch"))  # rounded to 4 digits
    if not batch_size or not epoch:
        return None
    examples = batch_size * row["step"] / epoch
    return round(examples) if examples * 5e-5 / epoch < 0.5 else None
