"""The order of training is a fixed, resumable permutation; evaluation counts every example once."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls.data.resident import (
    Resident,
    channel_statistics,
    epoch_order,
    evaluation_batches,
    gather,
)
from flaxcls.errors import ConfigError


def resident(size, batch_size, seed=0):
    images = np.zeros((size, 1, 1, 1), np.uint8)
    return Resident(images, np.zeros(size, np.int64), batch_size=batch_size, seed=seed)


@pytest.mark.parametrize("size, batch_size", [(97, 10), (12, 12), (13, 5), (5, 13), (7, 1)])
def test_every_example_comes_once_an_epoch(size, batch_size):
    data = resident(size, batch_size)
    batches = [data.batch(step) for step in range(-(-size * 4 // batch_size))]
    index = np.concatenate([batch["index"] for batch in batches])
    epoch = np.concatenate([batch["epoch"] for batch in batches])
    assert index.dtype == epoch.dtype == np.int32
    np.testing.assert_array_equal(epoch, np.arange(len(epoch)) // size)
    for number in range(4):
        np.testing.assert_array_equal(np.sort(index[epoch == number]), np.arange(size))


def test_order_differs_between_epochs_and_seeds():
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1, -1) for epoch in range(5)]
    assert len({order.tobytes() for order in orders}) == 15
    assert not np.array_equal(epoch_order(50, 0, 0), np.arange(50))


def test_order_is_the_same_for_ever():
    order = np.concatenate([epoch_order(1000, 42, 0), epoch_order(1000, 2**64 - 1, 7)])
    assert hashlib.sha256(order.astype("<i4").tobytes()).hexdigest()[:16] == "7f298dc908c28472"


def test_positions_are_uniform_over_epochs():
    first = np.array([epoch_order(4, 3, epoch)[0] for epoch in range(2000)])
    assert np.abs(np.bincount(first) - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_batch_depends_on_seed_and_step_alone():
    forward, fresh = resident(23, 4, seed=5), resident(23, 4, seed=5)
    expected = [forward.batch(step) for step in range(30)]
    for step in (29, 3, 17, 0, 29):
        jax.tree.map(np.testing.assert_array_equal, fresh.batch(step), expected[step])


def test_late_steps_do_not_overflow():
    batch = resident(10, 4).batch(10**9)  # its positions are beyond int32
    np.testing.assert_array_equal(batch["epoch"], np.full(4, 4 * 10**8))
    np.testing.assert_array_equal(batch["index"], epoch_order(10, 0, 4 * 10**8)[:4])


@pytest.mark.parametrize("size, batch_size", [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_evaluation_counts_every_example_once(size, batch_size):
    batches = list(evaluation_batches(size, batch_size))
    assert len(batches) == -(-size // batch_size)
    assert all(b["index"].shape == b["mask"].shape == (batch_size,) for b in batches)
    index = np.concatenate([batch["index"] for batch in batches])
    mask = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(index[mask == 1], np.arange(size))
    assert not index[mask == 0].any() and set(mask) <= {0, 1}


def test_gather_takes_the_examples_inside_jit():
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 2, 3), np.uint8)
    labels = np.arange(20)
    data = Resident(images, labels, batch_size=6, seed=1)
    batch = data.batch(2)
    out = jax.jit(gather)(jax.tree.map(jnp.asarray, data.arrays), batch)
    assert out["image"].dtype == jnp.uint8 and out["label"].dtype == jnp.int32
    np.testing.assert_array_equal(out["image"], images[batch["index"]])
    np.testing.assert_array_equal(out["label"], labels[batch["index"]])
    np.testing.assert_array_equal(out["epoch"], batch["epoch"])


def test_channel_statistics_equal_float64():
    images = np.random.default_rng(0).integers(0, 200, (1100, 5, 3, 3), np.uint8)
    images[..., 2] = 7
    mean, std = channel_statistics(images)
    scaled = images.astype(np.float64) / 255
    np.testing.assert_allclose(mean, scaled.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(std, scaled.std(axis=(0, 1, 2)), rtol=1e-12, atol=1e-13)
    assert std[2] == 0


def test_batch_size_must_be_positive():
    with pytest.raises(ConfigError, match="`batch_size` must be at least 1, got 0"):
        resident(5, 0)
