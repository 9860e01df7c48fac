"""What `import flaxcls` offers to Python users; each function is what a command does.

Nothing here ends the process: what a command would say before it exits is an exception,
flaxcls.FlaxclsError, and Ctrl-C saves the run and raises flaxcls.Interrupted.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from flaxcls import cli
from flaxcls import config as configs
from flaxcls.config.recipes import load_recipe
from flaxcls.errors import ConfigError
from flaxcls.errors import FlaxclsError as FlaxclsError
from flaxcls.errors import Interrupted as Interrupted
from flaxcls.errors import ParityError as ParityError
from flaxcls.inference.averaging import average_runs
from flaxcls.inference.classifier import Prediction as Prediction
from flaxcls.inference.classifier import is_one_picture
from flaxcls.inference.ensemble import Ensemble as Ensemble
from flaxcls.inference.evaluator import evaluate_run
from flaxcls.inference.exporter import export_run
from flaxcls.inference.predictor import Predictor as Predictor
from flaxcls.insight.calibrate import calibrate_run
from flaxcls.insight.corrupted import corrupt_run
from flaxcls.insight.detailed import evaluate_in_depth
from flaxcls.insight.explainer import Explainer
from flaxcls.insight.explainer import Explanation as Explanation
from flaxcls.insight.robustness import attack_run
from flaxcls.insight.search import Neighbor as Neighbor
from flaxcls.insight.search import index_pictures
from flaxcls.insight.written import summary
from flaxcls.report import page
from flaxcls.runs import run_code, run_folder
from flaxcls.runtime import compilation_cache
from flaxcls.runtime.output import printable, say
from flaxcls.studies import crossval, optuna_search, sweep
from flaxcls.training.hooks import Hooks, Row
from flaxcls.training.hooks import StopTraining as StopTraining
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
    workdir: str | Path | None = None,
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
    name = "run" if isinstance(config, ConfigDict) else str(config)
    folder = None if workdir is None else Path(workdir).expanduser()
    if folder:
        run_code.fall_back(folder)
    if not isinstance(config, ConfigDict):
        config = completed(load_recipe(name, _as_text(overrides)), folder)
    elif overrides:
        raise ConfigError("`overrides` are for a recipe; a config can be changed itself")
    folder = folder or run_folder.new_folder(name)
    hooks = Hooks(on_log, on_evaluation)
    summary = train_config(config, folder, hooks=hooks, watched=False)
    return {**summary, "workdir": str(folder)}


def cross_validate(
    config: ConfigDict | str | Path,
    workdir: str | Path | None = None,
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
    name = "run" if isinstance(config, ConfigDict) else str(config)
    folder = crossval.new_folder(name) if workdir is None else Path(workdir).expanduser()
    run_code.fall_back(folder / "fold_0")
    if not isinstance(config, ConfigDict):
        config = crossval.complete(load_recipe(name, _as_text(overrides)), folder)
    elif overrides:
        raise ConfigError("`overrides` are for a recipe; a config can be changed itself")
    config = copy.deepcopy(config)
    if groups is not None:
        config.data.fold_groups = str(groups)
    results = crossval.cross_validate(config, folder, folds, watched=False)
    return {**results, "workdir": str(folder)}


def sweep_recipe(
    recipe: str | Path,
    workdir: str | Path | None = None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    search: Sequence[str] = (),
    trials: int = 20,
    overrides: Overrides = (),
    jobs: int = 1,
) -> dict[str, Any]:
    """Trains a recipe with many values of its fields, each in a process; the same call resumes.

    Args:
      recipe: a file, or the name of one that comes with flaxcls.
      workdir: the folder of the sweep; runs/sweep-NAME-<date-time> if not given.
      grid: {"optimizer.learning_rate": [0.1, 0.3]}, of which all combinations are tried.
      search: instead, where Optuna looks: ["optimizer.learning_rate=1e-3..1e-1:log"].
      trials: how many Optuna chooses.
      overrides: of all trials, as in `load_config`.
      jobs: trials at a time.

    Returns {"metric", "trials": [{"name", "values", "status", "results", ...}], "workdir"}, the
    best trial first.
    """
    name, text = str(recipe), list(_as_text(overrides))
    folder = sweep.new_folder(name) if workdir is None else Path(workdir).expanduser()
    common: dict[str, Any] = {"overrides": text, "jobs": jobs}
    if bool(grid) == bool(search):
        raise ConfigError("a sweep needs either `grid` or `search`")
    if search:
        results = optuna_search.sweep_optuna(name, search, folder, trials, **common)
    else:
        choices = [
            f"{field}={','.join(v if isinstance(v, str) else repr(v) for v in values)}"
            for field, values in (grid or {}).items()
        ]
        results = sweep.sweep_grid(name, choices, folder, **common)
    return {**results, "workdir": str(folder)}


def load(
    run: str | Path | Sequence[str | Path],
    *,
    checkpoint: str = "last",
    ema: bool | None = None,
    batch_size: int = 64,
    calibrated: bool = True,
    tta: str | None = None,
    average: str = "probabilities",
) -> Predictor | Ensemble:
    """A saved run's network, ready to classify paths, arrays and PIL images; see Predictor.

    Of several runs it is their Ensemble, whose `average` is of "probabilities" or "logits".
    """
    compilation_cache.enable()
    options = {"checkpoint": checkpoint, "ema": ema, "batch_size": batch_size, "tta": tta}
    if isinstance(run, (str, Path)):
        return Predictor(run, calibrated=calibrated, **options)
    return Ensemble(run, average=average, **options)


def evaluate(
    run: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    checkpoint: str = "last",
    data_dir: str | None = None,
    source: str | Path | None = None,
    classes: str | Path | None = None,
    tta: str | None = None,
    detailed: bool = False,
    ema: bool | None = None,
    average: str = "probabilities",
    fit_split: str | None = None,
) -> dict[str, Any]:
    """The exact metrics of a saved run: {"step", "split", "eval": {"accuracy", ...}, "ema": ...}.

    Args:
      run: its folder; several are an ensemble, of which there is "detailed" alone.
      split: such as "test"; None: what the run evaluated on.
      checkpoint: "last", "best" or a step.
      data_dir: where the data is, if it has moved.
      source, classes: other data, and a CSV of what it calls the classes; see the command.
      tta: the test-time augmentation, such as "flip"; "none"; None: the run's own.
      detailed: adds "detailed", what metrics.json of the command holds.
      ema, average, fit_split: of that, see `flaxcls.insight.detailed.evaluate_in_depth`.
    """
    compilation_cache.enable()
    asked = {
        "split": split,
        "checkpoint": checkpoint,
        "data_dir": data_dir,
        "source": source and str(source),
        "classes": classes and str(classes),
        "tta": tta,
    }
    runs, result = [run] if isinstance(run, (str, Path)) else list(run), {}
    if len(runs) == 1:
        step, evaluated, results = evaluate_run(Path(runs[0]), **asked)
        result = {"step": step, "split": evaluated, **results}
    if detailed or len(runs) > 1:
        found = evaluate_in_depth(runs, **asked, ema=ema, average=average, fit_split=fit_split)
        result["detailed"] = summary(found)
    return result


def calibrate(
    run: str | Path,
    *,
    coverage: float = 0.9,
    per_class: bool = False,
    risk: float | None = None,
    split: str | None = None,
    checkpoint: str = "last",
    ema: bool | None = None,
    tta: str | None = None,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Fits what a run's answers are worth and stores it in its folder, for `load` and `export`.

    Returns what calibration.json holds of it, and "measured". The arguments are those of
    `flaxcls.insight.calibrate.calibrate_run`.
    """
    compilation_cache.enable()
    found = calibrate_run(
        Path(run),
        coverage=coverage,
        per_class=per_class,
        risk=risk,
        split=split,
        checkpoint=checkpoint,
        ema=ema,
        tta=tta,
        data_dir=data_dir,
    )
    return {**found.calibration.as_json(), "measured": found.measured}


def explain(
    run: str | Path,
    pictures: Any,
    *,
    method: str = "gradcam",
    class_name: str | None = None,
    checkpoint: str = "last",
    ema: bool | None = None,
    batch_size: int = 16,
) -> Any:
    """Where in a picture a saved run sees what it says of it: an Explanation, or a list of them.

    Args:
      run, checkpoint, ema, batch_size: as in `load`.
      pictures: a picture or several, as `Predictor.predict` takes them.
      method: "gradcam", "hirescam", "integrated_gradients", "smoothgrad", "saliency", "occlusion"
        or "attention_rollout".
      class_name: of the class to explain; None: for each picture that which is predicted.
    """
    predictor = load(run, checkpoint=checkpoint, ema=ema, batch_size=batch_size)
    explainer = Explainer(predictor, method, class_name)
    if is_one_picture(pictures):
        return explainer(predictor.prepare(pictures)[None])[0]
    images = [predictor.prepare(picture) for picture in pictures]
    return explainer(np.stack(images)) if images else []


def search(
    run: str | Path,
    index: str | Path,
    pictures: Any,
    *,
    neighbors: int = 8,
    checkpoint: str = "last",
    ema: bool | None = None,
    batch_size: int = 64,
) -> Any:
    """The pictures of a folder that are most like a picture: a list of Neighbor, or a list of such.

    Args:
      run, checkpoint, ema, batch_size: as in `load`. What is computed of the folder is kept in the
        run's folder.
      index: the folder, searched with all that is below it; pictures there that can't be read are
        told on standard error.
      pictures: a picture or several, as `Predictor.predict` takes them. A file that is in the
        folder is not its own neighbor.
      neighbors: how many of each, best first.
    """
    if is_one_picture(pictures):
        pictures, options = [pictures], {"checkpoint": checkpoint, "ema": ema}
        options |= {"neighbors": neighbors, "batch_size": batch_size}
        return search(run, index, pictures, **options)[0]
    predictor = load(run, checkpoint=checkpoint, ema=ema, batch_size=batch_size)
    files = cli.find_pictures([str(index)])
    known = index_pictures(predictor, Path(run), str(index), files, _tell)
    pictures = list(pictures)
    images = [predictor.prepare(picture) for picture in pictures]
    if not images or not known.files:
        return [[] for _ in images]
    own = [known.file_at(each) if isinstance(each, (str, Path)) else None for each in pictures]
    return known.nearest(predictor(np.stack(images)).features, neighbors, own)


def _tell(error: FlaxclsError) -> None:
    say(f"flaxcls: {printable(str(error))}", error=True)


def export(
    run: str | Path,
    out: str | Path,
    *,
    format: str,
    checkpoint: str = "last",
    ema: bool | None = None,
    names: str = "flaxcls",
    license: str | None = None,
    pictures: Sequence[str | Path] = (),
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Writes a saved run as a new folder `out` for others to read; returns its certificate.

    Args:
      run, checkpoint, ema: as in `load`.
      format: "safetensors", "stablehlo", "onnx" or "savedmodel".
      names: of weights in safetensors, "flaxcls" or "torch": torchvision's and timm's.
      license: a line about the weights' licence.
      pictures: files to certify with; none: 256 of what the run evaluated on.
      data_dir: where the data is, if it has moved.

    Raises ParityError, and leaves no `out`, where what was exported does not say of the pictures
    what the run says. docs/export.md has more.
    """
    compilation_cache.enable()
    return export_run(
        Path(run),
        out=Path(out),
        format=format,
        checkpoint=checkpoint,
        ema=ema,
        names=names,
        license=license,
        pictures=list(map(str, pictures)),
        data_dir=data_dir,
    )


def attack(
    run: str | Path,
    *,
    norm: str = "linf",
    eps: str | float = "8/255",
    method: str = "apgd",
    steps: int | None = None,
    restarts: int = 1,
    examples: int = 1000,
    seed: int = 0,
    split: str | None = None,
    checkpoint: str = "last",
    ema: bool | None = None,
    data_dir: str | None = None,
    out: str | Path | None = None,
) -> dict[str, Any]:
    """The accuracy of a saved run on adversarial images; see `attack_run` for all of it.

    Args:
      run, checkpoint, ema: as in `load`.
      norm, eps: "linf" or "l2", and the radius in units of [0, 1], such as "8/255".
      method: "fgsm", "pgd" or "apgd"; each contains those before it.
      steps, restarts: of the attacks; None: 20 of PGD and 100 of APGD.
      examples: of the split, drawn by the seed; more than there are: all.
      split, data_dir: as in `evaluate`.
      out: a new folder for the adversarial images and a table.

    Returns {"accuracies": {"clean": .., "fgsm": .., ...}, "robust", "interval", "rounded", ...}.
    """
    compilation_cache.enable()
    return attack_run(
        Path(run),
        norm=norm,
        eps=eps,
        method=method,
        steps=steps,
        restarts=restarts,
        examples=examples,
        seed=seed,
        split=split,
        checkpoint=checkpoint,
        ema=ema,
        data_dir=data_dir,
        out=None if out is None else Path(out),
    )


def corrupt(
    run: str | Path,
    *,
    examples: int = 1000,
    seed: int = 0,
    split: str | None = None,
    checkpoint: str = "last",
    ema: bool | None = None,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """The accuracy of a saved run under fifteen corruptions, each at five severities.

    Arguments as in `attack`. Returns {"clean", "corruptions": {name: [...]}, "mean", ...}.
    """
    compilation_cache.enable()
    return corrupt_run(
        Path(run),
        examples=examples,
        seed=seed,
        split=split,
        checkpoint=checkpoint,
        ema=ema,
        data_dir=data_dir,
    )


def average(
    runs: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    checkpoint: str | None = None,
    greedy: bool = False,
    split: str | None = None,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Writes the mean of the weights of a run's checkpoints, or of several runs, as the run `out`.

    Args:
      runs: one folder or several, of runs of one network with the same classes.
      out: a new folder.
      checkpoint: of each run "last", "best", a step, several such as "800,1000", or "all" that are
        kept; None: all of a single run, the last of each of several.
      greedy: take only what doesn't make it worse on `split`, which must be held out.
      data_dir: where the data is, if it has moved.

    Returns what was taken and the exact metrics on what the runs were evaluated on:
    {"step", "split", "members": [(folder, step), ...], "eval": {"accuracy", ...}}. BatchNorm's
    statistics are estimated anew. docs/knowing.md has more.
    """
    compilation_cache.enable()
    several = [runs] if isinstance(runs, (str, Path)) else runs
    averaged = average_runs(
        [Path(run) for run in several],
        Path(out),
        checkpoint=checkpoint,
        greedy=greedy,
        split=split,
        data_dir=data_dir,
    )
    members = [(str(member.run), member.step) for member in averaged.members]
    return {
        "step": averaged.step,
        "split": averaged.split,
        "members": members,
        **averaged.results,
    }


def write_report(
    runs: Sequence[str | Path], out: str | Path | None = None, *, data_dir: str | None = None
) -> Path:
    """Writes a page about a run, or one that compares several; returns its file.

    Args:
      runs: their folders.
      out: the file; report.html in the run's folder if not given, comparison.html here for several.
      data_dir: where the data is, if it has moved.
    """
    compilation_cache.enable()
    return page.write_report(runs, out, data_dir=data_dir)


def _as_text(overrides: Overrides) -> Sequence[str]:
    """Overrides as the command line has them."""
    if isinstance(overrides, Mapping):
        pairs = overrides.items()
        return [f"{k}={v if isinstance(v, str) else repr(v)}" for k, v in pairs]
    return overrides
