"""A network as a SavedModel of TensorFlow by `jax2tf`: StableHLO inside, weights as variables."""

import json
from pathlib import Path

import jax

from flaxcls.errors import ConfigError
from flaxcls.weights.export_stablehlo import PLATFORMS
from flaxcls.weights.exportable import Exportable, cannot


def write(model: Exportable, folder: Path) -> None:
    """Writes saved_model.pb, variables/ and metadata.json.

    The signature "serving_default" takes "image" uint8 [batch, H, W, C] and gives "logits" and
    "probabilities", float32, for any batch, on CPUs, GPUs and TPUs.

    Raises ConfigError where TensorFlow, or JAX's way to it, is missing.
    """
    try:
        import tensorflow as tf
        from jax.experimental import jax2tf
    except ImportError as error:
        raise ConfigError(
            f"--format=savedmodel needs TensorFlow, and a JAX with jax2tf ({error}): "
            "pip install 'flaxcls[prepare]'"
        ) from error

    module = tf.Module()
    module.weights = tf.nest.map_structure(
        lambda array: tf.Variable(array, trainable=False), model.variables
    )
    shape = (None, *model.image_shape)
    converted = jax2tf.convert(
        model.classify,
        polymorphic_shapes=[None, f"(b, {', '.join(map(str, model.image_shape))})"],
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )
    signature = tf.function(
        lambda image: converted(module.weights, image),
        autograph=False,
        input_signature=[tf.TensorSpec(shape, tf.uint8, "image")],
    )
    try:
        concrete = signature.get_concrete_function()
    except Exception as error:  # whatever a network does with a size that is no number
        raise cannot(model, error) from error
    tf.saved_model.save(module, str(folder), signatures={"serving_default": concrete})
    content = {**model.metadata, "jax": jax.__version__, "tensorflow": tf.__version__}
    (folder / "metadata.json").write_text(json.dumps(content, indent=2) + "\n")
