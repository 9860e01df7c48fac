"""The order of training is a fixed, resumable permutation; evaluation counts every example once."""

import hashlib

import numpy as np
import pytest

from flaxcls.data.order import ClassOrder, Order, epoch_order, evaluation_batches
from flaxcls.errors import ConfigError, DataError

SIZES = [(97, 10), (12, 12), (13, 5), (5, 13), (7, 1)]  # (examples, batch size)


def positions(order, steps):
    """The index and the epoch of every position of the first batches."""
    batches = [order.batch(step) for step in range(steps)]
    assert all(column.dtype == np.int32 for batch in batches for column in batch.values())
    return [np.concatenate([batch[name] for batch in batches]) for name in ("index", "epoch")]


@pytest.mark.parametrize("size, batch_size", SIZES)
def test_every_example_comes_once_an_epoch(size, batch_size):
    index, epoch = positions(Order(size, batch_size=batch_size, seed=0), -(-size * 4 // batch_size))
    np.testing.assert_array_equal(epoch, np.arange(len(epoch)) // size)
    for number in range(4):
        np.testing.assert_array_equal(np.sort(index[epoch == number]), np.arange(size))


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("size, batch_size", SIZES)
def test_repeated_examples_come_in_a_row(size, batch_size, repeats):
    plain, _ = positions(Order(size, batch_size=batch_size, seed=4), 40)
    order = Order(size, batch_size=batch_size, seed=4, repeats=repeats)
    index, epoch = positions(order, 40)
    np.testing.assert_array_equal(index, np.repeat(plain, repeats)[: len(index)])
    np.testing.assert_array_equal(epoch, np.arange(len(epoch)) // (repeats * size))


def test_order_differs_between_epochs_and_seeds():
    orders = [epoch_order(50, seed, epoch) for seed in (0, 1, -1) for epoch in range(5)]
    assert len({order.tobytes() for order in orders}) == 15
    assert not np.array_equal(epoch_order(50, 0, 0), np.arange(50))


def test_order_and_draws_are_the_same_for_ever():
    order = np.concatenate([epoch_order(1000, 42, 0), epoch_order(1000, 2**64 - 1, 7)])
    assert hashlib.sha256(order.astype("<i4").tobytes()).hexdigest()[:16] == "7f298dc908c28472"
    draws = Order(10, batch_size=6, seed=42).draws(3, 24)
    assert hashlib.sha256(draws.astype("<f8").tobytes()).hexdigest()[:16] == "2162dcd8b321589e"


def test_order_is_uniform_over_epochs():
    first = np.array([epoch_order(4, 3, epoch)[0] for epoch in range(2000)])
    assert np.abs(np.bincount(first) - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)


def test_batch_depends_on_seed_and_step_alone():
    forward, fresh = (Order(23, batch_size=4, seed=5) for _ in range(2))
    expected = [forward.batch(step) | {"draws": forward.draws(step, 4)} for step in range(30)]
    for step in (29, 3, 17, 0, 29):
        actual = fresh.batch(step) | {"draws": fresh.draws(step, 4)}
        assert actual.keys() == expected[step].keys()
        for name, column in actual.items():
            np.testing.assert_array_equal(column, expected[step][name])


def test_late_steps_do_not_overflow():
    order = Order(10, batch_size=4, seed=0)
    batch = order.batch(10**9)  # its positions are beyond int32
    np.testing.assert_array_equal(batch["epoch"], np.full(4, 4 * 10**8))
    np.testing.assert_array_equal(batch["index"], epoch_order(10, 0, 4 * 10**8)[:4])
    order = Order(1000, batch_size=2**11, seed=0)
    steps = (0, 10**9, 10**9 + 1, 10**12)  # the last one's words are beyond 2**53
    late = [order.draws(step, 24) for step in steps]
    assert len({draws.tobytes() for draws in late}) == len(late)
    assert order.batch(10**9)["epoch"][-1] == (2**11 * (10**9 + 1) - 1) // 1000


def test_draws_are_one_stream_cut_into_batches():
    large = Order(10, batch_size=12, seed=7)
    small = Order(99, batch_size=3, seed=7)
    expected = np.concatenate([large.draws(step, 8) for step in range(2)])
    actual = np.concatenate([small.draws(step, 8) for step in range(8)])
    np.testing.assert_array_equal(actual, expected)
    assert expected.shape == (24, 8) and expected.dtype == np.float64
    assert len(np.unique(expected)) == expected.size


def test_no_draws_cost_nothing():
    assert Order(10, batch_size=3, seed=7).draws(5, 0).shape == (3, 0)


@pytest.mark.parametrize("seed", [0, 1, 2**63, -1])
def test_draws_are_uniform_and_independent(seed):
    stats = pytest.importorskip("scipy.stats")
    draws = np.concatenate([Order(9, batch_size=50, seed=seed).draws(s, 24) for s in range(100)])
    assert draws.min() >= 0 and draws.max() < 1
    assert stats.kstest(draws.ravel(), "uniform").pvalue > 1e-4
    assert all(stats.kstest(column, "uniform").pvalue > 1e-5 for column in draws.T)
    # Neighbours, in a row and below each other, tell nothing of each other: sd is 1 / sqrt(n).
    for first, second in ((draws[:, :-1], draws[:, 1:]), (draws[:-1], draws[1:])):
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 5 / np.sqrt(first.size)


def test_draws_have_nothing_in_common_with_the_order_or_other_seeds():
    draws = [Order(9, batch_size=50, seed=seed).draws(0, 4).ravel() for seed in (0, 1, -1)]
    epochs = [np.random.Philox(key=[0, epoch]).random_raw(200) for epoch in range(3)]
    numbers = np.concatenate([*draws, *((words >> 11) * 2.0**-53 for words in epochs)])
    assert len(np.unique(numbers)) == len(numbers)


@pytest.mark.parametrize("size, batch_size", [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_evaluation_counts_every_example_once(size, batch_size):
    batches = list(evaluation_batches(size, batch_size))
    assert len(batches) == -(-size // batch_size)
    assert all(b["index"].shape == b["mask"].shape == (batch_size,) for b in batches)
    index = np.concatenate([batch["index"] for batch in batches])
    mask = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(index[mask == 1], np.arange(size))
    assert not index[mask == 0].any() and set(mask) <= {0, 1}


def test_batch_size_must_be_positive():
    with pytest.raises(ConfigError, match="`batch_size` must be at least 1, got 0"):
        Order(5, batch_size=0, seed=0)


COUNTS = (40, 9, 3, 1)  # of the examples of each class, in a mixed order
CLASS_LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))


def class_order(power=0.0, batch_size=8, seed=5, repeats=1, labels=CLASS_LABELS):
    return ClassOrder(
        len(labels),
        lambda: labels,
        4,
        power=power,
        batch_size=batch_size,
        seed=seed,
        repeats=repeats,
    )


@pytest.mark.parametrize(
    ("power", "quotas"), [(0.0, (14, 13, 13, 13)), (0.5, (28, 13, 8, 4)), (1.0, COUNTS)]
)
def test_every_epoch_draws_the_same_number_of_each_class(power, quotas):
    index, _ = positions(class_order(power), 60)  # of 53 positions an epoch
    for epoch in range(60 * 8 // 53):
        labels = CLASS_LABELS[index[epoch * 53 : (epoch + 1) * 53]]
        np.testing.assert_array_equal(np.bincount(labels), quotas)


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_no_example_comes_again_before_all_others_of_its_class(power):
    size = len(CLASS_LABELS)
    index, turn = positions(class_order(power, batch_size=size), 40)
    for label, count in enumerate(COUNTS):
        own = np.flatnonzero(label == CLASS_LABELS)
        of_class = CLASS_LABELS[index] == label
        drawn, turns = index[of_class], turn[of_class]
        np.testing.assert_array_equal(turns, np.arange(len(drawn)) // count)
        for number in range(len(drawn) // count):
            np.testing.assert_array_equal(np.sort(drawn[turns == number]), own)


def test_class_order_depends_on_seed_and_step_alone():
    forward = class_order()
    expected = [forward.batch(step) for step in range(30)]
    for step in (29, 3, 17, 0, 29):
        for name, column in class_order().batch(step).items():
            np.testing.assert_array_equal(column, expected[step][name])
    assert not np.array_equal(class_order(seed=6).batch(0)["index"], expected[0]["index"])
    late = class_order().batch(10**8)
    assert late["index"].shape == (8,) and late["epoch"].min() > 0
    digest = hashlib.sha256(np.concatenate([b["index"] for b in expected]).astype("<i4").tobytes())
    assert digest.hexdigest()[:16] == "af23e4d4ce96bdfa"  # the same for ever


def test_class_order_of_an_epoch_is_shuffled_and_repeats_in_a_row():
    index, _ = positions(class_order(), 12)
    repeated, _ = positions(class_order(repeats=2), 24)
    np.testing.assert_array_equal(repeated, np.repeat(index, 2))
    labels = CLASS_LABELS[np.concatenate([class_order().batch(s)["index"] for s in range(200)])]
    shares = np.bincount(labels[::8], minlength=4) / 200  # of the first of each batch
    assert np.abs(shares - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 200)


def test_class_order_reads_labels_with_the_first_batch_and_needs_all_classes():
    order = class_order(labels=np.array([0, 1, 3, 3]))
    with pytest.raises(DataError, match=r"config\.sampling needs examples of every class; 2 has"):
        order.batch(0)
