"""MobileNetV3 and V4: networks for phones, of inverted residuals."""

import functools
import itertools
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne
from flaxcls.models.inverted_residual import (
    ConvNorm,
    Factory,
    InvertedResidual,
    SqueezeExcitation,
    round_channels,
)
from flaxcls.models.layers import (
    batch_norm,
    drop_path,
    he_normal_fan_in,
    record,
    uniform_fan_out,
)
from flaxcls.models.pooling import global_average


class Row(NamedTuple):
    """A block of MobileNetV3 as in the paper's tables 1 and 2."""

    kernel: int
    hidden: int
    features: int
    squeeze: bool
    hard_swish: bool
    strides: int


MOBILENET_V3 = {
    "large": (
        Row(3, 16, 16, False, False, 1),
        Row(3, 64, 24, False, False, 2),
        Row(3, 72, 24, False, False, 1),
        Row(5, 72, 40, True, False, 2),
        Row(5, 120, 40, True, False, 1),
        Row(5, 120, 40, True, False, 1),
        Row(3, 240, 80, False, True, 2),
        Row(3, 200, 80, False, True, 1),
        Row(3, 184, 80, False, True, 1),
        Row(3, 184, 80, False, True, 1),
        Row(3, 480, 112, True, True, 1),
        Row(3, 672, 112, True, True, 1),
        Row(5, 672, 160, True, True, 2),
        Row(5, 960, 160, True, True, 1),
        Row(5, 960, 160, True, True, 1),
    ),
    "small": (
        Row(3, 16, 16, True, False, 2),
        Row(3, 72, 24, False, False, 2),
        Row(3, 88, 24, False, False, 1),
        Row(5, 96, 40, True, True, 2),
        Row(5, 240, 40, True, True, 1),
        Row(5, 240, 40, True, True, 1),
        Row(5, 120, 48, True, True, 1),
        Row(5, 144, 48, True, True, 1),
        Row(5, 288, 96, True, True, 2),
        Row(5, 576, 96, True, True, 1),
        Row(5, 576, 96, True, True, 1),
    ),
}


class MobileNetV3(nn.Module, kw_only=True):
    """MobileNetV3 (Howard et al. 2019, arXiv:1905.02244): torchvision's weights of its names fit.

    BatchNorm's momentum and epsilon and the initial values are torchvision's, as is `dropout`.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    member: str
    dropout: BelowOne = 0.2

    @property
    def torch_names(self):  # torchvision's
        rows = MOBILENET_V3[self.member]

        def block_name(match: re.Match) -> str:
            """The layers that a block has are numbered."""
            number, layer = match.groups()
            row = rows[int(number) - 1]
            has = {"expand": number != "1", "depthwise": True, "squeeze": row.squeeze}
            layers = [*filter(has.get, has), "project"]
            return f"features/{number}/block/{layers.index(layer)}"

        return (
            (r"^block(\d+)/(\w+)", block_name),
            (r"^stem", "features/0"),
            (r"^last", f"features/{len(rows) + 1}"),
            (r"conv$", "0"),
            (r"norm$", "1"),
            (r"^hidden", "classifier/0"),
            (r"^head", "classifier/3"),
        )

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        norm = batch_norm(train, self.dtype, momentum=0.99, epsilon=1e-3)
        layer = functools.partial(ConvNorm, norm=norm, dtype=self.dtype)
        x = layer(16, 3, strides=2, activation=nn.hard_swish, name="stem")(x)
        stages = itertools.count(1)
        for i, row in enumerate(MOBILENET_V3[self.member]):
            if row.strides == 2:
                x = record(self, f"stage{next(stages)}", x)
            squeeze = functools.partial(
                SqueezeExcitation,
                round_channels(row.hidden // 4),
                nn.relu,
                nn.hard_sigmoid,
                self.dtype,
            )
            x = InvertedResidual(
                features=row.features,
                hidden=row.hidden,
                kernel=row.kernel,
                strides=row.strides,
                activation=nn.hard_swish if row.hard_swish else nn.relu,
                squeeze=squeeze if row.squeeze else None,
                layer=layer,
                name=f"block{i + 1}",
            )(x)
        x = layer(6 * x.shape[-1], 1, activation=nn.hard_swish, name="last")(x)
        x = record(self, f"stage{next(stages)}", x)
        dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.01))
        width = 1280 if self.member == "large" else 1024
        x = nn.hard_swish(dense(width, dtype=self.dtype, name="hidden")(global_average(x)))
        x = record(self, "pooled", x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return dense(self.num_classes, name="head")(x)


class UniversalBottleneck(nn.Module):
    """An inverted residual with another depthwise convolution first; a kernel of 0 leaves one out.

    So it is also a ConvNeXt block (only the first) or a feed-forward one (neither). The second has
    the stride.
    """

    features: int
    hidden: int
    first_kernel: int
    kernel: int
    strides: int
    layer: Factory
    drop_path: float
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        depthwise = functools.partial(self.layer, depthwise=True)
        y = x
        if self.first_kernel:
            y = depthwise(x.shape[-1], self.first_kernel, name="dw_start")(y)
        y = self.layer(self.hidden, 1, activation=nn.relu, name="pw_exp")(y)
        if self.kernel:
            depthwise = functools.partial(depthwise, strides=self.strides, activation=nn.relu)
            y = depthwise(self.hidden, self.kernel, name="dw_mid")(y)
        y = self.layer(self.features, 1, name="pw_proj")(y)
        if self.strides == 1 and x.shape[-1] == self.features:
            y = x + drop_path(y, self.drop_path, self.train)
        return y


# MobileNetV4-Conv-M's stages of (first kernel, kernel, stride, expansion, features).
CONV_MEDIUM = (
    ((3, 5, 2, 4, 80), (3, 3, 1, 2, 80)),
    (
        (3, 5, 2, 6, 160),
        *((3, 3, 1, 4, 160),) * 2,
        (3, 5, 1, 4, 160),
        (3, 3, 1, 4, 160),
        (3, 0, 1, 4, 160),
        (0, 0, 1, 2, 160),
        (3, 0, 1, 4, 160),
    ),
    (
        (5, 5, 2, 6, 256),
        (5, 5, 1, 4, 256),
        *((3, 5, 1, 4, 256),) * 2,
        (0, 0, 1, 4, 256),
        (3, 0, 1, 4, 256),
        (3, 5, 1, 2, 256),
        (5, 5, 1, 4, 256),
        *((0, 0, 1, 4, 256),) * 2,
        (5, 0, 1, 2, 256),
    ),
)


class MobileNetV4(nn.Module, kw_only=True):
    """MobileNetV4-Conv-M (Qin et al. 2024, arXiv:2404.10518): timm's mobilenetv4_conv_medium fits.

    Initial values are timm's, and so are no dropout and no drop-path.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    dropout: BelowOne = 0.0
    drop_path: BelowOne = 0.0

    torch_names = (  # timm's
        (r"^stem/conv", "conv_stem"),
        (r"^stem/norm", "bn1"),
        (r"^fused_expand/conv", "blocks/0/0/conv_exp"),
        (r"^fused_expand/norm", "blocks/0/0/bn1"),
        (r"^fused_project/conv", "blocks/0/0/conv_pwl"),
        (r"^fused_project/norm", "blocks/0/0/bn2"),
        (r"^stage(\d)_block(\d+)", lambda m: f"blocks/{int(m[1]) - 1}/{int(m[2]) - 1}"),
        (r"(dw_\w+|pw_\w+)/norm", r"\1/bn"),
        (r"^wide/conv", "blocks/4/0/conv"),
        (r"^wide/norm", "blocks/4/0/bn1"),
        (r"^last/conv", "conv_head"),
        (r"^last/norm", "norm_head"),
        (r"^head", "classifier"),
    )

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        layer = functools.partial(
            ConvNorm,
            norm=batch_norm(train, self.dtype),
            dtype=self.dtype,
            depthwise_init=he_normal_fan_in,
        )
        active = functools.partial(layer, activation=nn.relu)
        x = active(32, 3, strides=2, name="stem")(x)
        x = record(self, "stage1", x)
        x = layer(48, 1, name="fused_project")(active(128, 3, strides=2, name="fused_expand")(x))
        blocks = {
            f"stage{stage}_block{i}": row
            for stage, rows in enumerate(CONV_MEDIUM, start=2)
            for i, row in enumerate(rows, start=1)
        }
        total = len(blocks) + 2  # with the stages before and after, as in timm
        stages = itertools.count(2)
        for i, (name, row) in enumerate(blocks.items(), start=1):
            first_kernel, kernel, strides, expansion, features = row
            if strides == 2:
                x = record(self, f"stage{next(stages)}", x)
            x = UniversalBottleneck(
                features=features,
                hidden=expansion * x.shape[-1],
                first_kernel=first_kernel,
                kernel=kernel,
                strides=strides,
                layer=layer,
                drop_path=self.drop_path * i / total,
                train=train,
                name=name,
            )(x)
        x = active(960, 1, name="wide")(x)
        x = record(self, f"stage{next(stages)}", x)
        x = active(1280, 1, name="last")(global_average(x)[:, None, None])[:, 0, 0]
        x = record(self, "pooled", x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, kernel_init=uniform_fan_out, name="head")(x)
