"""A trained network as a function from pictures to probabilities; needs the run's folder only."""

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from PIL import Image

from flaxcls import augment, models
from flaxcls.augment.views import mean_over_views
from flaxcls.buckets import AnyPath, as_path
from flaxcls.core.losses import evaluated_as
from flaxcls.core.metrics import WEIGHTS
from flaxcls.data.decode import Picture, stretch
from flaxcls.data.loader import Decoded
from flaxcls.data.storage import read_picture
from flaxcls.inference.calibration import checkpoint_of, load
from flaxcls.inference.classifier import Classifier, Predictions
from flaxcls.inference.restored import RestoredRun, choose_weights, restore
from flaxcls.runtime import sharding
from flaxcls.runtime.output import printable

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


class Predictor(Classifier):
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
      calibrated: whether to use what `calibrate` has fitted to this checkpoint, if it has.

    Attributes:
      class_names: of the K classes.
      image_shape: (height, width, channels) of the images that the network is given.
      step: how many updates it was trained for.
      batch_size: images at a time.
      restored: the checkpoint.
      weights, variables: "eval" or "ema", as evaluations name them, and what that means.
      calibration: what is used of the former, or None; `probabilities` are calibrated then.

    Raises ConfigError when there is no such run, checkpoint or average.
    """

    def __init__(
        self,
        run: str | AnyPath,
        *,
        checkpoint: str = "last",
        ema: bool | None = None,
        batch_size: int = 64,
        tta: str | None = None,
        calibrated: bool = True,
    ):
        folder = as_path(run, "--run=")
        self.restored = restored = restore(folder, checkpoint, batch_size, tta)
        experiment, metadata = restored.experiment, restored.metadata
        self.class_names: list[str] = metadata["class_names"]
        self.image_shape: tuple[int, int, int] = tuple(metadata["image_shape"])
        self.step = restored.step
        self._transform, self._input = experiment.transform, experiment.input
        self._mesh = restored.mesh
        self.batch_size = sharding.round_up(self._mesh, batch_size)
        self.weights = choose_weights(restored, run, ema)
        self.variables = restored.ema if self.weights == "ema" else restored.variables
        self.calibration = None
        if calibrated:
            used = checkpoint_of(folder, self.step, self.weights, experiment.tta)
            self.calibration = load(folder, used, len(self.class_names))
        forward = forward_of(restored)
        if self.calibration:
            forward = _scaled(forward, experiment.loss.name, self.calibration.temperature)
        self._forward = jax.jit(forward, out_shardings=sharding.everywhere(self._mesh))
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
        return stretch(picture.pixels(), height, width)

    def prepare(self, picture: Any) -> np.ndarray:
        """A picture as evaluation would show it to the network, uint8 [H, W, C]."""
        if isinstance(picture, (str, os.PathLike)):
            return self.read(picture)
        height, width, channels = self.image_shape
        pixels = _pixels(picture, channels)
        if self._transform:
            return self._transform(Decoded(pixels), height, ())
        return stretch(pixels, height, width)

    def classify(self, images: Sequence[np.ndarray]) -> Predictions:
        """What is said of one or more images, each as `read` makes it."""
        return self(np.stack(images))

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

    def describe(self) -> str:
        """In words: which weights these are, how good they were, and what is done to pictures."""
        text = f"step {self.step}, {WEIGHTS[self.weights]}"
        if result := self._results.get(self.weights):
            text += f", accuracy {result['accuracy']:.2%} when they were last evaluated"
        if tta := self.restored.experiment.tta:
            text += f"; logits are the mean over the views of {tta}"
        if self.calibration:
            text += f"; calibrated: {self.calibration.describe()}"
        if not self._transform:
            height, width, _ = self.image_shape
            text += f"; pictures that are not {width} x {height} pixels are stretched to it"
        return text


def forward_of(run: RestoredRun) -> Callable[[Any, jax.Array], Predictions]:
    """`make_forward` of a saved run, with its normalisation and test-time augmentation."""
    experiment, metadata = run.experiment, run.metadata
    return make_forward(
        experiment.network,
        experiment.loss.name,
        metadata["mean"],
        metadata["std"],
        experiment.tta,
    )


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


def _scaled(forward: Callable, loss_name: str, temperature: float) -> Callable:
    """`forward` with the probabilities of logits that are divided by a temperature."""

    def scaled(variables: Any, images: jax.Array) -> Predictions:
        predictions = forward(variables, images)
        probabilities = PROBABILITIES[evaluated_as(loss_name)](predictions.logits / temperature)
        return predictions._replace(probabilities=probabilities)

    return scaled


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
