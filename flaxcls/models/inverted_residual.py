"""The inverted residual of which the MobileNets and the EfficientNets are made."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.models.layers import Conv, drop_path, he_normal_fan_out
from flaxcls.models.pooling import global_average

Factory = Callable[..., nn.Module]
Function = Callable[[jax.Array], jax.Array]


class ConvNorm(nn.Module):
    """A convolution without bias, BatchNorm, and an activation where there is one.

    A stride-2 window has its odd pixel before the image, as in PyTorch, or with `tf_padding` after
    it, as in TensorFlow.
    """

    features: int
    kernel: int
    norm: Factory
    dtype: jnp.dtype
    strides: int = 1
    depthwise: bool = False
    activation: Function | None = None
    tf_padding: bool = False
    depthwise_init: Callable[..., jax.Array] = he_normal_fan_out

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Conv(
            self.features,
            (self.kernel, self.kernel),
            self.strides,
            padding="SAME" if self.tf_padding else self.kernel // 2,
            feature_group_count=self.features if self.depthwise else 1,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=self.depthwise_init if self.depthwise else he_normal_fan_out,
            name="conv",
        )(x)
        x = self.norm(name="norm")(x)
        return self.activation(x) if self.activation else x


class SqueezeExcitation(nn.Module):
    """Weighs the channels by what the whole image has (Hu et al. 2017, arXiv:1709.01507)."""

    width: int
    activation: Function
    gate: Function
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(
            Conv, kernel_size=(1, 1), dtype=self.dtype, kernel_init=he_normal_fan_out
        )
        y = global_average(x)[:, None, None].astype(x.dtype)
        y = self.activation(conv(self.width, name="fc1")(y))
        return x * self.gate(conv(x.shape[-1], name="fc2")(y))


class InvertedResidual(nn.Module):
    """Expand by 1x1, depthwise, squeeze and excite, project by 1x1: the narrow ends are added.

    Sandler et al. 2018 (MobileNetV2, arXiv:1801.04381). `hidden` is the width between the ends;
    `squeeze` makes the squeeze-and-excitation, where there is one, as `layer` makes a ConvNorm.
    """

    features: int
    hidden: int
    kernel: int
    strides: int
    activation: Function
    layer: Factory
    squeeze: Factory | None = None
    drop_path: float = 0.0
    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = functools.partial(self.layer, activation=self.activation)
        y = x
        if self.hidden != x.shape[-1]:
            y = layer(self.hidden, 1, name="expand")(y)
        depthwise = functools.partial(layer, strides=self.strides, depthwise=True)
        y = depthwise(self.hidden, self.kernel, name="depthwise")(y)
        if self.squeeze:
            y = self.squeeze(name="squeeze")(y)
        y = self.layer(self.features, 1, name="project")(y)
        if self.strides == 1 and x.shape[-1] == self.features:
            y = x + drop_path(y, self.drop_path, self.train)
        return y


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, or the next where that is below 90 %: what all of these use."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
