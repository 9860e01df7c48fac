"""A network, an augmentation and a schedule of one's own, for the recipe own_network.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne, Count, NonNegative


class Mlp(nn.Module):
    """Two dense layers over the last axis, which keeps its size."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype)(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601): MLPs over patches, then over channels.

    `num_classes` is all that a network must take. flaxcls gives it `dtype`, what to compute in, if
    it takes that too; its other fields are its options in a recipe, checked by their annotations.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    patch: Count = 2
    width: Count = 64
    depth: Count = 3

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Images [B, H, W, C] float32, normalised -> logits [B, num_classes] float32."""
        window = (self.patch, self.patch)
        x = nn.Conv(self.width, window, strides=window, dtype=self.dtype, name="stem")(images)
        x = x.reshape(len(x), -1, self.width)  # [B, patches, width]
        for _ in range(self.depth):
            y = nn.LayerNorm(dtype=self.dtype)(x).swapaxes(1, 2)
            x = x + Mlp(self.width // 2, self.dtype)(y).swapaxes(1, 2)
            x = x + Mlp(self.width * 2, self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        x = nn.LayerNorm(dtype=self.dtype)(x).mean(axis=1)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)


def noise(key: jax.Array, batch: dict, /, *, deviation: NonNegative = 8.0) -> dict:
    """Gaussian noise; `deviation` is in units of a pixel, 0 to 255."""
    images = batch["image"] + deviation * jax.random.normal(key, batch["image"].shape)
    return {**batch, "image": jnp.clip(images, 0, 255).astype(batch["image"].dtype)}


def stable_then_decay(run, /, *, stable: BelowOne = 0.6):
    """The peak for a share of the run, then 1 - sqrt to 0 (Hägele 2024, arXiv:2405.18392)."""
    return lambda step: 1 - jnp.sqrt(jnp.clip((run.progress(step) - stable) / (1 - stable), 0, 1))
