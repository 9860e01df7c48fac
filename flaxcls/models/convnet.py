"""The small convolutional networks of the tutorials, and one for 8x8 digits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls.config.options import BelowOne
from flaxcls.models.layers import (
    Conv,
    batch_norm,
    flatten,
    record,
    torch_bias_init,
    torch_kernel_init,
)
from flaxcls.models.pooling import POOLS, Pool, max_pool

_keras_init = {"kernel_init": nn.initializers.glorot_uniform()}


class KerasCNN(nn.Module, kw_only=True):
    """TensorFlow's tutorial "Convolutional Neural Network (CNN)": 122,570 parameters on CIFAR-10.

    https://www.tensorflow.org/tutorials/images/cnn
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    pool: Pool = "max"

    minimum_image_size = 18

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        conv = functools.partial(
            Conv, kernel_size=(3, 3), padding="VALID", dtype=self.dtype, **_keras_init
        )
        pool = POOLS[self.pool]
        x = nn.relu(conv(32, name="conv1")(x))
        x = record(self, "stage1", x)
        x = nn.relu(conv(64, name="conv2")(pool(x)))
        x = record(self, "stage2", x)
        x = nn.relu(conv(64, name="conv3")(pool(x)))
        x = record(self, "stage3", x)
        x = flatten(x)
        x = nn.relu(nn.Dense(64, dtype=self.dtype, name="hidden", **_keras_init)(x))
        x = record(self, "pooled", x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head", **_keras_init)(x)


class KerasSmall(nn.Module, kw_only=True):
    """Keras' "Simple MNIST convnet" without its dropout: 42,442 parameters on CIFAR-10.

    https://keras.io/examples/vision/mnist_convnet
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    pool: Pool = "max"
    dropout: BelowOne = 0.0

    minimum_image_size = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        conv = functools.partial(
            Conv, kernel_size=(3, 3), padding="VALID", dtype=self.dtype, **_keras_init
        )
        pool = POOLS[self.pool]
        x = nn.relu(conv(32, name="conv1")(x))
        x = record(self, "stage1", x)
        x = nn.relu(conv(64, name="conv2")(pool(x)))
        x = record(self, "stage2", x)
        x = flatten(pool(x))
        x = record(self, "pooled", x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head", **_keras_init)(x)


class TorchConvNet(nn.Module, kw_only=True):
    """The ConvNet of the PyTorch tutorials: 2,122,186 parameters on CIFAR-10.

    PyTorch flattens channels first: a weight that comes from there must be transposed
    from [512, C, H, W] to [H, W, C, 512] before it is reshaped to the kernel of `hidden`.
    """

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    pool: Pool = "max"

    minimum_image_size = 4

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        pool = POOLS[self.pool]

        def conv(x, width, name):
            init = {"kernel_init": torch_kernel_init, "bias_init": torch_bias_init(9 * x.shape[-1])}
            return Conv(width, (3, 3), padding=1, dtype=self.dtype, name=name, **init)(x)

        def dense(x, width, dtype, name):
            init = {"kernel_init": torch_kernel_init, "bias_init": torch_bias_init(x.shape[-1])}
            return nn.Dense(width, dtype=dtype, name=name, **init)(x)

        x = nn.relu(conv(x, 32, "conv1"))
        x = record(self, "stage1", x)
        x = nn.relu(conv(pool(x), 64, "conv2"))
        x = record(self, "stage2", x)
        x = nn.relu(dense(flatten(pool(x)), 512, self.dtype, "hidden"))
        x = record(self, "pooled", x)
        return dense(x, self.num_classes, jnp.float32, "head")


class DigitsCNN(nn.Module, kw_only=True):
    """Three convolutions with BatchNorm, for images as small as 8x8."""

    num_classes: int
    dtype: jnp.dtype = jnp.float32
    dropout: BelowOne = 0.0

    minimum_image_size = 2

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Image [B,H,W,C] float32 -> logits [B,K] float32."""
        conv = functools.partial(Conv, kernel_size=(3, 3), use_bias=False, dtype=self.dtype)
        norm = batch_norm(train, self.dtype)
        x = nn.relu(norm(name="norm1")(conv(32, name="conv1")(x)))
        x = nn.relu(norm(name="norm2")(conv(64, name="conv2")(x)))
        x = record(self, "stage1", x)
        x = nn.relu(norm(name="norm3")(conv(64, name="conv3")(max_pool(x))))
        x = record(self, "stage2", x)
        x = flatten(x)
        x = record(self, "pooled", x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.num_classes, dtype=jnp.float32, name="head")(x)
