"""All that `evaluate` says of a saved run, or of an ensemble of several."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flaxcls.buckets import as_path
from flaxcls.errors import ConfigError
from flaxcls.inference.evaluator import evaluate_run
from flaxcls.inference.neighbors import knn_run
from flaxcls.insight.detailed import Detailed, evaluate_in_depth
from flaxcls.insight.written import write_detailed
from flaxcls.runs.run_folder import folders
from flaxcls.runtime.new_folder import new_folder, written


class Evaluated(NamedTuple):
    """What was found.

    Attributes:
      step, split, results: of one run, as `evaluate_run` returns them; of several 0, "" and {}.
      detailed: in depth, where that was asked for.
    """

    step: int
    split: str
    results: dict[str, dict[str, float]]
    detailed: Detailed | None


def evaluate_runs(
    run: str | Path | Sequence[str | Path],
    *,
    split: str | None = None,
    checkpoint: str = "last",
    data_dir: str | None = None,
    source: str | Path | None = None,
    classes: str | Path | None = None,
    tta: str | None = None,
    knn: int | None = None,
    detailed: bool = False,
    ema: bool | None = None,
    average: str = "probabilities",
    fit_split: str | None = None,
    out: str | Path | None = None,
) -> Evaluated:
    """The exact metrics of a saved run and, if asked for, its evaluation in depth.

    Args:
      run: its folder; several are an ensemble, which is evaluated in depth alone.
      split, data_dir, source, classes: the examples, see `restored.open_evaluation`.
      checkpoint, tta: as for `restore`.
      knn: classify by so many nearest neighbours, see `neighbors.knn_run`, and not by the head.
      detailed: whether to evaluate in depth.
      ema, average, fit_split: of that, see `detailed.evaluate_in_depth`.
      out: a folder to make for all that was found in depth, see `written.write_detailed`.
    """
    runs = folders(run)
    in_depth = detailed or out is not None or len(runs) > 1
    if knn is not None and (in_depth or source is not None):
        raise ConfigError("--knn is of one run and its own data, and has no details")
    if knn is not None and tta is not None:
        raise ConfigError("--tta averages logits, of which --knn has none: give one of the two")
    own: dict[str, Any] = {"split": split, "checkpoint": checkpoint, "data_dir": data_dir}
    more: dict[str, Any] = {"source": source, "classes": classes, "tta": tta}
    of_depth: dict[str, Any] = {"ema": ema, "average": average, "fit_split": fit_split}
    found, depth = (0, "", {}), None
    with contextlib.ExitStack() as stack:
        target = as_path(out, "--out=") if out is not None else None
        folder = stack.enter_context(new_folder(target)) if target else None
        if knn is not None:
            found = knn_run(runs[0], knn, **own)
        elif len(runs) == 1:
            found = evaluate_run(runs[0], **own, **more)
        if in_depth:
            depth = evaluate_in_depth(runs, **own, **more, **of_depth)
        if folder:
            with written(target):
                write_detailed(depth, folder)
    return Evaluated(*found, depth)
