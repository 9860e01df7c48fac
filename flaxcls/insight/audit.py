"""What a cross-validation tells of its data: wrong labels, duplicates, outliers, confused classes.

labels.csv      labels that are probably wrong, the most suspicious first, and what they may be
confused.csv    pairs of classes, by the estimated number of wrong labels
duplicates.csv  pictures to train on that are nearly one to evaluate on
outliers.csv    pictures that are far from all others of their class, the farthest first
corrected.csv   the data as a list, with the suggested labels; pictures/ where they were no files
index.html      the same with the pictures
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from flaxcls import augment, models
from flaxcls.buckets import AnyPath, BucketPath, as_path
from flaxcls.data.pipeline import Pipeline
from flaxcls.data.source import Source
from flaxcls.errors import ConfigError, DataError
from flaxcls.files import atomic_write, read_json, write_csv
from flaxcls.inference.features import split_features
from flaxcls.inference.restored import RestoredRun, restore
from flaxcls.insight import audit_page
from flaxcls.insight.label_audit import (
    Confusion,
    LabelIssues,
    Pair,
    confused_classes,
    difference_hash,
    find_label_issues,
    near_duplicates,
    outlierness,
)
from flaxcls.runtime.output import printable, say
from flaxcls.runtime.scratch import scratch_folder

_SHOWN = 200  # pictures of a kind on the page


class Found(NamedTuple):
    """What is found in the N examples of a split.

    Attributes:
      issues: the labels that are probably wrong.
      confused: pairs of classes.
      duplicates: pictures of the split, and of the one to evaluate on.
      outliers: how far each example is from its class, float32 [N].
    """

    issues: LabelIssues
    confused: list[Confusion]
    duplicates: list[Pair]
    outliers: np.ndarray


def audit(study: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Audits the data of a cross-validation, and writes what is found into a folder.

    Args:
      study: the folder of the cross-validation.
      out: where to write; None: the folder `audit` in it.

    Returns {"examples", "label_issues", "duplicates", "out", ...}: how many there are.
    """
    study = as_path(study, "--run=")
    out = as_path(out, "--out=") if out else study / "audit"
    content = read_json(study / "crossval.json")
    if content is None:
        raise ConfigError(
            f"{printable(study)} is no finished cross-validation: it holds no crossval.json, which "
            "python -m flaxcls.crossval writes"
        )
    with (study / "predictions.npz").open("rb") as file, np.load(file) as arrays:
        labels, probabilities = arrays["labels"], arrays["probabilities"]
    run = restore(study / "fold_0")
    train = run.experiment.evaluation(content["split"], None)
    if not np.array_equal(train.source.labels(), labels):
        raise DataError(f"the data are not those that {printable(study)} has cross-validated")
    test = _to_evaluate(run, content["config"]["data"]["eval_split"])
    features, hashes = _seen(run, train)
    found = Found(
        find_label_issues(labels, probabilities),
        confused_classes(labels, probabilities),
        near_duplicates((features, hashes), _seen(run, test)) if test else [],
        outlierness(features, labels),
    )
    corrected = labels.copy()
    corrected[found.issues.indices] = found.issues.suggested
    with _folder_at(out) as folder:
        _write_tables(folder, found, train.source, test and test.source)
        _write_list(folder, [(train.source, corrected), *([(test.source, None)] if test else [])])
        _write_page(folder, found, train, test)
    return {
        "examples": len(labels),
        "label_issues": len(found.issues.indices),
        "confused": len(found.confused),
        "duplicates": len(found.duplicates),
        "out": str(out),
    }


@contextlib.contextmanager
def _folder_at(out: AnyPath) -> Iterator[Path]:
    """The folder to write into, which is made, or one whose files are uploaded at the end."""
    if not isinstance(out, BucketPath):
        out.mkdir(parents=True, exist_ok=True)
        yield out
        return
    folder = scratch_folder()
    yield folder
    out.rmtree()
    out.upload_folder(folder)


def _to_evaluate(run: RestoredRun, split: str) -> Pipeline | None:
    """The split that took no part in the cross-validation, if there is one."""
    try:
        return run.experiment.evaluation(split, None)
    except ConfigError as error:
        say(f"note: no duplicates are looked for between splits: {error}", error=True)
        return None


def _seen(run: RestoredRun, pipeline: Pipeline) -> tuple[np.ndarray, np.ndarray]:
    """The features float32 [N, D] and the hashes bool [N, 64] of a split, by one network."""
    experiment, metadata = run.experiment, run.metadata

    def outputs(variables: Any, images: jax.Array) -> jax.Array:
        normalized = augment.normalize(images, metadata["mean"], metadata["std"])
        pooled = models.features(experiment.network, variables, normalized)["pooled"]
        grey = images.astype(jnp.float32).mean(-1)
        small = jax.image.resize(grey, (len(grey), 8, 9), "linear")  # antialiased
        flat = [x.reshape(len(x), -1).astype(jnp.float32) for x in (pooled, small)]
        return jnp.concatenate(flat, axis=1)

    with contextlib.closing(pipeline.open()) as data:
        size, variables = experiment.eval_batch_size, run.ema or run.variables
        found, _ = split_features(run.mesh, outputs, variables, data, size)
    return found[:, :-72], difference_hash(found[:, -72:].reshape(-1, 8, 9))


def _write_tables(out: Path, found: Found, train: Source, test: Source | None) -> None:
    names, labels, issues = train.class_names, train.labels(), found.issues

    def place(source: Source, index: int) -> tuple[int, str]:
        return index, source.file(index) or ""

    suspects = zip(*issues, strict=True)
    write_csv(
        out / "labels.csv",
        ("index", "file", "label", "suggested", "probability_of_label"),
        ((*place(train, i), names[labels[i]], names[to], f"{p:.6f}") for i, to, p in suspects),
    )
    write_csv(
        out / "confused.csv",
        ("label", "probably", "examples"),
        ((names[pair.label], names[pair.true], pair.count) for pair in found.confused),
    )
    write_csv(
        out / "outliers.csv",
        ("index", "file", "label", "distance"),
        (
            (*place(train, int(i)), names[labels[i]], f"{found.outliers[i]:.6f}")
            for i in np.argsort(-found.outliers, kind="stable")
        ),
    )
    header = ("index", "file", "duplicate_index", "duplicate_file", "cosine", "bits")
    rows = (
        (*place(train, pair.one), *place(test, pair.other), f"{pair.similarity:.4f}", pair.distance)
        for pair in found.duplicates
        if test is not None
    )
    write_csv(out / "duplicates.csv", header, rows)


def _write_list(out: Path, parts: list[tuple[Source, np.ndarray | None]]) -> None:
    """corrected.csv, which config.data.name = "list" trains on; labels of None are the data's."""

    def rows() -> Iterator[tuple[str, str, str]]:
        for split, (source, labels) in zip(("train", "test"), parts, strict=False):
            labels = source.labels() if labels is None else labels
            for index, label in enumerate(labels):
                path = source.file(index)
                path = os.path.abspath(path) if path else write_picture(out, source, split, index)
                yield path, source.class_names[label], split

    if len(parts) == 1:
        write_csv(out / "corrected.csv", ("path", "label"), (row[:2] for row in rows()))
    else:
        write_csv(out / "corrected.csv", ("path", "label", "split"), rows())


def write_picture(out: Path, source: Source, split: str, index: int) -> str:
    """Writes an example that is no file as one, without loss; its path in the folder."""
    image = source[index].image
    if isinstance(image, np.ndarray):
        content, ending = png(image), "png"
    else:
        content, ending = image, "png" if image.startswith(b"\x89PNG") else "jpg"
    path = out / "pictures" / split / f"{index:07}.{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path.relative_to(out).as_posix()


def png(image: np.ndarray) -> bytes:
    """A picture uint8 [H, W, 1 or 3] as a file."""
    coded = image if image.shape[2] == 1 else cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", coded)[1].tobytes()


def _write_page(out: Path, found: Found, train: Pipeline, test: Pipeline | None) -> None:
    """index.html, with the first pictures of each kind as evaluation sees them."""
    names, labels = train.source.class_names, train.source.labels()

    def pictures(pipeline: Pipeline, indices: Any) -> list[bytes]:
        some = np.asarray(indices, int)[:_SHOWN]
        return [*map(png, pipeline.images(some))] if len(some) else []

    def cards(indices: Any, texts: list[str]) -> list[audit_page.Card]:
        shown = zip(pictures(train, indices), texts, indices, strict=False)
        return [audit_page.Card([p], text, train.source.where(int(i))) for p, text, i in shown]

    suspects = [f"{names[labels[i]]} → {names[to]}" for i, to, _ in zip(*found.issues, strict=True)]
    far = np.argsort(-found.outliers, kind="stable")[: _SHOWN // 2]
    twins = []
    if test is not None:
        pairs = found.duplicates[:_SHOWN]
        ones = pictures(train, [pair.one for pair in pairs])
        others = pictures(test, [pair.other for pair in pairs])
        for pair, one, other in zip(pairs, ones, others, strict=True):
            text = f"{train.source.where(pair.one)} = {test.source.where(pair.other)}"
            twins.append(audit_page.Card([one, other], f"{pair.distance} bits", text))
    sections = [
        audit_page.Section(
            "Labels that are probably wrong",
            len(found.issues.indices),
            "label → what it may be",
            cards(found.issues.indices, suspects),
        ),
        audit_page.Section(
            "Nearly the same in training and evaluation",
            len(found.duplicates),
            "the bits of 64 in which their hashes differ",
            twins,
        ),
        audit_page.Section(
            "Far from their class", len(far), "label", cards(far, [names[labels[i]] for i in far])
        ),
    ]
    confused = [(names[pair.label], names[pair.true], pair.count) for pair in found.confused]
    title = f"{train.source.name}, {train.source.split}"
    with atomic_write(out / "index.html") as file:
        file.write(audit_page.render(title, sections, confused).encode())
