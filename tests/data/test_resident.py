"""The whole split on the device gives the batches of its order; its statistics are exact."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import build
from flaxcls.data import loader, open_source
from flaxcls.data.order import Order, evaluation_batches
from flaxcls.data.resident import Resident, gather
from flaxcls.data.statistics import channel_statistics
from flaxcls.runtime import sharding
from flaxcls.training.program import Program


def images_and_labels(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 2, 3), np.uint8)
    return images, np.arange(count)


def test_batches_are_those_of_the_order():
    order = Order(23, batch_size=4, seed=5)
    data = Resident(*images_and_labels(23), order)
    batches = list(data.batches(5, 20))
    assert len(batches) == 15
    for step, batch in zip(range(5, 20), batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, order.batch(step))
        jax.tree.map(np.testing.assert_array_equal, data.batch(step), batch)


def test_split_that_is_only_evaluated_needs_no_order():
    data = Resident(*images_and_labels(10))
    actual, expected = data.evaluation_batches(4), evaluation_batches(10, 4)
    for batch, plan in zip(actual, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, plan)


def test_gather_takes_the_examples_inside_jit():
    images, labels = images_and_labels(20)
    data = Resident(images, labels, Order(20, batch_size=6, seed=1))
    batch = data.batch(2)
    out = jax.jit(gather)(jax.tree.map(jnp.asarray, data.arrays), batch)
    assert out["image"].dtype == jnp.uint8 and out["label"].dtype == jnp.int32
    np.testing.assert_array_equal(out["image"], images[batch["index"]])
    np.testing.assert_array_equal(out["label"], labels[batch["index"]])
    np.testing.assert_array_equal(out["epoch"], batch["epoch"])


def test_gather_leaves_a_streamed_batch_as_it_is():
    images, labels = images_and_labels(5)
    batch = {"image": images, "label": labels, "index": np.arange(5)}
    out = gather({}, batch)
    assert out.keys() == batch.keys() and all(out[name] is batch[name] for name in batch)


def test_it_says_what_memory_it_takes():
    data = Resident(np.zeros((2**10, 64, 16, 2), np.uint8), np.zeros(2**10, np.int64))
    assert data.describe() == "on the devices, decoded, 2 MiB"


@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("shape", [(3, 5, 3), (64, 64, 1)])
def test_cpu_devices_share_the_memory_of_a_split(count, shape):
    options = {"image_shape": shape, "num_classes": 3, "num_examples": count}
    images, _ = loader.materialize(open_source("fake", "train", **options))
    place, expected = images.ctypes.data, images.copy()
    array = sharding.replicate(sharding.make_mesh(), images)
    shards = array.addressable_shards
    assert [shard.data.unsafe_buffer_pointer() for shard in shards] == [place] * 8
    assert sharding.copies(array) == 1
    del images
    gc.collect()
    np.testing.assert_array_equal(array, expected)


def misaligned(shape):
    """Memory that XLA can't use as it is."""
    memory = np.empty(np.prod(shape) + 64, np.uint8)
    start = -memory.ctypes.data % 64 + 1
    return memory[start:][: np.prod(shape)].reshape(shape)


def test_it_is_said_how_many_copies_the_devices_hold(tiny_config, monkeypatch):
    config, mesh = tiny_config(data__num_examples=2**14), sharding.make_mesh()

    def said():
        with Program.open(build.make_experiment(config, mesh)) as program:
            return program.describe_input()

    assert said() == "on the devices, decoded, 1 MiB"
    monkeypatch.setattr(loader, "_empty", misaligned)
    assert said() == "on the devices, decoded, 1 MiB on each of 8 devices"
    config.input.mode = "stream"
    assert said().startswith("streamed by")


def test_channel_statistics_equal_float64():
    images = np.random.default_rng(0).integers(0, 200, (1100, 5, 3, 3), np.uint8)
    images[..., 2] = 7
    mean, std = channel_statistics(images)
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, scaled.std(axis=(0, 1, 2)), rtol=1e-12, atol=1e-13)
    assert std[2] == 0
