"""Several networks that answer as one: their probabilities, or their logits, averaged."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.errors import ConfigError
from flaxcls.inference.predictions import probabilities_of
from flaxcls.runtime.output import printable

AVERAGES = ("probabilities", "logits")


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
