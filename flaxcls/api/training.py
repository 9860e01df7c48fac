"""Configs, and the runs that are trained of them: one, one a fold, or one a trial."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flaxcls import config as configs
from flaxcls.buckets import AnyPath, as_path
from flaxcls.config.recipes import Recipe, load_recipe
from flaxcls.errors import ConfigError
from flaxcls.runs import run_code, run_folder
from flaxcls.runtime import compilation_cache
from flaxcls.studies import crossval, optuna_search, sweep
from flaxcls.training.hooks import Hooks, Row
from flaxcls.training.recipe import completed
from flaxcls.training.train import train_config

Overrides = Mapping[str, Any] | Sequence[str]


def default_config() -> ConfigDict:
    """The default config, to be changed and given to `train`; flaxcls/config/tree.py has it."""
    return configs.default()


def load_config(recipe: str | Path | None = None, overrides: Overrides = ()) -> ConfigDict:
    """The config of a recipe, complete.

    Args:
      recipe: a file, or the name of one that comes with flaxcls, such as "cifar10_quick".
      overrides: {"batch_size": 64, "optimizer.learning_rate": 0.1}, or as on the command line,
        ["batch_size=64"].

    Raises ConfigError for whatever is wrong.
    """
    return completed(load_recipe(recipe and str(recipe), _as_text(overrides)), None)


def train(
    config: ConfigDict | str | Path,
    workdir: str | AnyPath | None = None,
    *,
    overrides: Overrides = (),
    on_log: Callable[[Row], Any] | None = None,
    on_evaluation: Callable[[Row], Any] | None = None,
) -> dict[str, Any]:
    """Trains a config or a recipe; the same call with the same `workdir` resumes the run.

    Args:
      config: what to train: a config, a recipe's file or its name.
      workdir: the run's folder; runs/NAME-<date-time> if not given.
      overrides: as in `load_config`, for a recipe.
      on_log, on_evaluation: called with the metrics; see `Hooks`. Raising StopTraining ends the
        run early: it is saved, and can be resumed.

    Returns what summary.json holds, and the "workdir". The watchdog (config.hang_after) is off: it
    would end the process.
    """
    compilation_cache.enable()
    folder = _folder(config, workdir, run_folder.new_folder)
    run_code.fall_back(folder)
    config = _config(config, overrides, partial(completed, workdir=folder))
    summary = train_config(config, folder, hooks=Hooks(on_log, on_evaluation), watched=False)
    return {**summary, "workdir": str(folder)}


def cross_validate(
    config: ConfigDict | str | Path,
    workdir: str | AnyPath | None = None,
    *,
    folds: int = 5,
    groups: str | Path | None = None,
    overrides: Overrides = (),
) -> dict[str, Any]:
    """Trains a config or a recipe once for each fold; the same call resumes.

    Args:
      config, overrides: as in `train`.
      workdir: the folder of the study; runs/crossval-NAME-<date-time> if not given.
      folds: of config.data.train_split; each run is evaluated on one, and trained on the others.
      groups: a CSV file with columns file,group or index,group; no group is divided.

    Returns {"mean": {"accuracy", "loss"}, "std", "runs", "out_of_fold", "workdir", ...};
    WORKDIR/predictions.npz has what is said of every example by the run that has not seen it.
    """
    compilation_cache.enable()
    folder = _folder(config, workdir, crossval.new_folder)
    run_code.fall_back(folder / "fold_0")
    common = _config(config, overrides, partial(crossval.complete, workdir=folder))
    common = copy.deepcopy(common)
    if groups is not None:
        common.data.fold_groups = str(groups)
    results = crossval.cross_validate(common, folder, folds, watched=False)
    return {**results, "workdir": str(folder)}


def sweep_recipe(
    recipe: str | Path,
    workdir: str | AnyPath | None = None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    optuna: int | None = None,
    search: Sequence[str] = (),
    overrides: Overrides = (),
    jobs: int = 1,
) -> dict[str, Any]:
    """Trains a recipe with many values of its fields, each in a process; the same call resumes.

    Args:
      recipe: a file, or the name of one that comes with flaxcls.
      workdir: the folder of the sweep; runs/sweep-NAME-<date-time> if not given.
      grid: {"optimizer.learning_rate": [0.1, 0.3]}, of which all combinations are tried.
      optuna: instead, how many trials Optuna chooses.
      search: where it looks: ["optimizer.learning_rate=1e-3..1e-1:log"].
      overrides: of all trials, as in `load_config`.
      jobs: trials at a time.

    Returns {"metric", "trials": [{"name", "values", "status", "results", ...}], "workdir"}, the
    best trial first.
    """
    if bool(optuna) != bool(search) or bool(grid) == bool(search):
        raise ConfigError("a sweep needs either `grid`, or `optuna` and `search`")
    folder = _folder(recipe, workdir, sweep.new_folder)
    common: dict[str, Any] = {"overrides": list(_as_text(overrides)), "jobs": jobs}
    if optuna:
        results = optuna_search.sweep_optuna(str(recipe), search, folder, optuna, **common)
    else:
        choices = [
            f"{field}={','.join(v if isinstance(v, str) else repr(v) for v in values)}"
            for field, values in (grid or {}).items()
        ]
        results = sweep.sweep_grid(str(recipe), choices, folder, **common)
    return {**results, "workdir": str(folder)}


def _folder(
    config: ConfigDict | str | Path,
    workdir: str | AnyPath | None,
    new_folder: Callable[[str], Path],
) -> AnyPath:
    """Where to work: a new folder, named by the recipe, if none is given."""
    if workdir is not None:
        return as_path(workdir)
    return new_folder("run" if isinstance(config, ConfigDict) else str(config))


def _config(
    config: ConfigDict | str | Path, overrides: Overrides, complete: Callable[[Recipe], ConfigDict]
) -> ConfigDict:
    """The config of a recipe, or the one that is given."""
    if not isinstance(config, ConfigDict):
        return complete(load_recipe(str(config), _as_text(overrides)))
    if overrides:
        raise ConfigError("`overrides` are for a recipe; a config can be changed itself")
    return config


def _as_text(overrides: Overrides) -> Sequence[str]:
    """Overrides as the command line has them."""
    if isinstance(overrides, Mapping):
        pairs = overrides.items()
        return [f"{k}={v if isinstance(v, str) else repr(v)}" for k, v in pairs]
    return overrides
