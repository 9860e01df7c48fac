"""How far a metric could be from what it is here, by chance: intervals of 95 %."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxcls.insight.scores import Judged, averages, class_scores, metrics

RESAMPLES = 2000
_TAILS = (2.5, 97.5)  # percentiles
_Z = 1.959963984540054  # of the normal distribution, at 97.5 %

Interval = tuple[float, float]


def wilson(right: Any, count: Any) -> tuple[Any, Any]:
    """The interval of a share, `right` of `count`, of numbers or arrays (Wilson 1927).

    Unlike a bootstrap's it has a width also where nothing or everything is right. Of a count of 0
    it is (0, 1).
    """
    n = np.maximum(count, 1e-9)
    share, square = np.asarray(right) / n, _Z * _Z / n
    center = (share + square / 2) / (1 + square)
    half = np.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    low, high = np.clip(center - half, 0, 1), np.clip(center + half, 0, 1)
    return (low, high) if np.ndim(low) else (float(low), float(high))


def intervals(judged: Judged, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Interval]:
    """The interval of each metric of `scores.metrics` that has one, by its name.

    Accuracy's and top-5 accuracy's are Wilson's, the others a bootstrap's percentiles. Calibration
    errors have none: a resample's are larger than the sample's, so that the interval might not hold
    the error itself.
    """
    count = len(judged.labels)
    shares = {"accuracy": np.count_nonzero(judged.rank == 0)}
    if judged.num_classes > 10:
        shares["accuracy_top5"] = np.count_nonzero(judged.rank < 5)
    found = {name: wilson(k, count) for name, k in shares.items()}
    (resampled,) = _resampled([judged], seed, resamples)
    for name, values in resampled.items():
        found.setdefault(name, _percentiles(values))
    return found


class Difference(NamedTuple):
    """How much larger a metric is for one network than for another, on the same examples."""

    value: float
    interval: Interval

    @property
    def is_clear(self) -> bool:
        """Whether chance is a poor explanation: 0 is outside of the interval."""
        return not self.interval[0] <= 0 <= self.interval[1]


def differences(
    first: Judged, second: Judged, *, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, Difference]:
    """`first` minus `second` in each metric that a bootstrap is made of.

    It is paired: both are resampled alike, so what is hard for both cancels out. The labels must be
    the same.
    """
    if not np.array_equal(first.labels, second.labels):
        raise ValueError("the two are not about the same examples")
    ours, theirs = metrics(first), metrics(second)
    resampled = _resampled([first, second], seed, resamples)
    return {
        name: Difference(
            ours[name] - theirs[name], _percentiles(resampled[0][name] - resampled[1][name])
        )
        for name in resampled[0]
    }


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, _TAILS)
    return float(low), float(high)


def _resampled(several: Sequence[Judged], seed: int, resamples: int) -> list[dict[str, np.ndarray]]:
    """Metrics of examples that are drawn with replacement, the same ones for each of several.

    Returns for each a name -> float64 [resamples].
    """
    means = [
        np.stack([judged.rank == 0, judged.rank < 5, judged.nll, judged.brier])
        for judged in several
    ]
    names, count = ("accuracy", "accuracy_top5", "nll", "brier"), len(several[0].labels)
    random = np.random.default_rng(seed)
    rows: list[list[dict[str, float]]] = [[] for _ in several]
    for _ in range(resamples):
        drawn = np.bincount(random.integers(0, count, count), minlength=count)
        weights = drawn.astype(np.float64)
        for judged, values, found in zip(several, means, rows, strict=True):
            row = dict(zip(names, values @ weights / count, strict=True))
            if judged.num_classes <= 10:
                del row["accuracy_top5"]
            found.append(row | averages(class_scores(judged, weights)))
    return [{name: np.array([row[name] for row in found]) for name in found[0]} for found in rows]
