"""Several networks that answer as one: their probabilities, or their logits, averaged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.buckets import AnyPath
from flaxcls.core.losses import outputs_of
from flaxcls.errors import ConfigError
from flaxcls.inference.classifier import Classifier, Predictions
from flaxcls.inference.predictions import probabilities_of
from flaxcls.inference.predictor import Predictor
from flaxcls.runtime.output import printable

AVERAGES = ("probabilities", "logits")


class Ensemble(Classifier):
    """Saved runs that classify pictures together; each reads a picture in its own way.

    Features are those of the members side by side. What `calibrate` has fitted to a member is not
    used: an average of calibrated probabilities is not calibrated.

    Args:
      runs: the folders.
      average: "probabilities" or "logits".
      checkpoint, ema, batch_size, tta: of each, as in Predictor.

    Raises ConfigError for runs that don't fit together, see `check_alike`.
    """

    def __init__(
        self,
        runs: Sequence[str | AnyPath],
        *,
        average: str = "probabilities",
        checkpoint: str = "last",
        ema: bool | None = None,
        batch_size: int = 64,
        tta: str | None = None,
    ):
        if average not in AVERAGES:
            raise ConfigError(f"average must be {' or '.join(AVERAGES)}, got {average!r}")
        self._average = average
        self.members = [
            Predictor(
                run,
                checkpoint=checkpoint,
                ema=ema,
                batch_size=batch_size,
                tta=tta,
                calibrated=False,
            )
            for run in runs
        ]
        self.class_names = self.members[0].class_names
        self.batch_size = max(member.batch_size for member in self.members)
        outputs = [outputs_of(each.restored.experiment.loss.name) for each in self.members]
        check_alike(list(map(str, runs)), [each.class_names for each in self.members], outputs)
        self._outputs = outputs[0]

    def read(self, path: str | Path) -> Any:
        return [member.read(path) for member in self.members]

    def prepare(self, picture: Any) -> Any:
        return [member.prepare(picture) for member in self.members]

    def classify(self, images: Sequence[Any]) -> Predictions:
        each = [
            member.classify(own)
            for member, own in zip(self.members, zip(*images, strict=True), strict=True)
        ]
        logits, probabilities = averaged(
            [said.logits for said in each], self._outputs, self._average
        )
        features = [said.features.reshape(len(images), -1) for said in each]
        return Predictions(logits, probabilities, np.concatenate(features, axis=1))

    def describe(self) -> str:
        """In words: the members, and what is averaged."""
        members = "; and ".join(member.describe() for member in self.members)
        return f"the {self._average} averaged of {members}"


def averaged(
    logits: Sequence[np.ndarray], outputs: str, average: str = "probabilities"
) -> tuple[np.ndarray, np.ndarray]:
    """The logits and probabilities of an ensemble, float32 [N, K].

    Args:
      logits: of each member, float32 [N, K].
      outputs: what they mean, see `core.losses.outputs_of`.
      average: what is averaged, all members alike. Of "probabilities" the logits are those that
        have them: log p of a softmax, log p - log(1 - p) of sigmoids. None is rounded to 0 or 1
        before it is averaged.
    """
    several = jnp.stack([jnp.asarray(each, jnp.float32) for each in logits])
    of_logits = average == "logits"
    mean = np.asarray(several.mean(axis=0) if of_logits else _LOGITS_OF_MEAN[outputs](several))
    return mean, probabilities_of(mean, outputs)


def _log_mean(log_values: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(log_values, axis=0) - jnp.log(len(log_values))


_LOGITS_OF_MEAN = {
    "softmax_cross_entropy": lambda logits: _log_mean(jax.nn.log_softmax(logits)),
    "sigmoid_cross_entropy": lambda logits: (
        _log_mean(jax.nn.log_sigmoid(logits)) - _log_mean(jax.nn.log_sigmoid(-logits))
    ),
    "squared_error": lambda logits: jnp.mean(
        jnp.stack([probabilities_of(each, "squared_error") for each in logits]), axis=0
    ),
}


def check_alike(
    names: Sequence[str], class_names: Sequence[Sequence[str]], outputs: Sequence[str]
) -> None:
    """ConfigError unless the runs of these names can answer as one.

    They must have the same classes in the same order, and outputs of one meaning. Their networks
    and image sizes may differ: each reads pictures in its own way.
    """
    for name, classes, meaning in zip(names, class_names, outputs, strict=True):
        first = printable(names[0])
        if list(classes) != list(class_names[0]):
            raise ConfigError(
                f"{printable(name)} has other classes than {first}, or another order of them: an "
                "ensemble needs the same"
            )
        if meaning != outputs[0]:
            raise ConfigError(
                f"{printable(name)} gives outputs of {meaning} and {first} of {outputs[0]}: they "
                "can't be averaged"
            )
