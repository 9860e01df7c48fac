"""What there is to know of a saved run: what its answers are worth, why it gives them, its data."""

from pathlib import Path
from typing import Any

import numpy as np

from flaxcls import cli
from flaxcls.api.signatures import signature_of
from flaxcls.buckets import AnyPath, as_path
from flaxcls.errors import DataError
from flaxcls.inference.classifier import is_one_picture
from flaxcls.inference.predictor import Predictor
from flaxcls.insight import audit as audits
from flaxcls.insight.calibrate import calibrate_run
from flaxcls.insight.corrupted import corrupt_run
from flaxcls.insight.explainer import Explainer
from flaxcls.insight.robustness import attack_run
from flaxcls.insight.search import draw, index_pictures
from flaxcls.report import page
from flaxcls.runtime import compilation_cache
from flaxcls.runtime.output import printable, say


@signature_of(calibrate_run)
def calibrate(run: Any, **options: Any) -> dict[str, Any]:
    """Fits what a run's answers are worth and stores it in its folder, for `load` and `export`.

    Args:
      run, checkpoint, ema, tta: as in `load`.
      coverage: how often the set of classes shall hold the right one.
      per_class: whether it shall so for each class, not only for all pictures.
      risk: the largest share of wrong answers; None: 0.05 if that can be promised.
      split, data_dir, source, classes: as in `evaluate`; examples that were not trained on.
      seed: of how they are divided, to fit to and to measure on.

    Returns what calibration.json holds of it, and "measured".
    """
    compilation_cache.enable()
    found = calibrate_run(run, **options)
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
    compilation_cache.enable()
    predictor = Predictor(run, checkpoint=checkpoint, ema=ema, batch_size=batch_size)
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
    out: str | Path | None = None,
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
      out: a file, such as grid.png, for a drawing of the pictures and their neighbors.
    """
    if out is not None:
        cli.check_png("out", out)
    folder, is_one = as_path(run), is_one_picture(pictures)
    pictures = [pictures] if is_one else list(pictures)
    compilation_cache.enable()
    predictor = Predictor(folder, checkpoint=checkpoint, ema=ema, batch_size=batch_size)
    files = cli.find_pictures([str(index)])
    known = index_pictures(predictor, folder, str(index), files, _tell)
    images = [predictor.prepare(picture) for picture in pictures]
    found = [[] for _ in images]
    if images and known.files:
        own = [known.file_at(each) if isinstance(each, (str, Path)) else None for each in pictures]
        found = known.nearest(predictor(np.stack(images)).features, neighbors, own)
    if out is not None and found:
        draw(predictor, list(zip(pictures, found, strict=True)), Path(out))
    return found[0] if is_one else found


def _tell(error: DataError) -> None:
    say(f"flaxcls: {printable(str(error))}", error=True)


@signature_of(attack_run)
def attack(run: Any, **options: Any) -> dict[str, Any]:
    """The accuracy of a saved run on adversarial images; see `attack_run` for all of it.

    Args:
      run, checkpoint, ema: as in `load`.
      norm, eps: "linf" or "l2", and the radius in units of [0, 1], such as "8/255".
      method: "fgsm", "pgd" or "apgd"; each contains those before it.
      steps, restarts: of the attacks; None: 20 of PGD and 100 of APGD.
      examples: of the split, drawn by the seed; more than there are: all.
      split, data_dir: as in `evaluate`.
      out: a new folder for the adversarial images and a table.
      alive: called with what is done next, in words.

    Returns {"accuracies": {"clean": .., "fgsm": .., ...}, "robust", "interval", "rounded", ...}.
    """
    compilation_cache.enable()
    return attack_run(run, **options)


@signature_of(corrupt_run)
def corrupt(run: Any, **options: Any) -> dict[str, Any]:
    """The accuracy of a saved run under fifteen corruptions, each at five severities.

    Arguments as in `attack`. Returns {"clean", "corruptions": {name: [...]}, "mean", ...}.
    """
    compilation_cache.enable()
    return corrupt_run(run, **options)


def audit(run: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Audits data by a cross-validation: wrong labels, near-duplicates, outliers, confused classes.

    Args:
      run: the folder that `cross_validate` worked in.
      out: where to write tables, a page with the pictures, and corrected.csv, on which to train
        again; RUN/audit if not given.

    Returns {"examples", "label_issues", "confused", "duplicates", "out"}: how many of each.
    """
    compilation_cache.enable()
    return audits.audit(run, out)


@signature_of(page.write_report)
def write_report(runs: Any, out: Any = None, **options: Any) -> AnyPath:
    """Writes a page about a run, or one that compares several; returns its file.

    Args:
      runs: a folder, or several.
      out: the file; report.html in the run's folder if not given, comparison.html here for several.
      data_dir: where the data is, if it has moved.
      max_seconds: predictions that would take longer are left out.
    """
    compilation_cache.enable()
    return page.write_report(runs, out, **options)
