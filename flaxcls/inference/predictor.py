"""A trained network as a function from pictures to probabilities; needs the run's folder only."""

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from PIL import Image

from flaxcls import augment, models
from flaxcls.augment.views import mean_over_views
from flaxcls.core.losses import evaluated_as
from flaxcls.core.metrics import WEIGHTS, best_of
from flaxcls.data.decode import Picture
from flaxcls.data.loader import Decoded
from flaxcls.data.storage import read_picture
from flaxcls.errors import ConfigError, DataError
from flaxcls.inference.restored import RestoredRun, restore
from flaxcls.runtime import sharding
from flaxcls.runtime.cores import available_cores
from flaxcls.runtime.output import printable
from flaxcls.runtime.read_ahead import in_order

# What a network's outputs say of the classes, by the loss it was trained with. Those trained to the
# squared error are probabilities already, but for errors that take them out of [0, 1] or their sum
# away from 1: the nearest distribution is never farther from the truth than they are.
PROBABILITIES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax_cross_entropy": jax.nn.softmax,
    "focal": jax.nn.softmax,
    "logit_adjusted": jax.nn.softmax,
    "sigmoid_cross_entropy": jax.nn.sigmoid,  # each class on its own: they need not add up to 1
    "squared_error": jax.vmap(optax.projections.projection_simplex),
}


class Predictions(NamedTuple):
    """What a network says of N pictures, float32.

    Rank classes by their logits: probabilities that are rounded to 0 or 1 are equal.
    """

    logits: np.ndarray  # [N, K]
    probabilities: np.ndarray  # [N, K]
    features: np.ndarray  # [N, D], "pooled" of `models.features`


class Prediction(NamedTuple):
    """What a network says of a picture: its best class, and the probability of every class."""

    name: str
    probability: float
    probabilities: dict[str, float]  # the best one first


class Predictor:
    """A saved run's network, with all that pictures go through before it.

        predictor = Predictor("runs/cats")
        print(predictor.predict("a.jpg").name)
        for prediction in predictor.predict(["a.jpg", array, PIL.Image.open("b.png")]):
            print(prediction.name, prediction.probability)

    Args:
      run: the run's folder.
      checkpoint: "last", "best" or a step.
      ema: whether to take the average of the parameters or the parameters themselves. None: which
        of the two was better when the checkpoint was evaluated, by the run's best_metric.
      batch_size: images at a time; rounded up to a multiple of the devices.
      tta: as for `restore`: the views of each picture that logits and features are the mean over.

    Attributes:
      class_names: of the K classes.
      image_shape: (height, width, channels) of the images that the network is given.
      step: how many updates it was trained for.
      batch_size: images at a time.
      restored: the checkpoint.
      weights, variables: "eval" or "ema", as evaluations name them, and what that means.

    Raises ConfigError when there is no such run, checkpoint or average.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        checkpoint: str = "last",
        ema: bool | None = None,
        batch_size: int = 64,
        tta: str | None = None,
    ):
        self.restored = restored = restore(Path(run), checkpoint, batch_size, tta)
        experiment, metadata = restored.experiment, restored.metadata
        self.class_names: list[str] = metadata["class_names"]
        self.image_shape: tuple[int, int, int] = tuple(metadata["image_shape"])
        self.step = restored.step
        self._transform, self._input = experiment.transform, experiment.input
        self._mesh = restored.mesh
        self.batch_size = sharding.round_up(self._mesh, batch_size)
        self.weights = _choose_weights(restored, run, ema)
        self.variables = restored.ema if self.weights == "ema" else restored.variables
        self._forward = jax.jit(
            make_forward(
                experiment.network,
                experiment.loss.name,
                metadata["mean"],
                metadata["std"],
                experiment.tta,
            ),
            out_shardings=sharding.everywhere(self._mesh),
        )
        self._results = metadata["progress"]["results"]

    def read(self, path: str | Path) -> np.ndarray:
        """A file's picture as evaluation would show it to the network, uint8 [H, W, C].

        Can be called in threads. Raises DataError for a file that can't be read; it names it.
        """
        where = printable(path)
        content = read_picture(path, where, self._input.max_bytes)
        height, width, channels = self.image_shape
        picture = Picture(content, channels, where=where, max_pixels=self._input.max_pixels)
        if self._transform:
            return self._transform(picture, height, ())
        return _stretch(picture.pixels(), height, width)

    def predict(self, pictures: Any) -> Any:
        """Classifies a picture, or several; returns a Prediction, or a list of them.

        A picture is a file's path, a PIL image or an array, uint8 [H, W] or [H, W, C] with 1, 3 or
        4 channels, of any size; it becomes what evaluation would show to the network. Raises
        DataError for a file that can't be read and ValueError for what is no picture.
        """
        if is_one_picture(pictures):
            return self.predict([pictures])[0]
        images = [self.prepare(picture) for picture in pictures]
        return self.ranked(self(np.stack(images))) if images else []

    def ranked(self, predictions: Predictions) -> list[Prediction]:
        """What is said of each picture, with the names of the classes."""
        results = []
        order = np.argsort(-predictions.logits, axis=1, kind="stable").tolist()
        for labels, shares in zip(order, predictions.probabilities.tolist(), strict=True):
            ranked = {self.class_names[label]: shares[label] for label in labels}
            results.append(Prediction(*next(iter(ranked.items())), ranked))
        return results

    def prepare(self, picture: Any) -> np.ndarray:
        """A picture, as `predict` takes it, as evaluation would show it: uint8 [H, W, C]."""
        if isinstance(picture, (str, os.PathLike)):
            return self.read(picture)
        height, width, channels = self.image_shape
        pixels = _pixels(picture, channels)
        if self._transform:
            return self._transform(Decoded(pixels), height, ())
        return _stretch(pixels, height, width)

    def __call__(self, images: np.ndarray) -> Predictions:
        """Classifies any number of images, uint8 [N, *image_shape], as `read` makes them."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images must be uint8 of shape (N, {', '.join(map(str, self.image_shape))}), "
                f"got {images.dtype} of {images.shape}"
            )
        starts = range(0, max(len(images), 1), self.batch_size)
        parts = [self._predict(images[start : start + self.batch_size]) for start in starts]
        return Predictions(*map(np.concatenate, zip(*parts, strict=True)))

    def _predict(self, images: np.ndarray) -> Predictions:
        """Of at most a batch, which is filled up so that one program serves all."""
        batch = np.zeros((self.batch_size, *self.image_shape), np.uint8)
        batch[: len(images)] = images
        placed = sharding.split_batch(self._mesh, {"image": batch})
        predictions = jax.device_get(self._forward(self.variables, placed["image"]))
        return jax.tree.map(lambda array: array[: len(images)], predictions)

    def files(
        self, files: Iterable[str], report: Callable[[DataError], None]
    ) -> Iterator[tuple[Sequence[str], Predictions]]:
        """Classifies files in their order, any number of them: yields names and predictions.

        They are read in threads while the devices compute, some batches ahead of what is yielded.
        Those that can't be read are skipped, and `report` is called with what was wrong.
        """

        def classify(batch: list[tuple[str, np.ndarray]]) -> tuple[Sequence[str], Predictions]:
            names, images = zip(*batch, strict=True)
            return names, self(np.stack(images))

        yield from in_order(classify, self.batches(files, report), threads=1)

    def batches(
        self, files: Iterable[str], report: Callable[[DataError], None]
    ) -> Iterator[list[tuple[str, np.ndarray]]]:
        """The files' names and pictures as `read` makes them, at most `batch_size` at a time.

        They are read in threads, ahead; those that can't be read are skipped, as in `files`.
        """

        def read(file: str) -> tuple[str, np.ndarray | DataError]:
            try:
                return file, self.read(file)
            except DataError as error:
                return file, error

        def pictures() -> Iterator[tuple[str, np.ndarray]]:
            for file, image in in_order(read, files, available_cores()):
                if isinstance(image, DataError):
                    report(image)
                else:
                    yield file, image

        readable = pictures()
        yield from iter(lambda: list(itertools.islice(readable, self.batch_size)), [])

    def describe(self) -> str:
        """In words: which weights these are, how good they were, and what is done to pictures."""
        text = f"step {self.step}, {WEIGHTS[self.weights]}"
        if result := self._results.get(self.weights):
            text += f", accuracy {result['accuracy']:.2%} when they were last evaluated"
        if tta := self.restored.experiment.tta:
            text += f"; logits are the mean over the views of {tta}"
        if not self._transform:
            height, width, _ = self.image_shape
            text += f"; pictures that are not {width} x {height} pixels are stretched to it"
        return text


def make_forward(
    network: nn.Module, loss_name: str, mean: Any, std: Any, tta: str | None = None
) -> Callable[[Any, jax.Array], Predictions]:
    """Returns `forward(variables, images uint8 [B, H, W, C]) -> Predictions`, to be jitted.

    With a test-time augmentation `tta` logits and features are the means over its views, and the
    probabilities those of the mean logits.
    """

    def forward(variables: Any, images: jax.Array) -> Predictions:
        def of_view(view: jax.Array) -> tuple[jax.Array, jax.Array]:
            given = augment.normalize(view, mean, std)
            logits, features = models.logits_and_features(network, variables, given)
            return logits, features["pooled"]

        logits, features = mean_over_views(tta, of_view)(images)
        probabilities = PROBABILITIES[evaluated_as(loss_name)](logits)
        return Predictions(logits, probabilities, features)

    return forward


def _choose_weights(restored: RestoredRun, run: str | Path, ema: bool | None) -> str:
    """Which of the weights, "eval" or "ema", as in the results of evaluations."""
    if ema and not restored.ema:
        raise ConfigError(f"{run} kept no average of its parameters: config.ema_decay was not set")
    if ema is not None:
        return "ema" if ema else "eval"
    results = restored.metadata["progress"]["results"]
    return best_of(results, restored.experiment.best_metric) if results else "eval"


def is_one_picture(value: Any) -> bool:
    """Whether it is a picture as `Predictor.predict` takes it, and not several of them."""
    return isinstance(value, (str, os.PathLike, Image.Image, np.ndarray)) and (
        getattr(value, "ndim", 3) <= 3
    )


def _pixels(picture: Any, channels: int) -> np.ndarray:
    """A PIL image or an array as uint8 [H, W, channels]; what is transparent is laid on white."""
    if not isinstance(picture, Image.Image):
        array = np.asarray(picture)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
        if array.dtype != np.uint8 or not shape_fits or 0 in array.shape:
            raise ValueError(
                "a picture must be a path, a PIL image or a uint8 array of shape (H, W) or "
                f"(H, W, 1, 3 or 4), got {_what(picture)}"
            )
        picture = Image.fromarray(array)
    if picture.mode in ("CMYK", "YCbCr", "LAB", "HSV"):  # which PNG does not have
        picture = picture.convert("RGB")
    content = io.BytesIO()  # the way of every picture: orientation, palettes, transparency
    picture.save(content, "PNG", compress_level=0, exif=picture.getexif())
    return Picture(content.getvalue(), channels, where="the image").pixels()


def _what(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return type(value).__name__


def _stretch(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, C] of another size, for data whose pictures have one and need no transform."""
    if pixels.shape[:2] == (height, width):
        return pixels
    grey = pixels.shape[2] == 1
    file = Image.fromarray(pixels[..., 0] if grey else pixels)
    resized = np.asarray(file.resize((width, height), Image.Resampling.BILINEAR))
    return resized[..., None] if grey else resized
