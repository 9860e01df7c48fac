"""What every format of an export is made of, and what it says of itself."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from flaxcls.errors import ConfigError

Outputs = dict[str, jax.Array]  # "logits" and "probabilities", float32 [B, K]


class Exportable(NamedTuple):
    """A trained network, ready to be written.

    Attributes:
      network: computes in float32.
      variables: "params" and perhaps "batch_stats", arrays of the host.
      image_shape: (height, width, channels) of its images.
      classifier: of a normalisation's mean and std makes what `classify` is.
      metadata: a name -> what JSON can hold: class names, preprocessing, licence.
    """

    network: nn.Module
    variables: dict[str, Any]
    image_shape: tuple[int, int, int]
    classifier: Callable[[Any, Any], Callable[[Any, jax.Array], Outputs]]
    metadata: dict[str, Any]

    @property
    def classify(self) -> Callable[[Any, jax.Array], Outputs]:
        """`classify(variables, images uint8 [B, H, W, C])`, with the normalisation inside."""
        preprocessing = self.metadata["preprocessing"]
        return self.classifier(preprocessing["mean"], preprocessing["std"])


def as_text(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata for the formats that hold text: JSON, in ASCII whatever a class is called."""
    return {name: json.dumps(value) for name, value in metadata.items()}


def flatten(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays by their paths, such as "params/head/kernel"."""
    leaves = jax.tree.leaves_with_path(dict(variables))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.ascontiguousarray(leaf)
        for path, leaf in leaves
    }


def unflatten(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of arrays by their paths: what `flatten` takes apart."""
    variables: dict[str, Any] = {}
    for path, array in arrays.items():
        *layers, leaf = path.split("/")
        place = variables
        for layer in layers:
            place = place.setdefault(layer, {})
        place[leaf] = array
    return variables


def symbolic_images(model: Exportable) -> jax.ShapeDtypeStruct:
    """The images of a batch of any size b, uint8 [b, H, W, C]."""
    (batch,) = jax.export.symbolic_shape("b")
    return jax.ShapeDtypeStruct((batch, *model.image_shape), np.uint8)


def cannot(model: Exportable, error: Exception) -> ConfigError:
    """What to say where a network can't be traced for a batch of any size."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ConfigError(
        f"the network {model.network.name or type(model.network).__name__} can't be exported for "
        f"batches of any size (it has to say x.shape[0], not len(x)): {reason}"
    )
