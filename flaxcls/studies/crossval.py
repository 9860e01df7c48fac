"""k-fold cross-validation: k runs, each evaluated on the fold that it was not trained on.

DIR/fold_0, fold_1, ...  the runs, each complete in itself
DIR/crossval.json        their results, mean and standard deviation
DIR/predictions.csv      what is said of each example by the run that has not seen it
DIR/predictions.npz      the same as arrays, with the probability of every class
"""

import contextlib
import copy
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from flaxcls import build
from flaxcls.buckets import AnyPath
from flaxcls.config.fields import plain
from flaxcls.config.recipes import Recipe
from flaxcls.data.folds import Fold
from flaxcls.data.source import Source, Subset, some_names
from flaxcls.errors import ConfigError, DataError, FlaxclsError, Interrupted
from flaxcls.files import atomic_write, write_csv, write_json
from flaxcls.inference.predictions import predict_split
from flaxcls.inference.restored import restore
from flaxcls.runs import run_folder
from flaxcls.runtime.output import printable, say
from flaxcls.training.recipe import completed
from flaxcls.training.train import train_config


class OutOfFold(NamedTuple):
    """What is said of the N examples of a split, of each by the run that was not trained on it.

    In the order of the split; a network has K classes.
    """

    folds: np.ndarray  # int32 [N]
    labels: np.ndarray  # int32 [N]
    logits: np.ndarray  # float32 [N, K]
    probabilities: np.ndarray  # float32 [N, K]


def complete(recipe: Recipe, workdir: AnyPath) -> ConfigDict:
    """A recipe's config, with what it leaves to data and devices decided once, for all folds.

    It is decided by the whole training split; a study that is resumed keeps what it chose at first.
    """
    split = recipe.config.data.train_split
    config = completed(recipe, workdir / "fold_0")
    config.data.train_split = split
    return config


def cross_validate(
    config: ConfigDict, workdir: AnyPath, folds: int = 5, *, age: float = 0.0, watched: bool = True
) -> dict[str, Any]:
    """Trains a run for each fold of config.data.train_split, and evaluates it on that fold.

    Folds whose run has finished are left as they are, and one that was interrupted is resumed. What
    config.data.eval_split names takes no part, so that it stays a test.

    Args:
      config: complete, as for one run.
      workdir: the folder of the study.
      folds: their number.
      age, watched: as `train_config` takes them.

    Returns what crossval.json holds: "runs" with the results of each, "mean" and "std", and those
    of "out_of_fold". Raises what `train` raises; the sentence names the fold.
    """
    split = config.data.train_split
    build.check(config)
    _check_free(workdir)
    whole = build.source(config, split)
    parts = [Fold(split, number, folds) for number in range(folds)]
    build.source(config, str(parts[0]))  # ConfigError before anything is trained
    _say_rare(whole, folds)
    runs = []
    for part in parts:
        folder = workdir / f"fold_{part.number}"
        say(f"fold {part.number} of {folds}, in {printable(folder)}")
        with _naming(part, workdir):
            summary = train_config(_config_of(config, part), folder, age, watched=watched)
        age = 0.0
        weights = "ema" if "ema" in summary else "eval"
        runs.append({"fold": part.number, "step": summary["step"], weights: summary[weights]})
    predictions = out_of_fold(whole, workdir, folds)
    content = {
        "split": split,
        "folds": folds,
        "runs": runs,
        **spread([run.get("ema") or run["eval"] for run in runs]),
        "out_of_fold": metrics(predictions),
        "config": plain(config),
    }
    write_predictions(workdir, whole, predictions)
    write_json(workdir / "crossval.json", content)
    return content


def _config_of(config: ConfigDict, part: Fold) -> ConfigDict:
    """The config of a fold's run: trained on all others, evaluated on this one."""
    config = copy.deepcopy(config)
    config.data.train_split = str(part._replace(is_rest=True))
    config.data.eval_split = str(part)
    return config


def _check_free(workdir: AnyPath) -> None:
    """ConfigError if there is a run in the folder itself, or anything else but a study."""
    names = [path.name for path in workdir.iterdir()] if workdir.is_dir() else []
    known = ("crossval.json", "predictions.csv", "predictions.npz")
    foreign = [n for n in sorted(names) if not n.startswith((".", "fold_", *known))]
    if foreign:
        raise ConfigError(
            f"--workdir={printable(workdir)} holds {printable(foreign[0])}, which is not of a "
            "cross-validation: give a new or an empty folder"
        )


def _say_rare(whole: Source, folds: int) -> None:
    counts = np.bincount(whole.labels(), minlength=len(whole.class_names))
    rare = [name for name, count in zip(whole.class_names, counts, strict=True) if count < folds]
    if rare:
        say(
            f"note: {len(rare):,} of the {len(counts):,} classes have fewer examples than there "
            f"are folds, so that some folds have none of them: {some_names(rare)}",
            error=True,
        )


@contextlib.contextmanager
def _naming(part: Fold, workdir: AnyPath) -> Any:
    """Says in an error which fold it is about, and of an interruption how to resume."""
    which = f"fold {part.number} of {part.count}"
    try:
        yield
    except Interrupted as error:
        workdir_flag = shlex.quote(f"--workdir={workdir}")
        raise Interrupted(
            f"stopped in {which} and saved; the same command with {workdir_flag} resumes it",
            error.exit_code,
        ) from error
    except FlaxclsError as error:
        error.args = (f"{which}: {error}",)
        raise


def spread(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """{"mean", "std"} of each metric over the folds; the standard deviation is that of a sample."""
    names = [name for name in rows[0] if name != "count"]
    values = {name: [row[name] for row in rows] for name in names}
    return {
        "mean": {name: statistics.fmean(row) for name, row in values.items()},
        "std": {name: statistics.stdev(row) for name, row in values.items()},
    }


def out_of_fold(whole: Source, workdir: AnyPath, folds: int) -> OutOfFold:
    """Predicts each fold by its run, with the average of its parameters where it keeps one.

    The last checkpoint, not the best one, which was chosen by the fold itself.

    Raises DataError unless the folds are the split, each example once.
    """
    labels = whole.labels().astype(np.int32)
    folds_of = np.full(len(whole), -1, np.int32)
    shape = (len(whole), len(whole.class_names))
    logits, probabilities = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for number in range(folds):
        run = restore(workdir / f"fold_{number}")
        pipeline = run.experiment.evaluation(None, None)
        part, source = predict_split(run, pipeline, run.ema or run.variables), pipeline.source
        if not isinstance(source, Subset) or (folds_of[source.indices] >= 0).any():
            raise DataError(f"fold {number} of {printable(workdir)} has examples of another fold")
        folds_of[source.indices] = number
        logits[source.indices], probabilities[source.indices] = part.logits, part.probabilities
    if (folds_of < 0).any():
        missing = int(np.flatnonzero(folds_of < 0)[0])
        raise DataError(f"{whole.where(missing)} is in no fold of {printable(workdir)}")
    return OutOfFold(folds_of, labels, logits, probabilities)


def metrics(predictions: OutOfFold) -> dict[str, float]:
    """{"accuracy", "count"} over all folds together."""
    right = predictions.logits.argmax(1) == predictions.labels
    return {"accuracy": float(right.mean()), "count": len(right)}


def write_predictions(workdir: AnyPath, whole: Source, predictions: OutOfFold) -> None:
    """Writes predictions.csv, a row an example of the split, and predictions.npz."""
    has_files = whole.file(0) is not None
    names, chosen = whole.class_names, predictions.logits.argmax(1)
    columns = ("fold", "label", "prediction", "probability")
    rows = (
        (
            *((i, whole.file(i)) if has_files else (i,)),
            *(fold, names[label], names[chosen[i]]),
            f"{predictions.probabilities[i, chosen[i]]:.6f}",
        )
        for i, (fold, label) in enumerate(zip(predictions.folds, predictions.labels, strict=True))
    )
    header = ("index", *(("file",) if has_files else ()), *columns)
    write_csv(workdir / "predictions.csv", header, rows)
    with atomic_write(workdir / "predictions.npz") as file:
        np.savez(file, class_names=np.array(names), **predictions._asdict())


def describe(content: Mapping[str, Any]) -> str:
    """The results in a few lines."""
    from flaxcls.runs.metric_log import describe as describe_row

    lines = [
        f"fold {run['fold']}, step {run['step']}: {describe_row(run.get('ema') or run['eval'])}"
        for run in content["runs"]
    ]
    mean, std = content["mean"], content["std"]
    parts = [
        f"{name} {100 * mean[name]:.2f} % +- {100 * std[name]:.2f}"
        if name.startswith("accuracy")
        else f"{name} {mean[name]:.4f} +- {std[name]:.4f}"
        for name in mean
    ]
    lines.append(f"mean and standard deviation of {len(lines)} folds: {', '.join(parts)}")
    return "\n".join(lines)


def new_folder(recipe: str) -> Path:
    """Where a study of a recipe goes that is given no folder."""
    folder = run_folder.new_folder(recipe)
    return folder.with_name(f"crossval-{folder.name}")
