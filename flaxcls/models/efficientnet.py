"""EfficientNet (Tan & Le 2019, arXiv:1905.11946) and TensorFlow's EfficientNet-Lite."""

import functools
import itertools
import math
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne
from flaxcls.models.inverted_residual import (
    ConvNorm,
    InvertedResidual,
    SqueezeExcitation,
    round_channels,
)
from flaxcls.models.layers import (
    batch_norm,
    he_normal_fan_in,
    record,
    rematerialized,
    uniform_fan_out,
)
from flaxcls.models.pooling import global_average


class Scaling(NamedTuple):
    """By how much a member is wider and deeper than the smallest, and its dropout."""

    width: float
    depth: float
    dropout: float


class Stage(NamedTuple):
    """A row of the paper's table 1."""

    expansion: int
    kernel: int
    strides: int
    features: int
    blocks: int


SCALING = {
    "b0": Scaling(1.0, 1.0, 0.2),
    "b1": Scaling(1.0, 1.1, 0.2),
    "b2": Scaling(1.1, 1.2, 0.3),
    "b3": Scaling(1.2, 1.4, 0.3),
    "b4": Scaling(1.4, 1.8, 0.4),
    "lite0": Scaling(1.0, 1.0, 0.2),
    "lite1": Scaling(1.0, 1.1, 0.2),
    "lite2": Scaling(1.1, 1.2, 0.3),
    "lite3": Scaling(1.2, 1.4, 0.3),
    "lite4": Scaling(1.4, 1.8, 0.3),
}
STAGES = (
    Stage(1, 3, 1, 16, 1),
    Stage(6, 3, 2, 24, 2),
    Stage(6, 5, 2, 40, 2),
    Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3),
    Stage(6, 5, 2, 192, 4),
    Stage(6, 3, 1, 320, 1),
)


def _torchvision_name(match: re.Match) -> str:
    """The layers of a block are numbered; those of stage 1 expand nothing."""
    stage, block, layer = match.groups()
    position = ("expand", "depthwise", "squeeze", "project").index(layer) - (stage == "1")
    return f"features/{stage}/{int(block) - 1}/block/{position}"


def _timm_name(match: re.Match) -> str:
    """Convolutions are called by what they do, norms are numbered; stage 1 expands nothing."""
    stage, block, layer, kind = match.groups()
    number = ("expand", "depthwise", "project").index(layer) + (stage != "1")
    last = "conv_pw" if stage == "1" else "conv_pwl"
    conv = {"expand": "conv_pw", "depthwise": "conv_dw", "project": last}[layer]
    name = conv if kind == "conv" else f"bn{number}"
    return f"blocks/{int(stage) - 1}/{int(block) - 1}/{name}"


class EfficientNet(nn.Module, kw_only=True):
    """EfficientNet-B: the weights of torchvision's networks of the same names fit.

    `dropout` None is the member's in SCALING. `drop_path` is the rate after the last block; that of
    the first is 0. Initial values are torchvision's. `remat` computes blocks again in the backward
    pass: less memory, a third more time.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    member: str
    dropout: BelowOne | None = None
    drop_path: BelowOne = 0.2
    remat: bool = False

    lite = False
    torch_names = (  # torchvision's
        (r"^stage(\d)_block(\d+)/(\w+)", _torchvision_name),
        (r"^stem", "features/0"),
        (r"^last", f"features/{len(STAGES) + 1}"),
        (r"conv$", "0"),
        (r"norm$", "1"),
        (r"^head", "classifier/1"),
    )

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        scaling = SCALING[self.member]
        activation = nn.relu6 if self.lite else nn.silu
        norm = batch_norm(train, self.dtype, epsilon=1e-3 if self.lite else 1e-5)
        layer = functools.partial(ConvNorm, norm=norm, dtype=self.dtype)
        if self.lite:
            layer = functools.partial(layer, tf_padding=True, depthwise_init=he_normal_fan_in)
        blocks = scaled_blocks(scaling, self.lite)
        stem = 32 if self.lite else round_channels(32 * scaling.width)
        x = layer(stem, 3, strides=2, activation=activation, name="stem")(x)
        residual = rematerialized(InvertedResidual, self.remat)
        stages = itertools.count(1)
        for i, (name, block) in enumerate(blocks.items()):
            if block.strides == 2:
                x = record(self, f"stage{next(stages)}", x)
            squeeze = functools.partial(
                SqueezeExcitation, x.shape[-1] // 4, nn.silu, nn.sigmoid, self.dtype
            )
            x = residual(
                features=block.features,
                hidden=block.expansion * x.shape[-1],
                kernel=block.kernel,
                strides=block.strides,
                activation=activation,
                squeeze=None if self.lite else squeeze,
                drop_path=self.drop_path * i / len(blocks),
                train=train,
                layer=layer,
                name=name,
            )(x)
        last = 1280 if self.lite else 4 * x.shape[-1]
        x = layer(last, 1, activation=activation, name="last")(x)
        x = record(self, f"stage{next(stages)}", x)
        x = global_average(x)
        x = record(self, "pooled", x)
        dropout = scaling.dropout if self.dropout is None else self.dropout
        x = nn.Dropout(dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=uniform_fan_out, name="head")(x)


class EfficientNetLite(EfficientNet):
    """EfficientNet-Lite: the weights of timm's `tf_efficientnet_lite0` and so on fit.

    Without what quantised integers or mobile chips are bad at: squeeze-and-excitation and SiLU. The
    first and the last layers are not scaled. Initial values are TensorFlow's.
    https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """

    lite = True
    torch_names = (  # timm's
        (r"^stage(\d)_block(\d+)/(\w+)/(\w+)", _timm_name),
        (r"^stem/conv", "conv_stem"),
        (r"^stem/norm", "bn1"),
        (r"^last/conv", "conv_head"),
        (r"^last/norm", "bn2"),
        (r"^head", "classifier"),
    )

    @property
    def other_torch_names(self):
        """Of lukemelas/EfficientNet-PyTorch, which Google's weights were first converted to."""
        blocks = {name: i for i, name in enumerate(scaled_blocks(SCALING[self.member], self.lite))}

        def name(match: re.Match) -> str:
            block, layer, kind = match.groups()
            number = ("expand", "depthwise", "project").index(layer)
            return f"_blocks/{blocks[block]}/" + (
                f"_{layer}_conv" if kind == "conv" else f"_bn{number}"
            )

        return (
            (r"^(stage\d_block\d+)/(\w+)/(\w+)", name),
            (r"^stem/conv", "_conv_stem"),
            (r"^stem/norm", "_bn0"),
            (r"^last/conv", "_conv_head"),
            (r"^last/norm", "_bn1"),
            (r"^head", "_fc"),
        )


def scaled_blocks(scaling: Scaling, lite: bool) -> dict[str, Stage]:
    """Stages of one block each, by name; the first and the last stage of Lite keep their depth."""
    blocks = {}
    for number, stage in enumerate(STAGES, start=1):
        features = round_channels(stage.features * scaling.width)
        fixed = lite and number in (1, len(STAGES))
        depth = stage.blocks if fixed else math.ceil(stage.blocks * scaling.depth)
        for i in range(depth):
            strides = stage.strides if i == 0 else 1
            block = stage._replace(features=features, strides=strides, blocks=1)
            blocks[f"stage{number}_block{i + 1}"] = block
    return blocks
