"""BatchNorm of a 1x1 convolution that widens, whatever network it is in, with less memory traffic.

The mean and variance of y = x W, over pixels, follow from the mean m and covariance S of x:
m W and, of each channel w of W, w' S w. So they are known before y is, and normalising y is a
convolution with other weights and a bias: nothing between x and what comes next goes to memory. Nor
does the gradient need y, which is up to four times as wide as x: that of the variance is a product
of x with a small matrix. The numbers are those of the convolution and the BatchNorm but for
rounding: what is rounded are the weights, times the factors, not y.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import Precision

from flaxcls.models.batch_norm_groups import GroupedBatchNorm, is_by_channel, takes_statistics


class _Projection(NamedTuple):
    """A 1x1 convolution: what was multiplied, without the pixels that its strides skip."""

    inputs: jax.Array
    kernel: jax.Array
    result: jax.Array


@contextlib.contextmanager
def batch_norm_of_projections(groups: int = 1) -> Iterator[None]:
    """In this context BatchNorm of 1x1 convolutions is computed from what these are given.

    It concerns each nn.BatchNorm in training right after an nn.Conv without bias that has more
    channels out than in. All else is as ever. The statistics are those of `groups` equal runs of
    the batch; the running ones come out [groups, C], as in `batch_norm_in_groups`, which is entered
    after this one. It pays where each device has one whole group, or the group is the whole batch:
    else the weights differ within what a device multiplies at once.
    """
    projections: dict[int, _Projection] = {}  # by their results, which these keep alive

    def intercept(call, arguments, keywords, context):
        module = context.module
        if context.method_name != "__call__":
            return call(*arguments, **keywords)
        if isinstance(module, nn.Conv):
            y = call(*arguments, **keywords)
            if _widens(module, arguments[0], y):
                inputs = _strided(arguments[0], module.strides).astype(y.dtype)
                kernel = module.get_variable("params", "kernel")[0, 0].astype(y.dtype)
                projections[id(y)] = _Projection(inputs, kernel, y)
            return y
        if type(module) is not nn.BatchNorm or id(arguments[0]) not in projections:
            return call(*arguments, **keywords)
        if not all(
            asked(module, *arguments, **keywords) for asked in (takes_statistics, is_by_channel)
        ):
            return call(*arguments, **keywords)
        inputs, kernel, _ = projections.pop(id(arguments[0]))
        return _ProjectedBatchNorm.in_place_of(module, groups)(inputs, kernel)

    with nn.intercept_methods(intercept):
        yield


def _widens(conv: nn.Conv, x: jax.Array, y: jax.Array) -> bool:
    """Whether it is a 1x1 convolution of [B,H,W,C] without bias and padding, to more channels."""
    strides = conv.strides if isinstance(conv.strides, tuple) else (conv.strides or 1,) * 2
    sides = [-(-size // stride) for size, stride in zip(x.shape[1:3], strides, strict=False)]
    return (
        x.ndim == 4
        and tuple(conv.kernel_size) == (1, 1)
        and not conv.use_bias
        and conv.feature_group_count == 1
        and y.shape[1:3] == tuple(sides)
        and y.shape[-1] > x.shape[-1]
    )


def _strided(x: jax.Array, strides) -> jax.Array:
    """The pixels of [B,H,W,C] that a 1x1 convolution with these strides sees."""
    down, across = strides if isinstance(strides, tuple) else (strides or 1,) * 2
    return x[:, ::down, ::across]


class _ProjectedBatchNorm(GroupedBatchNorm):
    """The BatchNorm of x [B,H,W,I] times a kernel [I,C]; its parameters and statistics."""

    @nn.compact
    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        grouped = x.reshape(self.groups, -1, *x.shape[1:])
        means = x.astype(wide).mean((1, 2)).reshape(self.groups, -1, x.shape[-1]).mean(1)
        products = jnp.einsum(
            "gbhwi,gbhwj->gij",
            grouped,
            grouped,
            precision=Precision.HIGHEST,
            preferred_element_type=wide,
        )
        covariance = products * (self.groups * x.shape[-1] / x.size)
        covariance -= means[:, :, None] * means[:, None]
        weights = kernel.astype(wide)
        mean = jnp.matmul(means, weights, precision=Precision.HIGHEST)
        moved = jnp.matmul(covariance, weights, precision=Precision.HIGHEST)
        var = jnp.maximum(0, jnp.sum(weights * moved, 1))
        self._track(mean, var)

        factor = self._factor(var)
        shift = -mean * factor
        if self.use_bias:
            shift += self.param("bias", self.bias_init, kernel.shape[-1:], self.param_dtype)
        scaled = (weights * factor[:, None]).astype(x.dtype)
        y = jnp.einsum("gbhwi,gic->gbhwc", grouped, scaled, preferred_element_type=wide)
        y += jnp.expand_dims(shift, (1, 2, 3))
        dtype = self.dtype or jnp.promote_types(x.dtype, self.param_dtype)
        return y.astype(dtype).reshape(*x.shape[:-1], -1)
