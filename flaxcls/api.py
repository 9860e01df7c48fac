"""What `import flaxcls` offers to Python users; each function is what a command does.

Nothing here ends the process: what a command would say before it exits is an exception,
flaxcls.FlaxclsError, and Ctrl-C saves the run and raises flaxcls.Interrupted.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from flaxcls import config as configs
from flaxcls.config.recipes import load_recipe
from flaxcls.errors import ConfigError
from flaxcls.errors import FlaxclsError as FlaxclsError
from flaxcls.errors import Interrupted as Interrupted
from flaxcls.errors import ParityError as ParityError
from flaxcls.inference.evaluator import evaluate_run
from flaxcls.inference.exporter import export_run
from flaxcls.inference.predictor import Prediction as Prediction
from flaxcls.inference.predictor import Predictor as Predictor
from flaxcls.report import page
from flaxcls.runs import run_code, run_folder
from flaxcls.runtime import compilation_cache
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


def load(
    run: str | Path, *, checkpoint: str = "last", ema: bool | None = None, batch_size: int = 64
) -> Predictor:
    """A saved run's network, ready to classify paths, arrays and PIL images; see Predictor."""
    compilation_cache.enable()
    return Predictor(run, checkpoint=checkpoint, ema=ema, batch_size=batch_size)


def evaluate(
    run: str | Path,
    *,
    split: str | None = None,
    checkpoint: str = "last",
    data_dir: str | None = None,
) -> dict[str, Any]:
    """The exact metrics of a saved run: {"step", "split", "eval": {"accuracy", ...}, "ema": ...}.

    Args:
      run: its folder.
      split: such as "test"; None: what the run evaluated on.
      checkpoint: "last", "best" or a step.
      data_dir: where the data is, if it has moved.
    """
    compilation_cache.enable()
    step, split, results = evaluate_run(
        Path(run), split=split, checkpoint=checkpoint, data_dir=data_dir
    )
    return {"step": step, "split": split, **results}


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
