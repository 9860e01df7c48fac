"""Answers that know their limits: temperature, sets that hold the right class, "none of these".

What is promised holds for pictures that are like those fitted to: drawn from the same source, each
as likely as any other. It says nothing of pictures that show something else altogether.

The sets are those of split conformal prediction with the probability as the score: all classes
whose probability is at least a threshold, the smallest sets there are on average (Sadinle, Lei &
Wasserman 2019, arXiv:1609.00451). A threshold needs no code to use, also beside an export. The
quantile is that of a finite sample, so that coverage is at least what is promised on average over
the samples fitted to (Vovk et al. 2005; Angelopoulos & Bates 2021, arXiv:2107.07511).
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxcls.buckets import as_path
from flaxcls.core.losses import outputs_of
from flaxcls.errors import ConfigError
from flaxcls.inference.calibration import Calibration, Checkpoint, checkpoint_of, save
from flaxcls.inference.predictions import SplitPredictions, predict_split
from flaxcls.inference.restored import choose_weights, open_evaluation, restore
from flaxcls.insight.detailed import check_held_out
from flaxcls.insight.intervals import wilson
from flaxcls.insight.scores import Judged, judge, probability_metrics
from flaxcls.insight.temperature import fit_temperature, scaled, stratified_parts

CONFIDENCE = 0.95  # that the risk is kept
RISK = 0.05  # that is tried if none is asked for
LEVELS = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99)  # fixed beforehand
_FEWEST = 80  # examples that anything can be told from


class Calibrated(NamedTuple):
    """What was fitted and what it is worth.

    Attributes:
      calibration: of the run's folder now.
      measured: on examples that nothing was fitted to; see `measure`.
      examples: how many the temperature, the thresholds and the measures are from.
      data: what they are examples of, in words.
      always: classes with too few examples for a threshold: they are in every set.
    """

    calibration: Calibration
    measured: dict[str, Any]
    examples: tuple[int, int, int]
    data: str
    always: list[str]


def calibrate_run(
    run: str | Path,
    *,
    coverage: float = 0.9,
    per_class: bool = False,
    risk: float | None = None,
    split: str | None = None,
    checkpoint: str = "last",
    data_dir: str | None = None,
    source: str | Path | None = None,
    classes: str | Path | None = None,
    tta: str | None = None,
    ema: bool | None = None,
    seed: int = 0,
) -> Calibrated:
    """Fits a run's calibration to examples that it was not trained on, and stores it in its folder.

    They are divided by class: a quarter is for the temperature, a half for the thresholds of the
    probabilities that it gives, and a quarter to measure what comes of it.

    Args:
      run: the folder.
      coverage: how often the set shall hold the right class, between 0 and 1.
      per_class: whether it shall so for each class, not only for all pictures.
      risk: the largest share of wrong answers among those that are given. None: RISK, or where
        that can't be promised nothing is, and every picture is given an answer.
      split, data_dir, source, classes: the examples, see `restored.open_evaluation`.
      checkpoint, ema, tta: which weights and views, as in `Predictor`.
      seed: of the division.

    Raises ConfigError for examples that were trained on, or too few, and for a risk that can't be
    promised.
    """
    for name, value in (("coverage", coverage), ("risk", RISK if risk is None else risk)):
        if not 0 < value < 1:
            raise ConfigError(f"--{name} must be between 0 and 1, got {value:g}")
    run = as_path(run, "--run=")
    restored = restore(run, checkpoint, tta=tta)
    weights = choose_weights(restored, run, ema)
    pipeline = open_evaluation(restored, split, data_dir, source, classes)
    examples = pipeline.source
    check_held_out(restored, examples)
    if len(examples) < _FEWEST:
        raise ConfigError(
            f"{examples.name} '{examples.split}' has {len(examples):,} examples: a calibration "
            f"needs {_FEWEST} at least"
        )
    variables = restored.ema if weights == "ema" else restored.variables
    calibration, measured, sizes = fit(
        predict_split(restored, pipeline, variables),
        outputs_of(restored.experiment.loss.name),
        checkpoint_of(run, restored.step, weights, restored.experiment.tta),
        coverage=coverage,
        per_class=per_class,
        risk=risk,
        seed=seed,
    )
    data = f"{examples.name} '{examples.split}'"
    save(run, calibration, {**measured, "data": data, "fingerprint": examples.fingerprint})
    never = [n for n, t in zip(examples.class_names, calibration.thresholds, strict=True) if t <= 0]
    return Calibrated(calibration, measured, sizes, data, never)


def fit(
    predictions: SplitPredictions,
    outputs: str,
    checkpoint: Checkpoint,
    *,
    coverage: float,
    per_class: bool,
    risk: float | None,
    seed: int = 0,
) -> tuple[Calibration, dict[str, Any], tuple[int, int, int]]:
    """The calibration by some predictions, what was measured, and the sizes of the three parts."""
    first, *middle, last = stratified_parts(predictions.labels, 4, seed)
    parts = [
        SplitPredictions(*(array[part] for array in predictions))
        for part in (first, np.sort(np.concatenate(middle)), last)
    ]
    temperature = fit_temperature(parts[0].logits, parts[0].labels, outputs)
    fitted, others = (scaled(part, temperature, outputs) for part in parts[1:])
    judged = judge(fitted, outputs)
    answer_from, proven = answer_threshold(judged, RISK if risk is None else risk, CONFIDENCE)
    if answer_from is None and risk is not None:
        raise ConfigError(
            f"--risk={risk:g} can't be promised: by these {len(judged.labels):,} examples no "
            f"confidence keeps the share of wrong answers below it; the smallest that was proven "
            f"is {proven:.2g}"
        )
    calibration = Calibration(
        checkpoint=checkpoint,
        temperature=temperature,
        coverage=coverage,
        thresholds=tuple(conformal_thresholds(judged, coverage, per_class).tolist()),
        risk=None if answer_from is None else RISK if risk is None else risk,
        confidence=CONFIDENCE,
        answer_from=answer_from or 0.0,
    )
    before, after = judge(parts[2], outputs), judge(others, outputs)
    measured = measure(calibration, others, after) | {
        "as_it_is": probability_metrics(before),
        "calibrated": probability_metrics(after),
    }
    sizes = tuple(len(part.labels) for part in parts)
    return calibration, measured, sizes


def conformal_thresholds(judged: Judged, coverage: float, per_class: bool) -> np.ndarray:
    """The least probability with which each class belongs to a set, float64 [K].

    Of n examples (of the class) whose label's probability is sorted, the largest first, it is
    number ceil((n + 1) coverage); 0, which every class has, where n is less than that.
    """

    def threshold(own: np.ndarray) -> float:
        rank = math.ceil((len(own) + 1) * coverage - 1e-9)
        return float(np.sort(own)[len(own) - rank]) if rank <= len(own) else 0.0

    if not per_class:
        return np.full(judged.num_classes, threshold(judged.own))
    return np.array([threshold(judged.own[judged.labels == k]) for k in range(judged.num_classes)])


def answer_threshold(judged: Judged, risk: float, confidence: float) -> tuple[float | None, float]:
    """The least of LEVELS from which on answers are wrong no more often than `risk`.

    That is so with the probability `confidence`, whatever the network: given how many examples
    reach a level, the wrong ones among them are binomial, and exact bounds (Clopper & Pearson 1934)
    hold for all levels at once, as each may fail with a share of 1 - confidence only (learn then
    test, Angelopoulos et al. 2021, arXiv:2110.01052, with Bonferroni's correction).

    Returns None where no level is proven by these examples, and the smallest risk that is.
    """
    from scipy.stats import beta

    given = judged.confidence[:, None] >= np.array(LEVELS, np.float32)
    count = given.sum(axis=0)
    wrong = (given & (judged.rank > 0)[:, None]).sum(axis=0)
    right = np.maximum(count - wrong, 1e-9)  # where none is right the bound is 1
    bounds = beta.ppf(1 - (1 - confidence) / len(LEVELS), wrong + 1, right)
    proven = np.flatnonzero(bounds <= risk)
    return (LEVELS[proven[0]] if len(proven) else None), float(bounds.min())


def measure(
    calibration: Calibration, predictions: SplitPredictions, judged: Judged
) -> dict[str, Any]:
    """What a calibration is worth, on predictions that it was not fitted to.

    {"examples", "coverage": the share of sets with the right class, "coverage_interval": of 95 %,
    "least_class_coverage": that of the class with the lowest, "set_size": the mean, "single": the
    share of sets with one class, "answered": the share of pictures that are given an answer,
    "wrong": the share of answers that are wrong, "wrong_interval"}
    """
    sets = calibration.sets(predictions.probabilities, judged.best)
    right = sets[np.arange(len(sets)), judged.labels]
    counts = np.bincount(judged.labels, minlength=judged.num_classes)
    covered = np.bincount(judged.labels, right, minlength=judged.num_classes)
    answered = calibration.answers(predictions.probabilities)
    wrong, given = int(np.sum(answered & (judged.rank > 0))), int(np.sum(answered))
    return {
        "examples": len(sets),
        "coverage": float(right.mean()),
        "coverage_interval": wilson(right.sum(), len(right)),
        "least_class_coverage": float((covered[counts > 0] / counts[counts > 0]).min()),
        "set_size": float(sets.sum(axis=1).mean()),
        "single": float(np.mean(sets.sum(axis=1) == 1)),
        "answered": float(answered.mean()),
        "wrong": wrong / max(given, 1),
        "wrong_interval": wilson(wrong, given),
    }


def describe(found: Calibrated) -> str:
    """What was fitted and measured, in lines for people."""
    calibration, measured = found.calibration, found.measured
    before, after = measured["as_it_is"], measured["calibrated"]
    first, second, third = found.examples
    wanted = "of each class" if len({*calibration.thresholds}) > 1 else "of all pictures"
    if calibration.answer_from > 0:
        answers = (
            f"answers from a probability of {calibration.answer_from:.0%} on, which "
            f"{measured['answered']:.2%} of the pictures have; the others are none of these"
        )
    else:
        answers = "every picture is given an answer"
    promised = (
        f"promised {calibration.risk:g}, with {calibration.confidence:.0%} confidence"
        if calibration.risk
        else f"these are too few examples to promise {RISK:g}: --risk names another share"
    )
    lines = [
        f"{found.data}: {first:,} examples for the temperature, {second:,} for the thresholds, "
        f"{third:,} others to measure on",
        f"temperature {calibration.temperature:.3f}: calibration error {before['ece']:.2%} -> "
        f"{after['ece']:.2%}, negative log-likelihood {before['nll']:.4f} -> {after['nll']:.4f}",
        f"sets hold the right class of {measured['coverage']:.2%} ({_between(measured, 'coverage')}"
        f"; promised {calibration.coverage:.3g} {wanted}), at least "
        f"{measured['least_class_coverage']:.2%} in each class; {measured['set_size']:.2f} classes "
        f"on average, {measured['single']:.2%} have one",
        f"{answers}; {measured['wrong']:.2%} of the answers are wrong "
        f"({_between(measured, 'wrong')}; {promised})",
    ]
    if found.always:
        shown = ", ".join(found.always[:5]) + ", ..." * (len(found.always) > 5)
        lines.append(
            f"note: too few examples for a threshold of {len(found.always):,} classes, which are "
            f"in every set: {shown}"
        )
    return "\n".join(lines)


def _between(measured: dict[str, Any], name: str) -> str:
    low, high = measured[f"{name}_interval"]
    return f"95 % interval {100 * low:.1f} to {high:.1%}"
