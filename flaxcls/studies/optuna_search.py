"""Sweeps whose values Optuna chooses, by what the trials before have reached.

Its tree-structured Parzen estimator proposes; its median pruner ends a trial whose evaluation is
worse than the median of the earlier ones after as many evaluations, once there are five.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flaxcls.buckets import AnyPath
from flaxcls.config.recipes import load_recipe
from flaxcls.errors import ConfigError
from flaxcls.remote import is_remote
from flaxcls.runtime.gpus import share_gpus
from flaxcls.studies import space
from flaxcls.studies.sweep import claim, run_trials
from flaxcls.studies.trials import PREEMPTED, Outcome, Runs, Trial


def sweep_optuna(
    recipe: str,
    search: Sequence[str],
    workdir: AnyPath,
    count: int,
    *,
    overrides: Sequence[str] = (),
    jobs: int = 1,
) -> dict[str, Any]:
    """Trains a recipe with values that Optuna chooses; see `sweep.sweep_grid`.

    Args:
      search: such as "optimizer.learning_rate=1e-3..1e-1:log" or "model.name=resnet18,resnet34".
      count: of trials, with those that the folder has already.
    """
    if is_remote(workdir):
        raise ConfigError(
            f"--workdir={workdir} can't be in a bucket with --optuna, which keeps its trials in a "
            "database: name a folder of this machine"
        )
    fields = [space.parse_search(text) for text in search]
    space.check_fields(fields)
    for values in space.corners(fields):
        space.check_values(recipe, overrides, values)
    runs, shares = Runs(recipe, overrides, workdir), share_gpus(jobs)
    noted = claim(workdir)
    config = load_recipe(recipe, overrides).config
    metric = config.checkpoint.best_metric
    proposer = OptunaSearch(fields, workdir / "optuna.db", count, metric, config.seed)
    ended = []
    for trial in proposer.earlier():
        outcome = noted.get(trial.name) or Outcome(
            "failed", sentence="it is not known how it ended"
        )
        ended.append((trial, runs.earlier(trial, outcome) or outcome))
    return run_trials(runs, proposer, shares, ended)


class OptunaSearch:
    """Proposes what Optuna does; its storage, a file, is that of all sessions of a sweep."""

    def __init__(
        self,
        fields: Sequence[space.Choice | space.Span],
        storage: Path,
        count: int,
        metric: str,
        seed: int,
    ):
        try:
            import optuna
        except ImportError as error:
            raise ConfigError("--optuna needs Optuna: pip install 'flaxcls[sweep]'") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._fields, self._metric, self._count = optuna, fields, metric, count
        self._study = optuna.create_study(
            storage=f"sqlite:///{storage.resolve()}",
            study_name="sweep",
            direction="minimize" if metric == "loss" else "maximize",
            load_if_exists=True,
        )
        searched = _as_json([(type(field).__name__, *field) for field in fields])
        before = self._study.user_attrs.get("searched", searched)
        if before != searched:
            raise ConfigError(
                f"{storage.parent} is of another --search, of {', '.join(f[1] for f in before)}: "
                "give a new folder"
            )
        self._study.set_user_attr("searched", searched)
        there = self._study.get_trials(deepcopy=False)
        # From the beginning it would draw once more what it has drawn.
        self._study.sampler = optuna.samplers.TPESampler(seed=(seed + len(there)) % 2**32)
        running = optuna.trial.TrialState.RUNNING
        self._interrupted = [trial for trial in there if trial.state == running]
        self._ended = [trial for trial in there if trial.state != running]
        self._open: dict[str, Any] = {}
        self._reported: dict[str, set[int]] = {}

    def earlier(self) -> list[Trial]:
        """The trials that ended in earlier sessions."""
        return [_trial(trial.number, trial.user_attrs["values"]) for trial in self._ended]

    def next(self) -> Trial | None:
        if self._interrupted:
            earlier = self._interrupted.pop(0)
            asked = self._optuna.trial.Trial(self._study, earlier._trial_id)
            reported = {*earlier.intermediate_values}
        elif len(self._study.get_trials(deepcopy=False)) < self._count:
            asked, reported = self._study.ask(), set()
        else:
            return None
        values = {field.field: _suggested(asked, field) for field in self._fields}
        asked.set_user_attr("values", values)
        trial = _trial(asked.number, values)
        self._open[trial.name], self._reported[trial.name] = asked, reported
        return trial

    def is_hopeless(self, trial: Trial, number: int, results: Mapping[str, float]) -> bool:
        asked = self._open[trial.name]
        if number not in self._reported[trial.name]:
            self._reported[trial.name].add(number)
            asked.report(results[self._metric], number)
        return asked.should_prune()

    def ended(self, trial: Trial, outcome: Outcome) -> None:
        asked, states = self._open.pop(trial.name), self._optuna.trial.TrialState
        if outcome.exit_code == PREEMPTED:  # it is resumed the next time
            return
        if outcome.status == "finished":
            self._study.tell(asked, outcome.results[self._metric])
        else:
            state = states.PRUNED if outcome.status == "pruned" else states.FAIL
            self._study.tell(asked, state=state)


def _trial(number: int, values: space.Values) -> Trial:
    return Trial(f"trial_{number:03}", values)


def _suggested(asked: Any, field: space.Choice | space.Span) -> str:
    """What Optuna chooses for a field, as the command line writes it."""
    if isinstance(field, space.Choice):
        return asked.suggest_categorical(field.field, field.values)
    suggest = asked.suggest_int if field.is_int else asked.suggest_float
    return repr(suggest(field.field, field.low, field.high, log=field.is_log))


def _as_json(value: Any) -> Any:
    """As it comes back from the storage."""
    return [*map(_as_json, value)] if isinstance(value, (list, tuple)) else value
