"""An evaluation in depth as files: tables in CSV, metrics in JSON, the arrays in an .npz.

CSV is read by everything and needs no package; what would be large in it, the probability of each
class for each example, is in the .npz in full precision.

predictions.csv  a row an example: index,file,label,prediction,probability,label_probability,rank
classes.csv      a row a class, the worst first: class,examples,right,predicted,recall,...
confusion.csv    a row a class, a column what its examples were taken for
metrics.json     all metrics and intervals, and of which runs and examples they are
predictions.npz  logits and probabilities float32 [N, K], labels int32 [N], class_names
"""

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flaxcls.files import atomic_write, write_json
from flaxcls.insight.detailed import Detailed
from flaxcls.insight.intervals import wilson
from flaxcls.insight.scores import class_scores, confusion, worst_first

_COLUMNS = ("class", "examples", "right", "predicted", "recall", "recall_low", "recall_high")
_COLUMNS += ("precision", "f1")


def write_detailed(found: Detailed, folder: Path) -> None:
    """Writes all files into a folder that is there; names of classes and files are exact."""
    _write_csv(folder / "predictions.csv", _predictions(found))
    _write_csv(folder / "classes.csv", [_COLUMNS, *_class_rows(found)])
    _write_csv(folder / "confusion.csv", _confusion(found))
    write_json(folder / "metrics.json", summary(found))
    with atomic_write(folder / "predictions.npz") as file:
        np.savez(file, **found.predictions._asdict(), class_names=np.array(found.class_names))


def summary(found: Detailed) -> dict[str, Any]:
    """All metrics with their intervals, those of each class, and what they are of; JSON."""
    several = len(found.members) > 1
    return {
        "runs": [
            {"run": member.run, "step": member.step, "weights": member.weights}
            | ({"metrics": row} if several else {})
            for member, row in itertools.zip_longest(found.members, found.member_metrics)
        ],
        **({"average": found.average} if several else {}),
        "data": found.source.name,
        "split": found.source.split,
        "fingerprint": found.source.fingerprint,
        "metrics": found.metrics,
        "intervals": found.intervals,
        "classes": [dict(zip(_COLUMNS, row, strict=True)) for row in _class_rows(found)],
        **({"scaling": found.scaling._asdict()} if found.scaling else {}),
        **(
            {"differences": {name: diff._asdict() for name, diff in found.differences.items()}}
            if several
            else {}
        ),
    }


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    # File systems give names that are not UTF-8: their bytes are kept.
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, "utf-8", "surrogateescape", newline="", write_through=True)
        csv.writer(text, lineterminator="\n").writerows(rows)
        text.detach()


def _predictions(found: Detailed) -> Iterable[Sequence[Any]]:
    judged, names, source = found.judged, found.class_names, found.source
    has_files = source.file(0) is not None
    columns = ("label", "prediction", "probability", "label_probability", "rank")
    yield "index", *(("file",) if has_files else ()), *columns
    arrays = (judged.labels, judged.best, judged.confidence, judged.own, judged.rank)
    rows = zip(*(array.tolist() for array in arrays), strict=True)
    for index, (label, best, confidence, own, rank) in enumerate(rows):
        file = (source.file(index),) if has_files else ()
        yield index, *file, names[label], names[best], f"{confidence:.6g}", f"{own:.6g}", rank + 1


def _class_rows(found: Detailed) -> Iterable[Sequence[Any]]:
    """What is known of each class, as _COLUMNS; the worst first, those without examples last."""
    scores = class_scores(found.judged)
    low, high = wilson(scores.right, scores.count)
    for label in (*worst_first(scores), *np.flatnonzero(scores.count == 0)):
        counts = (int(column[label]) for column in (scores.count, scores.right, scores.predicted))
        shares = scores.recall, low, high, scores.precision, scores.f1
        yield found.class_names[label], *counts, *(float(f"{x[label]:.6g}") for x in shares)


def _confusion(found: Detailed) -> Iterable[Sequence[Any]]:
    yield "class", *found.class_names
    for name, row in zip(found.class_names, confusion(found.judged).tolist(), strict=True):
        yield name, *row
