"""One network whose weights are the mean of several: of a run's checkpoints, or of several runs.

Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407) and model soups (Wortsman et
al. 2022, arXiv:2203.05482). What comes out is a run's folder like any other.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxcls.buckets import AnyPath, as_path
from flaxcls.build.notes import evaluated_twice
from flaxcls.config.fields import changes
from flaxcls.data.pipeline import Pipeline
from flaxcls.errors import ConfigError
from flaxcls.files import write_json
from flaxcls.inference.batch_statistics import batch_statistics
from flaxcls.inference.evaluator import evaluator_of
from flaxcls.inference.restored import RestoredRun, restore
from flaxcls.runs import run_folder
from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.checkpoint_reader import CheckpointReader
from flaxcls.runs.goodput import Goodput
from flaxcls.runtime import sharding
from flaxcls.runtime.output import printable, say

# Of config.model, what does not make it another network.
_OF_COMPUTATION = ("dtype", "batch_norm_group")


class Member(NamedTuple):
    """A checkpoint whose parameters, not their running average, are averaged."""

    run: AnyPath
    step: int

    def __str__(self) -> str:
        return f"{printable(self.run)}@{self.step}"

    def arrays(self) -> Any:
        """{"params", "batch_stats"} as NumPy's arrays."""
        found = CheckpointReader(self.run / "checkpoints").arrays(
            self.step, ["params", "batch_stats"]
        )
        return {"params": found["params"], "batch_stats": found.get("batch_stats", {})}

    def metadata(self) -> dict[str, Any]:
        return CheckpointReader(self.run / "checkpoints").metadata(self.step)


class Averaged(NamedTuple):
    """What came out: the step in its folder, the members taken, and the metrics as "eval"."""

    step: int
    split: str
    members: tuple[Member, ...]
    results: dict[str, dict[str, float]]


def average_runs(
    runs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    checkpoint: str | None = None,
    greedy: bool = False,
    split: str | None = None,
    data_dir: str | None = None,
) -> Averaged:
    """Writes the mean of the weights of several checkpoints as the run `out`.

    BatchNorm's statistics are estimated anew, on the whole training split as evaluation sees it.

    Args:
      runs: folders of one run or several, of one network, with the same classes.
      out: a folder that is not there yet, or empty.
      checkpoint: which of each run, "last", "best", a step, several such as "800,1000", or "all"
        that are kept; None: all of a single run, the last of each of several.
      greedy: whether a checkpoint is taken only if the mean with it is not worse on `split`, the
        best ones first (a greedy soup).
      split: held out for that: neither trained on nor the test split.
      data_dir: where the data is now, as in `evaluate_run`.

    Raises ConfigError for runs that can't be averaged, and a split that must not choose.
    """
    out = as_path(out, "--out=")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out={printable(out)} is there already; name a new folder")
    members = _members(run_folder.folders(runs), checkpoint)
    _check_alike(members)
    run = restore(members[-1].run, str(members[-1].step))
    soup = _Soup(run, data_dir)
    if greedy:
        held_out = _held_out(run, split, soup.train, data_dir)
        members = soup.choose(members, held_out)
    variables = soup.of(members)
    pipeline = run.experiment.evaluation(None, data_dir)
    results = {"eval": _evaluate(run, variables, pipeline)}
    step = max(member.step for member in members)
    _write(out, run, step, variables, members, results)
    return Averaged(step, pipeline.source.split, tuple(members), results)


def _members(runs: Sequence[AnyPath], checkpoint: str | None) -> list[Member]:
    which = checkpoint or ("all" if len(runs) == 1 else "last")
    members = []
    for run in runs:
        run_folder.load_config(run)  # NoRun, which says so
        reader = CheckpointReader(run / "checkpoints")
        asked = which.split(",")
        steps = reader.steps() if which == "all" else [reader.find(one.strip()) for one in asked]
        members += [Member(run, step) for step in steps]
    members = list(dict.fromkeys(members))
    if len(members) < 2:
        raise ConfigError(
            f"there is one checkpoint to average, {', '.join(map(str, members)) or 'or none'}: "
            "name more runs, or keep more of a run by config.checkpoint.keep"
        )
    return members


def _check_alike(members: Sequence[Member]) -> None:
    """ConfigError unless all are of one network, trained to tell the same classes."""
    (first, of_first), *others = [(member, member.metadata()) for member in members]

    def network(metadata: dict[str, Any]) -> dict[str, Any]:
        model = metadata["config"]["model"]
        return {name: value for name, value in model.items() if name not in _OF_COMPUTATION}

    for member, metadata in others:
        for field, (one, other) in changes(network(of_first), network(metadata)).items():
            raise ConfigError(
                f"{first} and {member} are different networks: config.model.{field} is {one!r} "
                f"and {other!r}"
            )
        for name, what in (
            ("class_names", "tell different classes apart"),
            ("image_shape", "take images of different sizes"),
            ("mean", "normalise images by different means"),
            ("std", "normalise images by different standard deviations"),
        ):
            if not np.array_equal(of_first[name], metadata[name]):
                raise ConfigError(f"{first} and {member} {what}: their weights have no mean")
    begun = {
        (m["config"]["seed"], m["config"]["init_from"]) for _, m in [(first, of_first), *others]
    }
    if len(begun) > 1 and any(init_from is None for _, init_from in begun):
        say(
            "note: these runs began with different random weights, whose mean is seldom any good: "
            "begin all with the same by config.init_from",
            error=True,
        )


def _held_out(
    run: RestoredRun, split: str | None, train: Pipeline, data_dir: str | None
) -> Pipeline:
    """The split that chooses; ConfigError for one that must not."""
    if split is None:
        raise ConfigError(
            "--split is missing: what a greedy soup takes is chosen on a split that is held out, "
            "neither trained on nor the test split, such as 'train[90%:]' of runs that were "
            "trained on 'train[:90%]'"
        )
    if any(part.partition("[")[0].strip() == "test" for part in split.split("+")):
        raise ConfigError(
            f"--split='{split}' must not choose: on the test split the result would be too good"
        )

    def whole(name: str) -> Any:
        return run.experiment.evaluation(name, data_dir).source

    held_out = run.experiment.evaluation(split, data_dir)
    if any(evaluated_twice(train.source, held_out.source, whole)):
        raise ConfigError(
            f"--split='{split}' must not choose: the runs were trained on some of it "
            f"('{train.source.split}')"
        )
    return held_out


class _Soup:
    """Means of the weights of checkpoints that a run is one of."""

    def __init__(self, run: RestoredRun, data_dir: str | None):
        self._run = run
        data, finetune = (run.metadata["config"][name] for name in ("data", "finetune"))
        self.train: Pipeline = run.experiment.evaluation(data["train_split"], data_dir)
        # Statistics that were kept in training are the same in all of them.
        self._keeps_statistics = finetune["freeze_batch_stats"] or not run.variables["batch_stats"]

    def of(self, members: Sequence[Member]) -> Any:
        """The mean, on the devices, with BatchNorm's statistics of its own."""
        total = None
        for member in members:  # one after the other: they may be large
            arrays = jax.tree.map(np.float64, member.arrays())
            total = arrays if total is None else jax.tree.map(np.add, total, arrays)
        mean = jax.tree.map(lambda x: np.float32(x / len(members)), total)
        return self._complete(mean)

    def _complete(self, variables: Any) -> Any:
        variables = jax.device_put(variables, sharding.shardings(self._run.mesh, variables))
        if self._keeps_statistics:
            return variables
        statistics = batch_statistics(self._run, variables, self.train)
        return {**variables, "batch_stats": statistics}

    def choose(self, members: Sequence[Member], held_out: Pipeline) -> list[Member]:
        """Those that a greedy soup takes."""
        metric = self._run.experiment.best_metric
        sign = -1 if metric == "loss" else 1

        def score(members: Sequence[Member]) -> float:
            found = _evaluate(self._run, self.of(members), held_out)[metric]
            say(f"{' + '.join(map(str, members))}: {metric} {found:.4f}", error=True)
            return -math.inf if math.isnan(found) else sign * found

        return greedy_choice(members, score)


def greedy_choice(members: Sequence[Any], score: Callable[[Sequence[Any]], float]) -> list[Any]:
    """The greedy soup, recipe 1 of Wortsman et al. 2022, of at least one member.

    Of the best one alone, and then from the next best one on of each with which the mean is not
    worse. `score` says how good the mean of some members is.
    """
    alone = {member: score([member]) for member in members}
    first, *others = sorted(members, key=lambda member: -alone[member])
    taken, best = [first], alone[first]
    for member in others:
        now = score([*taken, member])
        if now >= best:
            taken, best = [*taken, member], now
    return taken


def _evaluate(run: RestoredRun, variables: Any, pipeline: Pipeline) -> dict[str, float]:
    with contextlib.closing(evaluator_of(run, pipeline)) as evaluator:
        return evaluator(variables)


def _write(
    out: AnyPath,
    run: RestoredRun,
    step: int,
    variables: Any,
    members: Sequence[Member],
    results: dict[str, dict[str, float]],
) -> None:
    """A run's folder with one checkpoint; its config.json comes last, which makes it a run."""
    best = {"step": step, "weights": "eval", **results["eval"]}
    metadata = {
        **run.metadata,
        "config": {**run.metadata["config"], "ema_decay": None},
        "averaged": [[str(member.run), member.step] for member in members],
    }
    progress = {"seconds": {}, "results": results, "best": best, "rollbacks": 0, "data_offset": 0}
    with Checkpoints(out / "checkpoints") as checkpoints:
        checkpoints.save(step, variables, {**metadata, "progress": progress})
        checkpoints.wait()
    metadata.pop("progress", None)
    run_folder.record(out, metadata)
    numbers = Goodput().numbers()
    summary = {"finished": True, "step": step, "seconds": 0.0, "goodput": numbers}
    write_json(out / "summary.json", {**summary, **results, "best": best})
