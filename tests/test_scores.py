"""Scores of predictions: scikit-learn's figures, and intervals that hold what they should."""

import jax
import numpy as np
import pytest
from sklearn import metrics as reference

from flaxcls.core.metrics import rank_of_label
from flaxcls.errors import DivergedError
from flaxcls.inference.predictions import SplitPredictions, probabilities_of
from flaxcls.insight.intervals import differences, intervals, wilson
from flaxcls.insight.scores import (
    class_scores,
    confident_mistakes,
    confusion,
    judge,
    metrics,
    reliability,
    worst_first,
)
from flaxcls.insight.temperature import fit_temperature, scaled, stratified_parts

SOFTMAX, SIGMOID = "softmax_cross_entropy", "sigmoid_cross_entropy"


def made_up(count, classes, *, seed=0, margin=2.0, absent=()):
    """Logits that are right more often than not, and labels of all classes but some."""
    random = np.random.default_rng(seed)
    shown = np.setdiff1d(np.arange(classes), absent)
    labels = random.choice(shown, count).astype(np.int32)
    logits = random.normal(size=(count, classes)).astype(np.float32)
    logits[np.arange(count), labels] += margin
    return SplitPredictions(logits, probabilities_of(logits, SOFTMAX), labels)


PREDICTIONS = made_up(700, 12, absent=(3,))
JUDGED = judge(PREDICTIONS, SOFTMAX)


def test_metrics_are_those_of_scikit_learn():
    logits, probabilities, labels = PREDICTIONS
    best, found = logits.argmax(axis=1), metrics(JUDGED)
    exact = probabilities.astype(float)
    exact /= exact.sum(axis=1, keepdims=True)
    precision, recall, f1, _ = reference.precision_recall_fscore_support(
        labels, best, average="macro", zero_division=0
    )
    assert {3} < {*best} and 3 not in labels  # a class without examples that is predicted
    shown = np.unique(labels)
    expected = {
        "count": 700,
        "accuracy": reference.accuracy_score(labels, best),
        "accuracy_top5": reference.top_k_accuracy_score(labels, logits, k=5, labels=range(12)),
        "balanced_accuracy": np.mean([np.mean(best[labels == k] == k) for k in shown]),
        "macro_precision": precision,
        "macro_recall": recall,
        "macro_f1": f1,
        "nll": reference.log_loss(labels, exact, labels=range(12)),
        "brier": np.mean(np.sum((probabilities - np.eye(12)[labels]) ** 2, axis=1)),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name
    np.testing.assert_array_equal(
        confusion(JUDGED), reference.confusion_matrix(labels, best, labels=range(12))
    )
    np.testing.assert_array_equal(JUDGED.rank, jax.device_get(rank_of_label(logits, labels)))


def test_scores_of_classes_are_those_of_scikit_learn():
    best, labels = JUDGED.best, JUDGED.labels
    precision, recall, f1, count = reference.precision_recall_fscore_support(
        labels, best, labels=range(12), zero_division=0
    )
    found = class_scores(JUDGED)
    for name, value in {"precision": precision, "recall": recall, "f1": f1, "count": count}.items():
        np.testing.assert_allclose(getattr(found, name), value, err_msg=name)
    order = worst_first(found)
    assert sorted(order) == [k for k in range(12) if k != 3]
    assert (np.diff(recall[order]) >= 0).all()


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_is_the_sum_over_bins_that_its_definition_names(bins):
    confidence, right = JUDGED.confidence, JUDGED.labels == JUDGED.best
    error = 0.0
    for low, high in zip(np.arange(bins) / bins, np.arange(1, bins + 1) / bins, strict=True):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            error += inside.mean() * gap
    found = reliability(JUDGED, bins)
    assert found.error == pytest.approx(error, abs=1e-12) and found.error > 0.05
    assert found.count.sum() == 700
    adaptive = reliability(JUDGED, bins, adaptive=True)
    assert np.ptp(adaptive.count) <= 1
    assert adaptive.error == pytest.approx(
        sum(
            len(part) / 700 * abs(right[part].mean() - confidence[part].mean())
            for part in np.array_split(np.argsort(confidence, kind="stable"), bins)
        ),
        abs=0.01,  # which of the parts have one more differs
    )


def test_confidence_at_the_edge_of_two_bins_is_in_the_lower_one():
    """0.25, 0.5 and 0.75 are edges that floating point has exactly; of fifteenths it has none."""
    probabilities = np.float32([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0], [0.75, 0.25, 0, 0]])
    logits = np.log(probabilities + np.float32(1e-9))
    judged = judge(SplitPredictions(logits, probabilities, np.int32([0, 0, 1])), SOFTMAX)
    found = reliability(judged, bins=4)
    assert found.count.tolist() == [1, 1, 1, 0]
    assert found.confidence.tolist() == [0.25, 0.5, 0.75, 0]
    assert found.error == pytest.approx((0.75 + 0.5 + 0.75) / 3)


def test_calibration_error_of_certain_answers_is_their_share_of_mistakes():
    certain = np.float32(1e3) * np.eye(4, dtype=np.float32)[[0, 1, 2, 3]]
    labels = np.array([0, 1, 2, 0])
    judged = judge(SplitPredictions(certain, probabilities_of(certain, SOFTMAX), labels), SOFTMAX)
    assert reliability(judged).error == 0.25 and reliability(judged).count[-1] == 4
    assert metrics(judged)["nll"] == 250  # though the probability is rounded to 0
    assert confident_mistakes(judged).tolist() == [3]


def test_sigmoids_are_judged_by_the_probability_of_the_label():
    logits = PREDICTIONS.logits
    predictions = PREDICTIONS._replace(probabilities=probabilities_of(logits, SIGMOID))
    judged = judge(predictions, SIGMOID)
    own = 1 / (1 + np.exp(-logits[np.arange(700), PREDICTIONS.labels].astype(float)))
    np.testing.assert_allclose(judged.nll, -np.log(own), rtol=1e-4, atol=1e-6)


def test_outputs_that_are_not_finite_are_no_predictions():
    broken = PREDICTIONS.logits.copy()
    broken[[4, 9], 3] = np.nan
    with pytest.raises(DivergedError, match="for 2 of 700 examples are not finite"):
        judge(PREDICTIONS._replace(logits=broken), SOFTMAX)


def test_wilson_interval_is_that_of_scipy():
    from scipy.stats import binomtest

    for right, count in ((0, 5), (5, 5), (355, 360), (7, 20)):
        expected = binomtest(right, count).proportion_ci(method="wilson")
        np.testing.assert_allclose(wilson(right, count), tuple(expected), atol=1e-9)
    assert wilson(0, 0) == pytest.approx((0, 1))


def test_intervals_hold_the_metrics_are_seeded_and_narrow_with_more_examples():
    found, again = intervals(JUDGED, resamples=300), intervals(JUDGED, resamples=300)
    assert found == again != intervals(JUDGED, resamples=300, seed=1)
    values = metrics(JUDGED)
    assert found.keys() == values.keys() - {"count", "ece", "ece_adaptive"}
    for name, (low, high) in found.items():
        assert low < values[name] < high, name
    more = intervals(judge(made_up(7000, 12), SOFTMAX), resamples=300)
    for name, (low, high) in more.items():
        assert high - low < 0.6 * (found[name][1] - found[name][0]), name


def test_bootstrap_has_the_width_of_the_normal_distribution():
    low, high = intervals(JUDGED)["nll"]
    expected = 2 * 1.96 * JUDGED.nll.std() / np.sqrt(700)
    assert high - low == pytest.approx(expected, rel=0.1)


def test_paired_difference_is_narrower_than_that_of_two_samples():
    """Of networks that are wrong on the same examples: what is hard for both cancels out."""
    random = np.random.default_rng(5)
    noise = random.normal(scale=0.1, size=PREDICTIONS.logits.shape).astype(np.float32)
    logits = PREDICTIONS.logits + noise
    other = judge(
        SplitPredictions(logits, probabilities_of(logits, SOFTMAX), JUDGED.labels), SOFTMAX
    )
    found = differences(JUDGED, other)["accuracy"]
    assert found.value == pytest.approx(metrics(JUDGED)["accuracy"] - metrics(other)["accuracy"])
    paired = np.std((JUDGED.rank == 0).astype(float) - (other.rank == 0)) / np.sqrt(700)
    width = found.interval[1] - found.interval[0]
    assert width == pytest.approx(2 * 1.96 * paired, rel=0.15)
    apart = intervals(JUDGED)["accuracy"]
    assert width < 0.6 * (apart[1] - apart[0])
    nothing = differences(JUDGED, JUDGED)["nll"]
    assert (nothing.value, nothing.interval, nothing.is_clear) == (0, (0, 0), False)
    worse = differences(JUDGED, judge(made_up(700, 12, absent=(3,), margin=0.5), SOFTMAX))
    assert worse["accuracy"].is_clear and worse["accuracy"].value > 0


@pytest.mark.parametrize("outputs", [SOFTMAX, SIGMOID])
@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_temperature_that_was_hidden_is_found(outputs, temperature):
    """Labels are drawn from the network's own probabilities, and its logits then multiplied."""
    random = np.random.default_rng(1)
    logits = random.normal(scale=2, size=(20_000, 5)).astype(np.float32)
    if outputs == SOFTMAX:
        labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1)
        found = fit_temperature(logits * temperature, labels, outputs)
        assert found == pytest.approx(temperature, rel=0.03)
        predictions = SplitPredictions(
            logits * temperature, probabilities_of(logits * temperature, outputs), labels
        )
        after = judge(scaled(predictions, found, outputs), outputs)
        assert reliability(after).error < 0.015
    else:  # where several classes may be there, the likelihood of one of them says less
        labels = logits.argmax(axis=1)
        found = fit_temperature(logits * temperature, labels, outputs)
        assert found == pytest.approx(
            temperature * fit_temperature(logits, labels, outputs), rel=0.01
        )


def test_temperature_is_that_of_scikit_learn():
    calibration = pytest.importorskip("sklearn.calibration")
    if not hasattr(calibration, "_TemperatureScaling"):
        pytest.skip("needs scikit-learn 1.8")
    _, _, labels = predictions = made_up(5000, 6, margin=3.0)
    reference = calibration._TemperatureScaling().fit(predictions.logits.astype(float), labels)
    found = fit_temperature(predictions.logits, labels, SOFTMAX)
    assert found == pytest.approx(1 / reference.beta_, rel=1e-2) and abs(found - 1) > 0.02


def test_network_without_a_mistake_does_not_become_certain():
    logits = np.float32(4) * np.eye(3, dtype=np.float32)[np.arange(60) % 3]
    found = fit_temperature(logits, np.arange(60) % 3, SOFTMAX)
    assert 0.2 < found < 1
    assert fit_temperature(logits, np.arange(60) % 3, "squared_error") == 1


@pytest.mark.parametrize("count", [2, 3])
def test_parts_are_a_stratified_partition(count):
    labels = np.repeat([0, 1, 2, 5], [30, 7, 1, 62])
    parts = stratified_parts(labels, count)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(100))
    assert np.ptp([len(part) for part in parts]) <= 1
    for label in (0, 1, 2, 5):
        assert np.ptp([np.count_nonzero(labels[part] == label) for part in parts]) <= 1
    again, other = stratified_parts(labels, count), stratified_parts(labels, count, seed=1)
    assert all(map(np.array_equal, parts, again)) and not all(map(np.array_equal, parts, other))
