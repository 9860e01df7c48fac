"""What a saved run is used for: classifying, being evaluated, averaged and exported."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flaxcls import cli
from flaxcls.api.signatures import signature_of
from flaxcls.inference.averaging import average_runs
from flaxcls.inference.ensemble import Ensemble
from flaxcls.inference.exporter import export_run
from flaxcls.inference.predictor import Predictor
from flaxcls.insight.evaluation import evaluate_runs
from flaxcls.insight.written import summary
from flaxcls.runs.run_folder import folders
from flaxcls.runtime import compilation_cache


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
    options: dict[str, Any] = {"checkpoint": checkpoint, "ema": ema, "tta": tta}
    options["batch_size"] = batch_size
    if isinstance(run, (str, Path)):
        return Predictor(run, calibrated=calibrated, **options)
    return Ensemble(folders(run), average=average, **options)


@signature_of(evaluate_runs)
def evaluate(run: Any, **options: Any) -> dict[str, Any]:
    """The exact metrics of a saved run: {"step", "split", "eval": {"accuracy", ...}, "ema": ...}.

    Args:
      run: its folder; several are an ensemble, of which there is "detailed" alone.
      split: such as "test"; None: what the run evaluated on.
      checkpoint: "last", "best" or a step.
      data_dir: where the data is, if it has moved.
      source, classes: other data, and a CSV of what it calls the classes; see the command.
      tta: the test-time augmentation, such as "flip"; "none"; None: the run's own.
      knn: classify by so many nearest neighbors in the training split instead of by the head.
      detailed: adds "detailed", what metrics.json of the command holds.
      ema, average, fit_split: of that, see `flaxcls.insight.detailed.evaluate_in_depth`.
      out: a new folder for all of that, every prediction and the confusion matrix.
    """
    compilation_cache.enable()
    found = evaluate_runs(run, **options)
    result = {"step": found.step, "split": found.split, **found.results} if found.results else {}
    return {**result, "detailed": summary(found.detailed)} if found.detailed else result


@signature_of(average_runs)
def average(runs: Any, out: Any, **options: Any) -> dict[str, Any]:
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
    found = average_runs(runs, out, **options)
    members = [(str(member.run), member.step) for member in found.members]
    return {"step": found.step, "split": found.split, "members": members, **found.results}


@signature_of(export_run)
def export(run: Any, out: Any, *, pictures: Any = 256, **options: Any) -> dict[str, Any]:
    """Writes a saved run as a new folder `out` for others to read; returns its certificate.

    Args:
      run, checkpoint, ema: as in `load`.
      format: "safetensors", "stablehlo", "onnx" or "savedmodel".
      names: of weights in safetensors, "flaxcls" or "torch": torchvision's and timm's.
      license: a line about the weights' licence.
      pictures: to certify with: files and folders, or how many of what the run evaluated on.
      data_dir: where the data is, if it has moved.
      tolerance: allowed difference of a probability; None: what the arithmetic allows.

    Raises ParityError, and leaves no `out`, where what was exported does not say of the pictures
    what the run says. docs/export.md has more.
    """
    compilation_cache.enable()
    if not isinstance(pictures, int):
        pictures = cli.all_pictures(map(str, pictures))
    return export_run(run, out, pictures=pictures, **options)
