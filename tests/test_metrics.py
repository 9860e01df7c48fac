import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls.core import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(40, 12)).astype(np.float32)
LABELS = RNG.integers(12, size=40).astype(np.int32)
LOSSES = RNG.uniform(size=40).astype(np.float32)
WEIGHTS = RNG.uniform(0.5, 2, size=40).astype(np.float32)


def of(part=slice(None), targets=LABELS, logits=LOGITS, mask=None):
    return metrics.classification_metrics(
        jnp.asarray(logits[part]),
        jnp.asarray(targets[part]),
        jnp.asarray(LOSSES[part]),
        jnp.asarray(WEIGHTS[part]),
        None if mask is None else jnp.asarray(mask[part]),
    )


def test_accuracies_equal_scikit_learn_and_the_loss_its_weighted_mean():
    sklearn = pytest.importorskip("sklearn.metrics")
    result = metrics.compute(of())
    assert result.keys() == {"loss", "accuracy", "accuracy_top5"}
    assert result["accuracy"] == sklearn.accuracy_score(LABELS, LOGITS.argmax(1))
    expected = sklearn.top_k_accuracy_score(LABELS, LOGITS, k=5, labels=np.arange(12))
    assert result["accuracy_top5"] == expected
    assert result["loss"] == pytest.approx(np.average(LOSSES, weights=WEIGHTS), rel=1e-6)


def test_soft_targets_count_as_their_largest_entry():
    soft = np.eye(12, dtype=np.float32)[LABELS] * 0.6 + 0.4 / 12
    assert metrics.compute(of(targets=soft)) == metrics.compute(of())


def test_batches_of_any_size_add_up_to_the_whole():
    total = metrics.zeros_like(jax.eval_shape(of))
    for start, stop in [(0, 1), (1, 30), (30, 40)]:
        total = metrics.add(total, of(slice(start, stop)))
    result, expected = metrics.compute(total), metrics.compute(of())
    assert result["accuracy"] == expected["accuracy"]
    assert result["accuracy_top5"] == expected["accuracy_top5"]
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert total["accuracy"][0].dtype == total["accuracy"][1].dtype == jnp.int32


@pytest.mark.parametrize("dtype", [bool, np.float32, np.int32])
def test_masked_examples_count_nowhere_even_with_nan(dtype):
    mask = (np.arange(40) < 33).astype(dtype)
    logits, losses = LOGITS.copy(), LOSSES.copy()
    logits[33:], losses[33:] = np.nan, np.nan
    actual = metrics.classification_metrics(logits, LABELS, losses, WEIGHTS, jnp.asarray(mask))
    assert metrics.compute(actual) == pytest.approx(metrics.compute(of(slice(33))), rel=1e-6)
    assert int(actual["accuracy"][1]) == 33


def test_a_row_with_nan_is_never_right():
    logits = np.tile(np.arange(12.0)[::-1], (3, 1))
    logits[1, 11] = np.nan
    logits[2, 0] = np.nan
    rank = metrics.rank_of_label(jnp.asarray(logits), jnp.zeros(3, jnp.int32))
    np.testing.assert_array_equal(rank, [0, 12, 12])


def test_equal_logits_are_ranked_as_argmax_ranks_them():
    labels = jnp.arange(12)
    np.testing.assert_array_equal(metrics.rank_of_label(jnp.zeros((12, 12)), labels), labels)
    logits = RNG.integers(0, 3, size=(200, 12)).astype(np.float32)
    labels = RNG.integers(12, size=200)
    right = metrics.rank_of_label(jnp.asarray(logits), jnp.asarray(labels)) == 0
    np.testing.assert_array_equal(right, logits.argmax(1) == labels)


def test_infinite_logits_are_ranked():
    logits = jnp.array([[-np.inf, 0.0, np.inf]] * 3)
    np.testing.assert_array_equal(metrics.rank_of_label(logits, jnp.arange(3)), [2, 1, 0])


def test_a_label_out_of_range_is_never_right():
    labels = jnp.array([-1, 12])
    np.testing.assert_array_equal(metrics.rank_of_label(jnp.zeros((2, 12)), labels), [12, 12])


def test_top_5_is_left_out_where_it_says_little():
    result = of(targets=LABELS % 10, logits=LOGITS[:, :10])
    assert result.keys() == {"loss", "accuracy"}


def test_broken_images_are_a_sum_and_no_mean():
    pairs = {"broken_images": (jnp.int32(3), jnp.int32(50)), "loss": (jnp.float32(3), jnp.int32(2))}
    assert metrics.compute(pairs) == {"broken_images": 3, "loss": 1.5}
    assert metrics.compute({"broken_images": (jnp.int32(0), jnp.int32(0))})["broken_images"] == 0


def test_balanced_accuracy_equals_scikit_learn_over_batches():
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(3)
    logits, labels = random.normal(size=(60, 4)), random.choice(3, 60, p=(0.8, 0.15, 0.05))
    logits[np.arange(60), labels] += (labels == 0) * 2  # right on the large class
    mask = np.arange(60) < 50  # the others must not count; class 3 has no example
    pairs = [
        metrics.balanced_accuracy(jnp.asarray(logits[i]), jnp.asarray(labels[i]), mask[i])
        for i in np.split(np.arange(60), [13, 40])
    ]
    total = functools.reduce(metrics.add, ({"balanced": pair} for pair in pairs))
    expected = sklearn.recall_score(
        labels[:50], logits[:50].argmax(axis=1), labels=range(3), average="macro"
    )
    assert metrics.compute(total)["balanced"] == pytest.approx(expected, rel=1e-12)
    assert abs(expected - np.mean(logits[:50].argmax(axis=1) == labels[:50])) > 0.01


def test_a_mean_over_nothing_is_nan():
    result = metrics.compute(of(mask=np.zeros(40, bool)))
    assert all(np.isnan(value) for value in result.values())
    assert all(type(value) is float for value in result.values())
