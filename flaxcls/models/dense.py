"""Fully connected networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne
from flaxcls.models.layers import ACTIVATIONS, Activation, Widths, flatten, record


class DenseNetwork(nn.Module, kw_only=True):
    """Pixels -> hidden layers -> logits. The first layer sees the image as one vector."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    widths: Widths = (512, 256)
    activation: Activation = "relu"
    dropout: BelowOne = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        x = flatten(x)
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, dtype=self.dtype, name=f"hidden{i + 1}")(x)
            x = ACTIVATIONS[self.activation](x)
            x = record(self, "pooled", x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)
