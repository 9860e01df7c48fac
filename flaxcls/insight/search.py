"""Search by picture: those of a folder that are most alike to the eye of a network."""

import functools
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxcls.buckets import AnyPath
from flaxcls.core.metrics import WEIGHTS
from flaxcls.errors import ConfigError, DataError
from flaxcls.files import atomic_write
from flaxcls.inference.neighbors import nearest, unit
from flaxcls.inference.predictor import Predictor
from flaxcls.insight import drawing
from flaxcls.runtime.output import printable, say

_DRAWN = 20  # pictures that are asked for, with their neighbours


class Neighbor(NamedTuple):
    """A picture of an index, and its cosine similarity, -1 to 1, to what was asked for."""

    file: str
    similarity: float


class PictureIndex:
    """Pictures that can be searched.

    Args:
      files: the names of the N pictures.
      features: float32 [N, D], "pooled" of `models.features`, each at length 1.
    """

    def __init__(self, files: Sequence[str], features: np.ndarray):
        self.files, self.features = files, features
        self._nearest = jax.jit(nearest, static_argnums=2)

    def nearest(
        self, features: np.ndarray, count: int, own: Sequence[str | None]
    ) -> list[list[Neighbor]]:
        """The neighbours of each of the features, float32 [Q, D], at most `count`, best first.

        `own` names for each the file that it is of, which is not its neighbour, or None.
        """
        count_found = min(count + 1, len(self.files))
        found = jax.device_get(self._nearest(self.features, unit(features), count_found))
        return [
            [
                Neighbor(self.files[i], similarity)
                for similarity, i in zip(*row, strict=True)
                if self.files[i] != file
            ][:count]
            for file, *row in zip(own, *(array.tolist() for array in found), strict=True)
        ]

    def file_at(self, path: str | Path) -> str | None:
        """The file of the index that a path leads to, if it leads to one."""
        return self._by_path.get(os.path.realpath(path))

    @functools.cached_property
    def _by_path(self) -> dict[str, str]:
        return {os.path.realpath(file): file for file in self.files}


def index_pictures(
    predictor: Predictor,
    run: AnyPath,
    folder: str,
    files: Iterable[str],
    report: Callable[[DataError], None],
) -> PictureIndex:
    """The index of a folder's pictures by a saved run, which is kept in the run's folder.

    What is kept, search/FOLDER-<digest of its path>.npz, names the checkpoint and the weights that
    it belongs to, and is made anew for others. Of the same, only pictures that are new, or have
    another size or time of change, are read; those that have gone leave it. A file that can't be
    written is told, and the index is not kept.

    Args:
      run: the predictor's folder.
      files: paths that begin with `folder`.
      report: called with what is wrong with a picture that can't be read, which is not indexed.
    """
    name = os.path.realpath(folder)
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    path = run / "search" / f"{os.path.basename(name)}-{digest}.npz"
    origin = _origin(predictor, run)
    kept = _load(path, origin)
    states = {file: _state(file) for file in files}
    names = {file: os.path.relpath(file, folder) for file in states}
    rows = {
        file: kept[names[file]][1]
        for file, state in states.items()
        if names[file] in kept and kept[names[file]][0] == state
    }
    old = len(rows)
    new = [file for file in states if file not in rows]
    for read, predictions in predictor.files(new, report):
        rows.update(zip(read, unit(predictions.features), strict=True))
    files = [file for file in states if file in rows]
    features = np.stack([rows[file] for file in files]) if files else np.empty((0, 0), np.float32)
    if len(files) > old or len(kept) > old:
        _save(
            path,
            features=features,
            files=np.array([names[file] for file in files], np.str_),
            states=np.array([states[file] for file in files], np.int64).reshape(-1, 2),
            origin=np.array([origin[key] for key in ORIGIN]),
        )
    pictures = f"{len(files):,} pictures, {len(files) - old:,} of them new"
    say(f"flaxcls: the index, {printable(path)}, has {pictures}", error=True)
    return PictureIndex(files, features)


ORIGIN = ("run", "step", "weights", "digest")  # what an index belongs to


def _origin(predictor: Predictor, run: AnyPath) -> dict[str, str]:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(predictor.variables):
        digest.update(np.asarray(jax.device_get(leaf)).tobytes())
    values = (run.absolute().name, str(predictor.step), predictor.weights, digest.hexdigest())
    return dict(zip(ORIGIN, values, strict=True))


def _state(file: str) -> tuple[int, int]:
    """Size in bytes and time of change in ns; (-1, -1) where reading the file will say why."""
    try:
        status = os.stat(file)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _load(path: AnyPath, origin: dict[str, str]) -> dict[str, tuple[tuple[int, int], np.ndarray]]:
    """name -> ((size, time of change), features) of what is kept; {} where that is of no use."""
    try:
        with path.open("rb") as file, np.load(file) as kept:
            found = dict(zip(ORIGIN, kept["origin"].tolist(), strict=True))
            values = zip(map(tuple, kept["states"].tolist()), kept["features"], strict=True)
            entries = dict(zip(kept["files"].tolist(), values, strict=True))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        say(f"note: {printable(path)} can't be read: the index is made anew", error=True)
        return {}
    if found == origin:
        return entries
    before, now = (f"step {one['step']}, {WEIGHTS[one['weights']]}" for one in (found, origin))
    before = before if before != now else "other weights"
    say(f"note: the index was of {before}: it is made anew for {now}", error=True)
    return {}


def _save(path: AnyPath, **arrays: np.ndarray) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path, shared=True) as file:
            np.savez(file, **arrays)
    except OSError as error:
        why = error.strerror or error
        say(f"note: the index can't be kept as {printable(path)}: {why}", error=True)


def search(
    run: AnyPath,
    folder: str,
    *,
    indexed: Iterable[str],
    asked: Iterable[str],
    neighbors: int,
    report: Callable[[DataError], None],
    checkpoint: str = "last",
    ema: bool | None = None,
    batch_size: int = 64,
) -> tuple[Predictor, Iterator[tuple[str, list[Neighbor]]]]:
    """For each file of `asked` the nearest of the files `indexed`, which are in a folder.

    A file that is indexed itself is not its own neighbour. `report` is called with what is wrong
    with files that can't be read, which are skipped; the other arguments are those of Predictor.
    Raises ConfigError where the folder has no picture that can be read.
    """
    predictor = Predictor(run, checkpoint=checkpoint, ema=ema, batch_size=batch_size)
    index = index_pictures(predictor, run, folder, indexed, report)
    if not index.files:
        raise ConfigError(f"there are no pictures in --index={printable(folder)}")

    def found() -> Iterator[tuple[str, list[Neighbor]]]:
        for files, predictions in predictor.files(asked, report):
            own = [index.file_at(file) for file in files]
            rows = index.nearest(predictions.features, neighbors, own)
            yield from zip(files, rows, strict=True)

    return predictor, found()


def draw(predictor: Predictor, found: Sequence[tuple[Any, Sequence[Neighbor]]], path: Path) -> None:
    """Writes a PNG with a row a picture: what the network is shown of it and of its neighbours.

    Pictures are what `Predictor.predict` takes; those after the first 20 are left out, and told.
    """
    if len(found) > _DRAWN:
        found = found[:_DRAWN]
        say(f"note: {printable(path)} has the first {_DRAWN} of them", error=True)
    columns = 1 + max(len(neighbors) for _, neighbors in found)
    blank = np.full(predictor.image_shape, 255, np.uint8)
    images, captions = [], []
    for asked, neighbors in found:
        row = [(asked, "asked for"), *((n.file, f"{n.similarity:.3f}") for n in neighbors)]
        for picture, said in row:
            images.append(predictor.prepare(picture))
            is_file = isinstance(picture, (str, Path))
            captions.append((os.path.basename(picture) if is_file else "", said))
        images += [blank] * (columns - len(row))
        captions += [()] * (columns - len(row))
    drawing.save_png(drawing.side_by_side(images, captions, columns=columns), path, "out")
