"""Weights as safetensors: a table of names and arrays, and text that says what they are."""

from pathlib import Path
from typing import Any

from flaxcls.errors import ConfigError
from flaxcls.weights.exportable import Exportable, as_text, flatten
from flaxcls.weights.references import reference
from flaxcls.weights.torch_names import to_torch

NAMES = ("flaxcls", "torch")


def write(model: Exportable, folder: Path, names: str = "flaxcls") -> None:
    """Writes model.safetensors.

    The arrays are called as the network has them ("params/conv1/kernel"), or as the state dict of
    its reference in PyTorch ("conv1.weight"), with that one's axes.
    """
    more: dict[str, Any] = {"names": names}
    if names == "torch":
        arrays, format = to_torch(model.network, model.variables), "pt"
        classes = len(model.metadata["class_names"])
        more["reference"] = reference(model.metadata["network"], classes, model.image_shape[0])
    else:
        arrays, format = flatten(model.variables), "flax"
    metadata = as_text({**model.metadata, **more})
    save(folder / "model.safetensors", arrays, {**metadata, "format": format})


def save(path: Path, arrays: dict, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file; ConfigError where the package is missing."""
    try:
        from safetensors.numpy import save as serialize
    except ImportError as error:
        raise ConfigError("this export needs safetensors: pip install 'flaxcls[export]'") from error
    path.write_bytes(serialize({name: array.copy() for name, array in arrays.items()}, metadata))
