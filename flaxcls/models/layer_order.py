"""The layers of a network from its input to its head, as layer-wise learning rates count them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# A residual block, a layer of DenseNet's blocks, or Flax's own names such as "EncoderBlock_1".
_BLOCK = r"^(stage\d+_)?block\d+(_layer\d+)?|^\w*Block_\d+"


def layers_of(module: nn.Module, image_shape: tuple[int, int, int]) -> list[list[str]]:
    """The paths of the parameters of each layer, the lowest layer first, the head last.

    The order is that in which the network makes its parameters. A network of blocks has a layer
    for each: what comes before the first block is the stem, layer 0, what comes between two (the
    downsampling of a ConvNeXt) belongs to the upper one, and what follows the last (a norm) to
    that, but for the head. So timm counts for ResNets, ViTs, Swin, ConvNeXts and EfficientNets
    (`param_groups_layer_decay`). In a network without blocks a layer begins with each kernel.

    A network whose blocks have other names says so in `block_pattern`: a regular expression for
    the beginning of the paths of a block's parameters, whose text names the block.
    """
    paths = _in_order(module, image_shape)
    blocks = re.compile(getattr(module, "block_pattern", _BLOCK))
    kernels = [path.rpartition("/")[0] for path in paths if path.endswith("kernel")]
    head = "head" if "head" in kernels else kernels[-1] if kernels else None
    trunk = [path for path in paths if head is None or path.rpartition("/")[0] != head]
    names = [found[0] if (found := blocks.search(path)) else None for path in trunk]
    layers = _by_block(trunk, names) if any(names) else _by_kernel(trunk)
    return [layer for layer in (*layers, [p for p in paths if p not in trunk]) if layer]


def _by_block(paths: list[str], names: list[str | None]) -> list[list[str]]:
    layers: list[list[str]] = [[]]
    between: list[str] = []
    seen: dict[str, int] = {}
    for path, name in zip(paths, names, strict=True):
        if name is None:
            (between if seen else layers[0]).append(path)
            continue
        if name not in seen:
            seen[name] = len(layers)
            layers.append(between)
            between = []
        layers[seen[name]].append(path)
    layers[-1] += between
    return layers


def _by_kernel(paths: list[str]) -> list[list[str]]:
    layers: list[list[str]] = [[]]
    modules = {path.rpartition("/")[0] for path in paths if path.endswith("kernel")}
    begun = set()
    for path in paths:
        module = path.rpartition("/")[0]
        if module in modules - begun:
            begun.add(module)
            if len(begun) > 1:
                layers.append([])
        layers[-1].append(path)
    return layers


def _in_order(module: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """The paths of the parameters as they are made: JAX sorts what leaves a traced function."""
    paths: list[str] = []

    def init(key: jax.Array, image: jax.Array) -> None:
        paths[:] = _paths(module.init(key, image, train=False)["params"])

    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    jax.eval_shape(init, jax.random.key(0), image)
    return paths


def _paths(tree: Mapping[str, Any], above: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, f"{above}{name}/")
        else:
            yield above + name
