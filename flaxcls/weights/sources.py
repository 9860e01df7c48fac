"""Where weights come from: a run of ours, a file of anybody's, or a name that flaxcls knows."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from flaxcls.buckets import AnyPath, as_path
from flaxcls.build import accepted
from flaxcls.core.metrics import WEIGHTS, best_of
from flaxcls.errors import ConfigError, did_you_mean
from flaxcls.remote import is_remote
from flaxcls.runs import run_folder
from flaxcls.runs.checkpoint_reader import CheckpointReader
from flaxcls.runtime.output import printable
from flaxcls.weights import pretrained
from flaxcls.weights.files import read_weights

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


class Weights(NamedTuple):
    """Arrays by the names of where they come from.

    Attributes:
      arrays: of a run of ours and of files with our names "params/head/kernel" and so on.
      network: whose they are, if that is known.
      class_names: that the head tells apart, if they are known.
      about: what there is to say of them; "" for nothing.
    """

    arrays: Mapping[str, np.ndarray]
    network: str | None = None
    class_names: list[str] | None = None
    about: str = ""


class Preprocessing(NamedTuple):
    """Mean and standard deviation per channel by which the images of weights were normalised."""

    mean: list[float]
    std: list[float]


@contextlib.contextmanager
def about(source: str) -> Iterator[None]:
    """Puts "config.init_from=SOURCE" before a ConfigError that does not begin with it."""
    try:
        yield
    except ConfigError as error:
        if str(error).startswith("config.init_from"):
            raise
        raise ConfigError(f"config.init_from={printable(source)}: {error}") from error


def read(source: str) -> Weights:
    """The weights that a text names: a run's folder, a file, or known ones.

    A run's folder, to which "@STEP" may be added, is read at its best checkpoint, else the last;
    the averaged parameters are taken where they were the better ones there. Raises ConfigError for
    a text that names nothing, and for what can't be read.
    """
    with about(source):
        if source in pretrained.PRETRAINED:
            known = pretrained.PRETRAINED[source]
            about_it = f"ImageNet, published top-1 {known.accuracy} %, {known.licence}"
            arrays = read_weights(pretrained.find(source))
            return Weights(arrays, known.network, about=about_it)
        path = as_path(source)
        if path.is_file():
            if is_remote(path):
                raise ConfigError("a file of weights has to be on this machine: copy it there")
            if path.suffix not in SUFFIXES:
                raise ConfigError(f"a file of weights is one of {', '.join(SUFFIXES)}")
            return Weights(read_weights(path))
        return _read_run(*_run(source))


def check(source: str) -> None:
    """Raises ConfigError, as `read` does, for a text that names nothing that is there."""
    with about(source):
        if source in pretrained.PRETRAINED:
            pretrained.find(source)
        elif not as_path(source).is_file():
            _run(source)


def preprocessing(source: str) -> Preprocessing | None:
    """How images were normalised for the weights that a text names; None for a file, which does not
    tell.
    """
    if source in pretrained.PRETRAINED:
        known = pretrained.PRETRAINED[source]
        return Preprocessing(list(known.mean), list(known.std))
    if as_path(source).is_file():
        return None
    with about(source):
        folder, which = _run(source)
        checkpoints = CheckpointReader(folder / "checkpoints")
        _, metadata = checkpoints.read(_which(checkpoints, which), checkpoints.metadata)
    return Preprocessing(metadata["mean"], metadata["std"])


def network(source: str) -> tuple[dict[str, Any], int] | None:
    """config.model of the run that a text names and the size of its images, in pixels per side.

    None for a file, which tells neither.
    """
    if as_path(source).is_file():
        return None
    with about(source):
        folder, _ = _run(source)
        config = run_folder.load_config(folder)
        checkpoints = CheckpointReader(folder / "checkpoints")
        _, metadata = checkpoints.read("last", checkpoints.metadata)
    given = accepted.options_given(config, "model")
    return {**given, "name": config.model.name}, metadata["image_shape"][0]


def _run(source: str) -> tuple[AnyPath, str | None]:
    """The run's folder and the step after its "@"; ConfigError if there is no such folder."""
    path, step = as_path(source), None
    if not path.exists() and "@" in source:
        folder, _, step = source.rpartition("@")
        path = as_path(folder)
    if not path.is_dir():
        known = did_you_mean(source, pretrained.PRETRAINED)
        raise ConfigError(f"there is no such run, file or known name{known}")
    run_folder.load_config(path)  # NoRun, which says so
    return path, step


def _which(checkpoints: CheckpointReader, step: str | None) -> str:
    """What `CheckpointReader.read` is to read."""
    if step is not None:
        return step
    steps = checkpoints.steps()
    return "best" if steps and checkpoints.metadata(steps[-1])["progress"]["best"] else "last"


def _read_run(folder: AnyPath, which: str | None) -> Weights:
    checkpoints = CheckpointReader(folder / "checkpoints")

    def restore(step: int) -> tuple[dict[str, Any], str, dict[str, Any]]:
        metadata = checkpoints.metadata(step)
        results, metric = metadata["progress"]["results"], metadata["config"]["checkpoint"]
        kind = best_of(results, metric["best_metric"]) if results else "eval"
        if kind == "ema":
            return metadata, kind, checkpoints.arrays(step, ["ema"])["ema"]
        return metadata, kind, checkpoints.arrays(step, ["params", "batch_stats"])

    step, (metadata, kind, tree) = checkpoints.read(_which(checkpoints, which), restore)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): array
        for path, array in jax.tree.leaves_with_path(tree)
    }
    about = f"step {step:,}, {WEIGHTS[kind]}"
    if result := metadata["progress"]["results"].get(kind):
        about += f", accuracy {result['accuracy']:.2%} when last evaluated"
    network = metadata["config"]["model"]["name"]
    return Weights(arrays, network, metadata["class_names"], about)
