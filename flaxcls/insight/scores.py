"""How good predictions are: confusion, precision and recall, and what the probabilities are worth.

Class metrics are scikit-learn's with `zero_division=0`. Everything is computed on the host.
"""

from typing import Any, NamedTuple

import numpy as np

from flaxcls.errors import DivergedError
from flaxcls.inference.predictions import SplitPredictions

BINS = 15  # of the confidence, for the calibration error
_ROWS = 4096  # at a time, so that what is computed in float64 takes little memory


class Judged(NamedTuple):
    """What each of N predictions is worth, [N]; all that metrics and their intervals need.

    Attributes:
      num_classes: K.
      labels: int64, the truth.
      best: int64, the class with the largest logit, the first of equal ones.
      rank: int64, how many classes come before the label's; 0 is right.
      confidence: float64, the probability of the best class.
      own: float64, the probability of the label's class.
      nll: float64, -log of that; exact also where it is rounded to 0, if it is a softmax.
      brier: float64, sum_k (p_k - [k is the label])^2 (Brier 1950): from 0 to 2.
    """

    num_classes: int
    labels: np.ndarray
    best: np.ndarray
    rank: np.ndarray
    confidence: np.ndarray
    own: np.ndarray
    nll: np.ndarray
    brier: np.ndarray

    def of(self, examples: np.ndarray) -> "Judged":
        """Some of the examples, by their indices."""
        return Judged(self.num_classes, *(array[examples] for array in self[1:]))


def judge(predictions: SplitPredictions, outputs: str) -> Judged:
    """What each prediction is worth.

    Args:
      predictions: of a split.
      outputs: what the logits mean, see `core.losses.outputs_of`.

    Raises DivergedError for outputs that are not finite.
    """
    logits, probabilities, labels = predictions
    finite = np.isfinite(logits).all(axis=1) & np.isfinite(probabilities).all(axis=1)
    if not finite.all():
        raise DivergedError(
            f"the network's outputs for {np.count_nonzero(~finite):,} of {len(labels):,} examples "
            "are not finite"
        )
    parts = [
        _judge_rows(logits[rows], probabilities[rows], labels[rows].astype(np.int64), outputs)
        for rows in (slice(n, n + _ROWS) for n in range(0, len(labels), _ROWS))
    ]
    return Judged(logits.shape[1], *map(np.concatenate, zip(*parts, strict=True)))


def _judge_rows(
    logits: np.ndarray, probabilities: np.ndarray, labels: np.ndarray, outputs: str
) -> tuple[np.ndarray, ...]:
    rows = np.arange(len(labels))
    best, own_logit = logits.argmax(axis=1), logits[rows, labels][:, None]
    equal_before = (logits == own_logit) & (np.arange(logits.shape[1]) < labels[:, None])
    rank = np.count_nonzero((logits > own_logit) | equal_before, axis=1)
    exact = probabilities.astype(np.float64)
    own = exact[rows, labels]
    brier = np.square(exact).sum(axis=1) - 2 * own + 1
    if outputs == "softmax_cross_entropy":
        wide = logits.astype(np.float64)
        top = wide.max(axis=1)
        log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
        nll = log_sum - wide[rows, labels]
    else:
        nll = -np.log(own.clip(np.finfo(np.float32).tiny))
    return labels, best, rank, exact[rows, best], own, nll, brier


def confusion(judged: Judged, weights: np.ndarray | None = None) -> np.ndarray:
    """How many examples of each class (row) were taken for each class (column), [K, K]."""
    size = judged.num_classes
    pairs = judged.labels * size + judged.best
    return np.bincount(pairs, weights, minlength=size * size).reshape(size, size)


class ClassScores(NamedTuple):
    """Of each class [K]; a quotient of nothing by nothing is 0, as with zero_division=0.

    `recall` is what others call the accuracy of a class.
    """

    count: np.ndarray  # examples that show it
    predicted: np.ndarray  # examples taken for it
    right: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    f1: np.ndarray


def class_scores(judged: Judged, weights: np.ndarray | None = None) -> ClassScores:
    """Precision, recall and F1 of each class.

    `weights` is how often each example counts, float [N]; None: once.
    """
    weights = np.ones(len(judged.labels)) if weights is None else weights

    def total(classes: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(classes, values, minlength=judged.num_classes)

    count, predicted = total(judged.labels, weights), total(judged.best, weights)
    right = total(judged.labels, weights * (judged.rank == 0))
    return ClassScores(
        count=count,
        predicted=predicted,
        right=right,
        recall=_divided(right, count),
        precision=_divided(right, predicted),
        f1=_divided(2 * right, count + predicted),
    )


def worst_first(scores: ClassScores) -> np.ndarray:
    """The classes that have examples, by their recall and then their F1, the lowest first."""
    there = np.flatnonzero(scores.count)
    return there[np.lexsort((scores.f1[there], scores.recall[there]))]


def confident_mistakes(judged: Judged) -> np.ndarray:
    """The indices of the examples that are wrong, the one with the largest confidence first."""
    wrong = np.flatnonzero(judged.rank > 0)
    return wrong[np.argsort(-judged.confidence[wrong], kind="stable")]


def _divided(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return numerator / np.maximum(denominator, 1)


def averages(scores: ClassScores) -> dict[str, float]:
    """{"balanced_accuracy", "macro_precision", "macro_recall", "macro_f1"}: means over classes.

    Balanced accuracy is the mean recall of the classes that have examples; the others are over
    those that have examples or predictions.
    """
    shown, there = scores.count > 0, scores.count + scores.predicted > 0
    return {
        "balanced_accuracy": float(scores.recall[shown].mean()),
        "macro_precision": float(scores.precision[there].mean()),
        "macro_recall": float(scores.recall[there].mean()),
        "macro_f1": float(scores.f1[there].mean()),
    }


def metrics(judged: Judged) -> dict[str, Any]:
    """Every metric of some predictions, by its name; "accuracy_top5" from 11 classes on."""
    top5 = {"accuracy_top5": float(np.mean(judged.rank < 5))} if judged.num_classes > 10 else {}
    return {
        "count": len(judged.labels),
        "accuracy": float(np.mean(judged.rank == 0)),
        **top5,
        **averages(class_scores(judged)),
        **probability_metrics(judged),
    }


def probability_metrics(judged: Judged) -> dict[str, float]:
    """{"nll", "brier", "ece", "ece_adaptive"}: what the probabilities are worth."""
    return {
        "nll": float(judged.nll.mean()),
        "brier": float(judged.brier.mean()),
        "ece": reliability(judged).error,
        "ece_adaptive": reliability(judged, adaptive=True).error,
    }


class Reliability(NamedTuple):
    """A reliability diagram: of each bin how many examples, their confidence and their accuracy.

    `error` is the expected calibration error, sum_b count_b / N |accuracy_b - confidence_b|.
    """

    error: float
    count: np.ndarray  # int64 [B]
    confidence: np.ndarray  # float64 [B], the mean; 0 where the bin is empty
    accuracy: np.ndarray


def reliability(judged: Judged, bins: int = BINS, adaptive: bool = False) -> Reliability:
    """The expected calibration error of the best class and the bins that it is a sum over.

    The bins of the confidence are (0, 1/B], (1/B, 2/B], ... as in Guo et al. 2017
    (arXiv:1706.04599, equation 3); adaptive ones hold as many examples each, but for one (Nguyen &
    O'Connor 2015, arXiv:1508.05154).
    """
    if adaptive:
        place = np.empty(len(judged.labels), np.int64)
        order = np.argsort(judged.confidence, kind="stable")
        place[order] = np.arange(len(order)) * bins // len(order)
    else:
        edges = np.linspace(0, 1, bins + 1)
        place = np.searchsorted(edges[1:-1], judged.confidence, side="left")

    def total(values: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(place, values, minlength=bins)

    count, confidence, right = total(), total(judged.confidence), total(judged.rank == 0)
    return Reliability(
        error=float(np.abs(right - confidence).sum() / len(judged.labels)),
        count=count,
        confidence=_divided(confidence, count),
        accuracy=_divided(right, count),
    )
