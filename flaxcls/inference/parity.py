"""The parity certificate: evaluation, prediction and an exported file say the same of pictures.

Three programs are compared on the same files. `evaluate` and `predict` are the run's own. The
export is classified by `flaxcls/weights/consumer.py` in a process of its own: it shares no code
with flaxcls, knows what the export says of itself, and has the format's own runtime compute.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from flaxcls.data.order import evenly_spaced
from flaxcls.data.pipeline import Pipeline, Sizes
from flaxcls.data.source import Example, Source
from flaxcls.data.storage import read_picture
from flaxcls.data.transform import TRANSFORMS
from flaxcls.errors import ConfigError, DataError, FlaxclsError, ParityError, one_line
from flaxcls.inference.evaluator import evaluator_of
from flaxcls.inference.predictor import Predictor
from flaxcls.runtime import sharding
from flaxcls.runtime.output import printable
from flaxcls.weights import consumer
from flaxcls.weights.exportable import Exportable, unflatten
from flaxcls.weights.files import read_weights
from flaxcls.weights.torch_names import from_torch

_FLOAT32, _ROUNDED = 1e-4, 0.02


class Examples(Source):
    """Pictures to certify with, as evaluation reads them; their labels are set by the export.

    Attributes:
      names: how a sentence names each.
      origin: in words.
      files: those that the user named, else None.
      top1: what the export says, int32 [N]: the labels.
    """

    def __init__(
        self,
        like: Source,
        images: Sequence[bytes | np.ndarray],
        names: Sequence[str],
        origin: str,
        files: Sequence[str] | None = None,
    ):
        super().__init__(
            name=like.name,
            split=like.split,
            class_names=like.class_names,
            image_shape=like.image_shape,
            fingerprint="",
        )
        self.images, self.names, self.origin, self.files = images, names, origin, files
        self.top1 = np.zeros(len(images), np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return Example(self.images[index], int(self.top1[index]))

    def labels(self) -> np.ndarray:
        return self.top1

    def where(self, index: int) -> str:
        return self.names[index]


class Answer(NamedTuple):
    """What a program says of N pictures: by which runtime, of which pixels, and what."""

    runtime: str
    images: np.ndarray  # uint8 [N, H, W, C]
    logits: np.ndarray  # float32 [N, K]
    probabilities: np.ndarray  # float32 [N, K]


def choose(
    predictor: Predictor, pictures: Sequence[str], count: int, data_dir: str | None
) -> tuple[Examples, Pipeline]:
    """The pictures to certify with, and evaluation's pipeline over them.

    Those given, or `count` of the evaluation split, evenly spaced. Raises DataError for a picture
    that can't be read and ConfigError where there is none.
    """
    experiment = predictor.restored.experiment
    if not pictures:
        try:
            pipeline = experiment.evaluation(None, data_dir)
            source = pipeline.source
            indices = evenly_spaced(len(source), count)
            images = [source[index].image for index in indices]
        except FlaxclsError as error:
            kind = DataError if isinstance(error, DataError) else ConfigError
            raise kind(
                f"the export can't be certified on the evaluation split ({one_line(error)}): "
                "give --data_dir, or name pictures behind the flags"
            ) from error
        origin = f"{len(indices)} of the {len(source):,} examples of {source.name} '{source.split}'"
        names = [source.where(index) for index in indices]
        examples = Examples(source, images, names, origin)
        return examples, dataclasses.replace(pipeline, source=examples)

    height, width, channels = predictor.image_shape
    fixed = experiment.transform is None  # evaluation takes pictures of one size only
    images = [
        predictor.read(path)
        if fixed
        else read_picture(path, printable(path), experiment.input.max_bytes)
        for path in pictures
    ]
    shape = (height, width, channels) if fixed else (None, None, channels)
    like = Source(
        name="pictures",
        split="",
        class_names=predictor.class_names,
        image_shape=shape,
        fingerprint="",
    )
    names = [printable(path) for path in pictures]
    examples = Examples(like, images, names, f"{len(names)} pictures given", pictures)
    sizes = Sizes((0,), (None if fixed else height,))
    return examples, Pipeline(examples, experiment.transform, sizes, experiment.input)


def certify(
    predictor: Predictor,
    model: Exportable,
    folder: Path,
    chosen: tuple[Examples, Pipeline],
    tolerance: float | None = None,
) -> dict[str, Any]:
    """The certificate of what is exported in a folder; ParityError where it disagrees.

    `tolerance` is the largest difference of a probability that is allowed, and of a logit as a
    share of the largest one; None: `allowed`.
    """
    examples, pipeline = chosen
    tolerance = allowed(predictor) if tolerance is None else tolerance
    with tempfile.TemporaryDirectory() as scratch:
        files = _files(predictor, examples, Path(scratch))
        predicted = _predict(predictor, pipeline, files)
        answers = _consume(model, folder, files, predicted.images, Path(scratch))
    agreement = {a.runtime: _compare(predicted, a, examples, tolerance) for a in answers}
    return {
        "pictures": len(examples),
        "of": examples.origin,
        "tolerance": tolerance,
        "preprocessing": "from the files, by the metadata" if files else "not checked",
        "agreement": agreement,
        "evaluate": _evaluate(predictor, examples, pipeline, answers[0], tolerance),
        "sha256": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }


def describe(certificate: Mapping[str, Any]) -> str:
    """A certificate as a line."""
    rows = certificate["agreement"].values()
    largest = {key: max(row[key] for row in rows) for key in ("probability", "logit", "pixel")}
    ties = max(len(row["near_ties"]) for row in rows)
    top1 = f"but for {ties} near-ties" if ties else "identical"
    pixels = "not checked"
    if certificate["preprocessing"] != pixels:
        pixels = "identical" if not largest["pixel"] else f"within {largest['pixel']} of 255"
    *who, last = "evaluate", "predict", *certificate["agreement"]
    return (
        f"parity: {', '.join(who)} and {last} agree on {certificate['of']}: "
        f"top-1 {top1}, probabilities within {largest['probability']:.1e} "
        f"(allowed {certificate['tolerance']:g}), pixels {pixels}"
    )


def allowed(predictor: Predictor) -> float:
    """The tolerance that the arithmetic of `predict` needs.

    Exports compute in float32 on the CPU. So does `predict` on a CPU, unless the run is in
    bfloat16, but not on accelerators, whose float32 products are rounded (TF32, bfloat16).
    """
    restored = predictor.restored
    dtype = getattr(restored.experiment.network, "dtype", np.float32)
    exact = np.dtype(dtype) == np.float32 and sharding.platform(restored.mesh) == "cpu"
    return _FLOAT32 if exact else _ROUNDED


def _files(predictor: Predictor, examples: Examples, scratch: Path) -> list[str] | None:
    """The pictures as files; None where what becomes of them can't be told by metadata.

    That is a crop of the user's own, and what no picture's format holds.
    """
    transform, channels = predictor.restored.experiment.transform, predictor.image_shape[2]
    if channels not in (1, 3) or (transform and type(transform) not in TRANSFORMS.values()):
        return None
    if examples.files:
        return [os.fspath(path) for path in examples.files]
    files = [str(scratch / f"{number}.picture") for number in range(len(examples))]
    for path, image in zip(files, examples.images, strict=True):
        if isinstance(image, bytes):
            Path(path).write_bytes(image)
        else:
            Image.fromarray(image[..., 0] if channels == 1 else image).save(path, "PNG")
    return files


def _predict(predictor: Predictor, pipeline: Pipeline, files: list[str] | None) -> Answer:
    if files is None:
        images = pipeline.sample(len(pipeline.source))
        return Answer("predict", images, *predictor(images)[:2])

    def fail(error: DataError) -> None:
        raise error

    images = np.stack([predictor.read(file) for file in files])
    parts = [predictions for _, predictions in predictor.files(files, fail)]
    logits, probabilities = (np.concatenate(part) for part in list(zip(*parts, strict=True))[:2])
    return Answer("predict", images, logits, probabilities)


def _consume(
    model: Exportable, folder: Path, files: list[str] | None, images: np.ndarray, scratch: Path
) -> list[Answer]:
    """What the export says, in a process of its own, of files or else of images."""
    request, answer = scratch / "request.json", scratch / "answer.npz"
    if files is None:
        np.save(scratch / "images.npy", images)
        request.write_text(json.dumps({"images": str(scratch / "images.npy")}))
    else:
        request.write_text(json.dumps({"pictures": files}))
    # -P: the folder of the program is not a place to import from.
    command = [sys.executable, "-P", consumer.__file__, str(folder), str(request), str(answer)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ParityError(f"the export can't be run by itself: {printable(reason)}")
    with np.load(answer) as content:
        found = dict(content)
    answers = []
    if (folder / "model.safetensors").exists():
        answers.append(_read_back(model, folder, found["images"]))
    if "logits" in found:
        runtime = str(found.pop("runtime"))
        answers.append(Answer(runtime, **found))
    return answers


def _read_back(model: Exportable, folder: Path, images: np.ndarray) -> Answer:
    """What the weights of a safetensors file say, read as any others are."""
    arrays = read_weights(folder / "model.safetensors")
    metadata = consumer.read_metadata(folder)
    if metadata["names"] == "torch":
        shapes = jax.eval_shape(lambda: model.variables)
        variables = from_torch(model.network, shapes, arrays)
    else:
        variables = unflatten(arrays)
    preprocessing = metadata["preprocessing"]
    classify = jax.jit(model.classifier(preprocessing["mean"], preprocessing["std"]))
    parts = [classify(variables, images[n : n + 64]) for n in range(0, len(images), 64)]
    logits, probabilities = (
        np.concatenate([np.asarray(part[name]) for part in parts])
        for name in ("logits", "probabilities")
    )
    return Answer("the weights read back", images, logits, probabilities)


def _compare(
    predicted: Answer, answer: Answer, examples: Examples, tolerance: float
) -> dict[str, Any]:
    """How far two programs are apart; ParityError where that is too far."""
    pixel = np.abs(predicted.images.astype(int) - answer.images.astype(int)).max(axis=(1, 2, 3))
    share = np.abs(predicted.probabilities - answer.probabilities).max(axis=1)
    scale = max(1.0, float(np.abs(predicted.logits).max()))
    logit = np.abs(predicted.logits - answer.logits).max(axis=1) / scale
    apart = np.maximum(share, logit)
    worst = int(np.argmax(np.where(np.isnan(apart), np.inf, apart)))
    if not apart[worst] <= tolerance:
        raise ParityError(
            f"{answer.runtime} and predict disagree on {examples.names[worst]}: probabilities by "
            f"{share[worst]:.2g} and logits by {logit[worst]:.2g} of the largest, more than "
            f"{tolerance:g}, and pixels by {pixel[worst]} of 255; nothing is exported"
        )
    ties = _ties(predicted, answer, examples, _margin(tolerance, scale))
    return {
        "top1_identical": len(examples) - len(ties),
        "near_ties": ties,
        "probability": float(share.max()),
        "logit": float(logit.max()),
        "pixel": int(pixel.max()),
        "pictures_with_other_pixels": int(np.count_nonzero(pixel)),
    }


def _margin(tolerance: float, scale: float) -> float:
    """How far apart two logits are that may change places: each is off by the tolerance at most."""
    return 2 * min(tolerance, _ROUNDED) * scale


def _ties(
    predicted: Answer, answer: Answer, examples: Examples, margin: float
) -> list[dict[str, Any]]:
    """The pictures with another best class, whose two logits are no further apart than `margin`.

    Which of two equal ones is the larger is rounding; ParityError where they are further apart.
    """
    best, other = predicted.logits.argmax(axis=1), answer.logits.argmax(axis=1)
    ties = []
    for number in np.flatnonzero(best != other):
        name, logits = examples.names[number], predicted.logits[number]
        classes = [examples.class_names[k] for k in (best[number], other[number])]
        distance = float(logits[best[number]] - logits[other[number]])
        if distance > margin:
            raise ParityError(
                f"{answer.runtime} takes {name} for {printable(classes[1])} and predict for "
                f"{printable(classes[0])}, whose logits are {distance:.2g} apart; nothing is "
                "exported"
            )
        ties.append({"picture": name, "classes": classes, "logits_apart": distance})
    return ties


def _evaluate(
    predictor: Predictor, examples: Examples, pipeline: Pipeline, answer: Answer, tolerance: float
) -> dict[str, Any]:
    """What evaluation says where the label of each example is what the export takes it for.

    Its accuracy is 1 then, but for ties, and its loss follows from the export's logits.
    """
    examples.top1[:] = answer.logits.argmax(axis=1)
    run = predictor.restored
    with contextlib.closing(evaluator_of(run, pipeline)) as evaluator:
        result = evaluator(predictor.variables)
    targets = np.eye(answer.logits.shape[1], dtype=np.float32)[examples.top1]
    losses, weights = run.experiment.loss.likelihood(answer.logits, targets)
    loss = float(np.sum(losses * weights) / np.sum(weights))
    identical = round(result["accuracy"] * len(examples))
    scale = max(1.0, float(np.abs(answer.logits).max()))
    ranked = -np.sort(-answer.logits, axis=1)
    ties = int(np.count_nonzero(ranked[:, :1] - ranked[:, 1:2] <= _margin(tolerance, scale)))
    far = not abs(result["loss"] - loss) <= 2 * tolerance * scale * max(1.0, abs(loss))
    if far or len(examples) - identical > ties:
        raise ParityError(
            f"evaluation and {answer.runtime} disagree: the best class is the same for {identical} "
            f"of {len(examples)} pictures, the mean loss {result['loss']:.6g} and {loss:.6g}; "
            "nothing is exported"
        )
    return {"top1_identical": identical, "loss": result["loss"], "loss_of_export": loss}
