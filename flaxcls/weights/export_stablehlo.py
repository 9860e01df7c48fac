"""A network as StableHLO by `jax.export`, for CPUs, GPUs and TPUs, with its weights beside it.

The weights are an argument of the exported function, not constants in it: a serialized module is
readable by JAX versions of half a year or so, the weights for good, and neither is there twice.
"""

import importlib.util
import json
from pathlib import Path

import jax
from jax import export

from flaxcls.errors import ConfigError
from flaxcls.weights.export_safetensors import save
from flaxcls.weights.exportable import Exportable, cannot, flatten, symbolic_images, unflatten

PLATFORMS = ("cpu", "cuda", "tpu")


def write(model: Exportable, folder: Path) -> None:
    """Writes model.stablehlo, weights.safetensors and metadata.json.

    The function is `call(weights, images uint8 [b, H, W, C]) -> {"logits", "probabilities"}`, for
    any b; `weights` are those of the file, as safetensors reads it. It can't be differentiated.
    Raises ConfigError where a package is missing or the network can't take any size of batch.
    """
    if not importlib.util.find_spec("flatbuffers"):  # which JAX serializes with
        raise ConfigError("--format=stablehlo needs flatbuffers: pip install 'flaxcls[export]'")
    arrays = flatten(model.variables)

    def classify(weights, images):
        return model.classify(unflatten(weights), images)

    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in arrays.items()}
    try:
        exported = export.export(jax.jit(classify), platforms=PLATFORMS)(
            shapes, symbolic_images(model)
        )
    except Exception as error:  # whatever a network does with a size that is no number
        raise cannot(model, error) from error
    save(folder / "weights.safetensors", arrays)
    (folder / "model.stablehlo").write_bytes(exported.serialize())
    made = {
        "jax": jax.__version__,
        "platforms": PLATFORMS,
        "calling_convention_version": exported.calling_convention_version,
        "note": "JAX reads exported modules for about six months after the version that wrote "
        "them; the weights in weights.safetensors do not expire",
    }
    content = {**model.metadata, "stablehlo": made}
    (folder / "metadata.json").write_text(json.dumps(content, indent=2) + "\n")
