"""Variables by the names and the layouts of PyTorch's networks, in and out.

A network whose reference is torchvision's or timm's says in `torch_names` how the paths of its
layers read there: pairs of a regular expression and its replacement, applied one after the other
to a path such as "stage1/block2/conv1". What is left is the same for all networks: a kernel is a
"weight" with its axes in another order, a scale is a "weight", the mean is "running_mean".
An array that PyTorch keeps with other axes is in `torch_shapes`: pairs of a regular expression for
its path, leaf included, and the shape to give it first, such as the [P, P, C, D] of a convolution
whose kernel is the [P * P * C, D] of a dense layer over patches here.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from flaxcls.errors import ConfigError

Names = Sequence[tuple[str, str | Callable[[re.Match], str]]]

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# From flax to PyTorch: HWIO -> OIHW, [inputs, outputs] -> [outputs, inputs].
_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}
# What PyTorch keeps and a network does not need.
IGNORED = re.compile(r"(^|\.)(num_batches_tracked|relative_position_index|attn_mask)$")


def torch_name(path: str, names: Names) -> str:
    """The name of a variable, such as "layer1.0.conv1.weight", by its path in params."""
    layers, _, leaf = path.rpartition("/")
    for pattern, replacement in names:
        layers = re.sub(pattern, replacement, layers)
    return ".".join([*filter(None, layers.split("/")), _LEAVES.get(leaf, leaf)])


def to_torch(network: nn.Module, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A network's variables as a PyTorch state dict of its reference has them."""
    return {
        torch_name(path, _names(network)): to_torch_layout(network, path, np.asarray(array))
        for path, array in _leaves(variables)
    }


def from_torch(
    network: nn.Module, shapes: Mapping[str, Any], state: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The variables of a network, float32, of a PyTorch state dict of its reference.

    Args:
      network: has `torch_names`.
      shapes: of its variables, as `models.shapes` gives them.
      state: arrays by PyTorch's names.

    Raises ConfigError, naming the first, for arrays that are missing, left over, or of another
    shape.
    """
    names, used = _names(network), set()

    def take(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        ours = jax.tree_util.keystr(path[1:], simple=True, separator="/")
        name = torch_name(ours, names)
        if name not in state:
            raise ConfigError(f"the weights lack {name}, which is {ours} of {network.name}")
        used.add(name)
        array = np.asarray(state[name], np.float32)
        needed = to_torch_layout(network, ours, np.empty(shape.shape)).shape
        if array.shape != needed:
            raise ConfigError(
                f"{name} of the weights has the shape {array.shape}; {network.name} needs {needed}"
            )
        return from_torch_layout(ours, array).reshape(shape.shape)

    variables = jax.tree.map_with_path(take, dict(shapes))
    left = sorted(name for name in state.keys() - used if not IGNORED.search(name))
    if left:
        raise ConfigError(f"the weights have {left[0]}, which {network.name} does not")
    return variables


def _names(network: nn.Module) -> Names:
    names = getattr(network, "torch_names", None)
    if names is None:
        raise ConfigError(f"the network {network.name} has no reference in PyTorch")
    return names


def _leaves(variables: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (jax.tree_util.keystr(path[1:], simple=True, separator="/"), array)
        for path, array in jax.tree.leaves_with_path(dict(variables))
    ]


def to_torch_layout(network: nn.Module, path: str, array: np.ndarray) -> np.ndarray:
    """A variable, by its path in params, with the axes that it has in PyTorch."""
    array = unfolded(network, path, array)
    is_kernel = path.endswith("kernel") and array.ndim in _AXES
    return array.transpose(_AXES[array.ndim]) if is_kernel else array


def from_torch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """An array of PyTorch's with the axes of the variable at a path, `unfolded`."""
    is_kernel = path.endswith("kernel") and array.ndim in _AXES
    return array.transpose(np.argsort(_AXES[array.ndim])) if is_kernel else array


def unfolded(network: nn.Module, path: str, array: np.ndarray) -> np.ndarray:
    """A variable in the shape that the network's `torch_shapes` give it."""
    for pattern, shape in getattr(network, "torch_shapes", ()):
        if re.search(pattern, path):
            array = array.reshape(shape)
    return array
