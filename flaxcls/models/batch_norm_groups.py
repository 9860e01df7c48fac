"""BatchNorm whose statistics are those of groups of examples, whatever network it is in.

They are tied to examples, not to devices: a group is a run of neighbours in the batch, so that the
numbers are the same on any layout. A device that holds whole groups needs nothing of the others.
"""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.errors import ConfigError
from flaxcls.models.layers import title


def batch_norm_in_groups(count: int) -> contextlib.AbstractContextManager:
    """In this context each nn.BatchNorm normalises `count` equal runs of its batch separately.

    Running statistics move by the mean over the groups: of their means, and of their variances,
    which lack what the groups' means differ by. (DistributedDataParallel, whose groups are the
    batches of the devices, keeps those of its first one.) BatchNorm that uses its running
    statistics is as ever. ConfigError for a BatchNorm over another axis than the last or with
    a mask.
    """

    def in_groups(call, arguments, keywords, context):
        module = context.module
        if not isinstance(module, nn.BatchNorm) or isinstance(module, GroupedBatchNorm):
            return call(*arguments, **keywords)
        images, *given = arguments
        given = given[0] if given else keywords.get("use_running_average")
        if nn.merge_param("use_running_average", module.use_running_average, given):
            return call(*arguments, **keywords)
        if module.axis not in (-1, images.ndim - 1) or keywords.get("mask") is not None:
            raise ConfigError(
                "config.model.batch_norm_group must be None where BatchNorm is over another axis "
                f"than the last or has a mask, as {title(module)} does"
            )
        options = {name: getattr(module, name) for name in nn.BatchNorm.__dataclass_fields__}
        options |= {"parent": module.scope, "name": None}
        return GroupedBatchNorm(**options, groups=count)(images)

    return nn.intercept_methods(in_groups)


class GroupedBatchNorm(nn.BatchNorm):
    """nn.BatchNorm in training, in `groups`; its parameters, statistics and arithmetic."""

    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, pixels = x.shape[-1:], tuple(range(1, x.ndim - 1))
        # Means are taken of each example first: what is split into groups is [B,C], not the maps,
        # which TPUs don't lay out by examples. digits_cnn's step at 56 pixels, 128 images a chip,
        # has 16.25 MB of HBM an image so, 29.1 with maps [G,g,H,W,C] and 16.2 without groups, by
        # XLA for v5e (jax 0.10.2).
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = self._over_groups(wide.mean(pixels))
        if self.use_fast_variance:
            square = self._over_groups(jnp.square(wide).mean(pixels))
            var = jnp.maximum(0, square - jnp.square(mean))
        else:
            deviation = wide - jnp.expand_dims(mean, pixels)
            var = self._over_groups(jnp.square(deviation).mean(pixels))

        self._track(mean, var)
        y = (wide - jnp.expand_dims(mean, pixels)) * jnp.expand_dims(self._factor(var), pixels)
        if self.use_bias:
            y += self.param("bias", self.bias_init, channels, self.param_dtype)
        return y.astype(self.dtype or jnp.promote_types(x.dtype, self.param_dtype))

    def _track(self, mean: jax.Array, var: jax.Array) -> None:
        """Moves the running statistics by those of the groups, [..., C] each."""
        for name, start, new in (("mean", jnp.zeros, mean), ("var", jnp.ones, var)):
            running = self.variable("batch_stats", name, start, new.shape[-1:], jnp.float32)
            running.value = self.momentum * running.value + (1 - self.momentum) * new.mean(0)

    def _factor(self, var: jax.Array) -> jax.Array:
        """What deviations from the mean are multiplied by, [..., C]."""
        factor = jax.lax.rsqrt(var + self.epsilon)
        if self.use_scale:
            factor *= self.param("scale", self.scale_init, var.shape[-1:], self.param_dtype)
        return factor

    def _over_groups(self, x: jax.Array) -> jax.Array:
        """The mean over the group of each example, [B,C]."""
        groups = x.reshape(self.groups, -1, x.shape[-1])
        mean = groups.mean(1, keepdims=True)
        return jnp.broadcast_to(mean, groups.shape).reshape(x.shape)
