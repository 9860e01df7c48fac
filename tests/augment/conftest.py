import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture
def make_batch():
    """A batch of random uint8 images, or of the given ones, with one-hot labels."""

    def make(count=8, height=8, width=8, channels=3, images=None, classes=5):
        if images is None:
            shape = (count, height, width, channels)
            images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        count = len(images)
        return {
            "image": jnp.asarray(images),
            "label": jnp.eye(classes)[jnp.arange(count) % classes],
            "index": jnp.arange(count, dtype=jnp.int32),
            "epoch": jnp.zeros(count, jnp.int32),
        }

    return make
