"""Sweeps: one recipe with many values of its fields, each a run of its own, and a table of them.

DIR/NAME             the run of a trial, named by its values; DIR/NAME.log is what it has said
DIR/sweep.json       the table, as it grows; DIR/sweep.csv the same
DIR/optuna.db        what Optuna knows of its trials
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flaxcls.buckets import AnyPath
from flaxcls.config.recipes import load_recipe
from flaxcls.errors import SIGNAL_EXIT_CODES, ConfigError, Interrupted
from flaxcls.files import read_json, write_csv, write_json
from flaxcls.runs import run_folder
from flaxcls.runtime.gpus import share_gpus
from flaxcls.runtime.output import Guarded, printable, say
from flaxcls.runtime.stop_request import StopRequest
from flaxcls.studies import space
from flaxcls.studies.trials import PREEMPTED, Outcome, Process, Runs, Trial, wait_a_moment


class Proposer(Protocol):
    """What decides which trials there are."""

    def next(self) -> Trial | None:
        """The next trial to be run; None if there is none, or none before another one has ended."""

    def is_hopeless(self, trial: Trial, number: int, results: Mapping[str, float]) -> bool:
        """Whether a trial is to be pruned after its evaluation of that number, from 0."""

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        """Is told of every trial that it has proposed."""


class InOrder:
    """Proposes these trials."""

    def __init__(self, trials: Iterable[Trial]):
        self._left = iter(trials)

    def next(self) -> Trial | None:
        return next(self._left, None)

    def is_hopeless(self, trial: Trial, number: int, results: Mapping[str, float]) -> bool:
        return False

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        pass


def sweep_grid(
    recipe: str,
    grid: Sequence[str],
    workdir: AnyPath,
    *,
    overrides: Sequence[str] = (),
    jobs: int = 1,
) -> dict[str, Any]:
    """Trains a recipe with every combination of some values, those that have finished excepted.

    Args:
      recipe: its file or its name.
      grid: such as "optimizer.learning_rate=0.1,0.3".
      workdir: the folder of the sweep.
      overrides: of all trials, "batch_size=64".
      jobs: trials at a time; each gets its share of the GPUs.

    Returns what sweep.json holds. Raises ConfigError before anything is trained, and Interrupted
    when a signal asked it to end, and all trials have saved themselves.
    """
    choices = [space.parse_choice(text) for text in grid]
    space.check_fields(choices)
    trials = [Trial(space.trial_name(values), values) for values in space.grid(choices)]
    for trial in trials:
        space.check_values(recipe, overrides, trial.values)
    runs, shares = Runs(recipe, overrides, workdir), share_gpus(jobs)
    noted = claim(workdir)
    found = [(trial, runs.earlier(trial, noted.get(trial.name))) for trial in trials]
    ended = [(trial, outcome) for trial, outcome in found if outcome]
    left = InOrder(trial for trial, outcome in found if not outcome)
    return run_trials(runs, left, shares, ended)


def claim(workdir: AnyPath) -> dict[str, Outcome]:
    """How trials of a sweep have ended before, by their names; makes the folder of a new one.

    ConfigError if there is something else in it.
    """
    path = workdir / "sweep.json"
    content = read_json(path)
    if content is None:
        if workdir.is_dir() and any(workdir.iterdir()):
            raise ConfigError(
                f"--workdir={printable(workdir)} is not empty and holds no sweep: give a new or an "
                "empty folder"
            )
        workdir.mkdir(parents=True, exist_ok=True)
        content = {"trials": []}
        write_json(path, content)
    try:
        return {
            row["name"]: Outcome(**{name: row[name] for name in Outcome._fields})
            for row in content["trials"]
        }
    except (LookupError, TypeError) as error:
        raise ConfigError(f"{printable(path)} is no table of a sweep") from error


def run_trials(
    runs: Runs,
    proposer: Proposer,
    shares: Sequence[Mapping[str, str]],
    ended: Iterable[tuple[Trial, Outcome]] = (),
) -> dict[str, Any]:
    """Runs what a proposer proposes, and keeps the table of it and of what has ended before.

    Args:
      shares: the environment of each of the processes that run at a time.

    Returns what sweep.json holds.
    """
    config = load_recipe(runs.recipe, runs.overrides).config
    metric, split = config.checkpoint.best_metric, config.data.eval_split
    if "test" in split:
        say(
            f"note: trials are compared by their results on '{split}', which is no test then; a "
            "part to choose by is --config.data.train_split='train, all but fold 0 of 10' "
            "--config.data.eval_split='train, fold 0 of 10'",
            error=True,
        )
    ended, running = list(ended), dict[int, Process]()
    content = _write(runs.workdir, metric, ended)
    with StopRequest() as asked_to_stop:
        while True:
            if signal := asked_to_stop():
                _stop(running.values(), runs.workdir, SIGNAL_EXIT_CODES[signal])
            for slot, share in enumerate(shares):
                if slot not in running and (trial := proposer.next()):
                    say(f"{trial.name}: started")
                    running[slot] = runs.start(trial, share)
            if not running:
                return content
            wait_a_moment()
            for slot, process in list(running.items()):
                outcome = process.outcome()  # before its last evaluations are looked at
                _prune(process, proposer)
                if outcome:
                    del running[slot]
                    say(f"{process.trial.name}: {_summary(outcome, metric)}")
                    ended.append((process.trial, outcome))
                    proposer.ended(process.trial, outcome)
                    content = _write(runs.workdir, metric, ended)


def _prune(process: Process, proposer: Proposer) -> None:
    for number, results in process.new_evaluations():
        if proposer.is_hopeless(process.trial, number, results) and not process.is_pruned:
            process.prune()


def _stop(processes: Iterable[Process], workdir: AnyPath, exit_code: int) -> None:
    """Ends all, which save themselves, and raises Interrupted."""
    processes = list(processes)
    for process in processes:
        process.stop()
    for process in processes:
        process.wait()
    flag = shlex.quote(f"--workdir={workdir}")
    raise Interrupted(
        f"stopped, and the trials under way are saved; the same command with {flag} resumes them",
        exit_code,
    )


# The table.


def _write(workdir: AnyPath, metric: str, ended: Sequence[tuple[Trial, Outcome]]) -> dict[str, Any]:
    """Writes sweep.json and sweep.csv, the best trial first; returns the former's content."""
    sign = 1 if metric == "loss" else -1

    def place(item: tuple[Trial, Outcome]) -> tuple:
        _, outcome = item
        order = ("finished", "pruned", "failed").index(outcome.status)
        return order, sign * outcome.results.get(metric, sign * float("inf"))

    rows = [
        {"name": trial.name, "values": dict(trial.values), **outcome._asdict()}
        for trial, outcome in sorted(ended, key=place)
    ]
    content = {"metric": metric, "trials": rows}
    write_json(workdir / "sweep.json", content)
    fields = list(dict.fromkeys(field for row in rows for field in row["values"]))
    names = list(dict.fromkeys(name for row in rows for name in row["results"]))
    header = ("name", *fields, "status", "step", *names, "seconds", "exit_code", "why")
    cells = (
        (
            row["name"],
            *(row["values"].get(field) for field in fields),
            *(row["status"], row["step"]),
            *(row["results"].get(name) for name in names),
            *(row["seconds"], row["exit_code"], row["sentence"]),
        )
        for row in rows
    )
    write_csv(workdir / "sweep.csv", header, cells)
    return content


def exit_code(content: Mapping[str, Any]) -> int:
    """0 if no trial failed; 42 if one asks to be restarted; what all that failed ended with; or 1.

    A process that a signal ended counts as 1.
    """
    codes = {row["exit_code"] for row in content["trials"] if row["status"] == "failed"}
    if not codes:
        return 0
    if PREEMPTED in codes:
        return PREEMPTED
    (code, *others) = codes
    return code if not others and code > 0 else 1


def _summary(outcome: Outcome, metric: str) -> str:
    """How a trial ended, in a few words."""
    value = outcome.results.get(metric)
    result = "" if value is None else f", {metric} {_value(metric, value)} at step {outcome.step:,}"
    return f"{outcome.status}{result}" + (f": {outcome.sentence}" if outcome.sentence else "")


def _value(metric: str, value: float) -> str:
    return f"{100 * value:.2f} %" if metric.startswith("accuracy") else f"{value:.4f}"


def show(content: Mapping[str, Any]) -> None:
    """Prints the table, the best trial first."""
    out: Any = Guarded(result=True)
    width = None if out.isatty() else 160
    console = Console(file=out, width=width, highlight=False, markup=False, emoji=False)
    rows = content["trials"]
    fields = list(dict.fromkeys(field for row in rows for field in row["values"]))
    metrics = [content["metric"], "loss" if content["metric"] != "loss" else "accuracy"]
    table = Table(*fields, *metrics, "step", "seconds", "", box=None, header_style="bold")
    for row in rows:
        values = [row["values"].get(field, "") for field in fields]
        results = [
            _value(name, row["results"][name]) if name in row["results"] else "-"
            for name in metrics
        ]
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        end = ": ".join(text for text in (row["status"], row["sentence"]) if text)
        cells = (*values, *results, f"{row['step']:,}", seconds, end)
        table.add_row(*map(Text, map(printable, cells)))
    console.print(table)


def new_folder(recipe: str) -> Path:
    """Where a sweep of a recipe goes that is given no folder."""
    folder = run_folder.new_folder(recipe)
    return folder.with_name(f"sweep-{folder.name}")
