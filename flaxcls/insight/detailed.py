"""Evaluation in depth: of one run, or of several whose answers are averaged."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxcls.buckets import as_path
from flaxcls.core.losses import outputs_of
from flaxcls.core.metrics import WEIGHTS
from flaxcls.data.pipeline import Pipeline
from flaxcls.data.source import Source
from flaxcls.errors import ConfigError
from flaxcls.inference.ensemble import averaged, check_alike
from flaxcls.inference.predictions import SplitPredictions, predict_split
from flaxcls.inference.restored import RestoredRun, choose_weights, open_evaluation, restore
from flaxcls.insight.intervals import Difference, Interval, differences, intervals
from flaxcls.insight.scores import Judged, judge, metrics, probability_metrics
from flaxcls.insight.temperature import (
    fit_temperature,
    has_temperature,
    scaled,
    stratified_parts,
)
from flaxcls.runtime.output import printable

Open = Callable[[RestoredRun], Pipeline]


class Scaling(NamedTuple):
    """What dividing the logits by a temperature does to probabilities of other examples.

    Attributes:
      temperature: above 1 where the network is too sure.
      fitted_on, judged_on: in words.
      before, after: `scores.probability_metrics` of the examples judged on, which it wasn't
        fitted on.
    """

    temperature: float
    fitted_on: str
    judged_on: str
    before: dict[str, float]
    after: dict[str, float]


class Member(NamedTuple):
    """A run that has been evaluated: its folder, step and weights, and what it said by itself."""

    run: str
    step: int
    weights: str  # "eval" or "ema"
    predictions: list[SplitPredictions]  # of each split that was asked for
    outputs: str
    class_names: Sequence[str]
    sources: list[Source]

    def describe(self) -> str:
        return f"{printable(self.run)}, step {self.step}, {WEIGHTS[self.weights]}"


@dataclasses.dataclass(frozen=True)
class Detailed:
    """All that an evaluation in depth has found.

    Attributes:
      members: one run, or those that were averaged by `average`.
      source: the examples.
      predictions, judged: of the run or the ensemble.
      metrics, intervals: see `scores.metrics` and `intervals.intervals`.
      member_metrics: of each of several members by itself.
      differences: of the first two of several members, the first minus the second; else {}.
      scaling: None for the squared error, whose outputs have no temperature.
    """

    members: Sequence[Member]
    average: str
    source: Source
    predictions: SplitPredictions
    judged: Judged
    metrics: dict[str, Any]
    intervals: dict[str, Interval]
    member_metrics: list[dict[str, Any]]
    differences: dict[str, Difference]
    scaling: Scaling | None

    @property
    def class_names(self) -> Sequence[str]:
        return self.source.class_names


def evaluate_in_depth(
    runs: Sequence[str | Path],
    *,
    split: str | None = None,
    checkpoint: str = "last",
    data_dir: str | None = None,
    source: str | Path | None = None,
    classes: str | Path | None = None,
    tta: str | None = None,
    ema: bool | None = None,
    average: str = "probabilities",
    fit_split: str | None = None,
) -> Detailed:
    """Everything that the predictions for a split tell of a run, or of an ensemble of runs.

    Args:
      runs: the folders.
      checkpoint: "last", "best" or a step, of each.
      split, data_dir, source, classes: the examples, see `restored.open_evaluation`.
      tta: as for `restore`.
      ema: whether to take averaged parameters; None: the better ones, see `choose_weights`.
      average: what of several runs is averaged, "probabilities" or "logits".
      fit_split: what the temperature is fitted on, a split of the run's data that it was not
        trained on. None: one half of the examples evaluated; its worth is measured on the other.

    Raises ConfigError for runs that don't fit together.
    """

    def open_asked(run: RestoredRun) -> Pipeline:
        return open_evaluation(run, split, data_dir, source, classes)

    def open_fitted(run: RestoredRun) -> Pipeline:
        return run.experiment.evaluation(fit_split, data_dir)

    opens = [open_asked, *([open_fitted] if fit_split else [])]
    members = [
        _predict(str(run), restore(as_path(run, "--run="), checkpoint, tta=tta), ema, opens)
        for run in runs  # one after the other: the devices need not hold all of them
    ]
    _check_same(members)
    outputs, examples = members[0].outputs, members[0].sources[0]
    together = [
        _together([member.predictions[number] for member in members], outputs, average)
        for number in range(len(opens))
    ]
    judged = judge(together[0], outputs)
    each = [judge(member.predictions[0], outputs) for member in members] if len(runs) > 1 else []
    return Detailed(
        members=members,
        average=average,
        source=examples,
        predictions=together[0],
        judged=judged,
        metrics=metrics(judged),
        intervals=intervals(judged),
        member_metrics=[metrics(member) for member in each],
        differences=differences(*each[:2]) if each else {},
        scaling=_scaling(together, judged, outputs, examples, fit_split),
    )


def _predict(run: str, restored: RestoredRun, ema: bool | None, opens: Sequence[Open]) -> Member:
    weights = choose_weights(restored, run, ema)
    variables = restored.ema if weights == "ema" else restored.variables
    pipelines = [open_split(restored) for open_split in opens]
    if len(pipelines) > 1:
        check_held_out(restored, pipelines[1].source, pipelines[0].source)
    return Member(
        run=run,
        step=restored.step,
        weights=weights,
        predictions=[predict_split(restored, pipeline, variables) for pipeline in pipelines],
        outputs=outputs_of(restored.experiment.loss.name),
        class_names=restored.metadata["class_names"],
        sources=[pipeline.source for pipeline in pipelines],
    )


def check_held_out(run: RestoredRun, fitted: Source, evaluated: Source | None = None) -> None:
    """ConfigError where a split to fit to has examples that were trained on, or are evaluated."""
    if count := run.experiment.trained_on(fitted):
        raise ConfigError(
            f"{count:,} of the {len(fitted):,} examples of '{fitted.split}' are what the network "
            "was trained on, of which it is surer than of others: name a split that was held out"
        )
    if evaluated and (count := run.experiment.in_both(evaluated, fitted)):
        raise ConfigError(
            f"{count:,} of the {len(fitted):,} examples of '{fitted.split}' are evaluated: what is "
            "fitted to them would look better than it is"
        )


def _check_same(members: Sequence[Member]) -> None:
    names, class_names, outputs = zip(
        *((member.run, member.class_names, member.outputs) for member in members), strict=True
    )
    check_alike(names, class_names, outputs)
    first = members[0]
    for member in members[1:]:
        for ours, theirs in zip(first.sources, member.sources, strict=True):
            if ours.fingerprint != theirs.fingerprint:
                raise ConfigError(
                    f"{printable(first.run)} is evaluated on {ours.name} '{ours.split}' and "
                    f"{printable(member.run)} on {theirs.name} '{theirs.split}', which are not the "
                    "same examples: name them by --split or --source"
                )


def _together(members: Sequence[SplitPredictions], outputs: str, average: str) -> SplitPredictions:
    if len(members) == 1:
        return members[0]
    both = averaged([member.logits for member in members], outputs, average)
    return SplitPredictions(*both, members[0].labels)


def _scaling(
    together: Sequence[SplitPredictions],
    judged: Judged,
    outputs: str,
    examples: Source,
    fit_split: str | None,
) -> Scaling | None:
    """The temperature of the last of the predictions, or of one half of them for the other."""
    predictions, fitted = together[0], together[-1]
    if not has_temperature(outputs):
        return None
    if fit_split:
        rest = np.arange(len(predictions.labels))
        words = f"the {len(fitted.labels):,} examples of '{fit_split}'", f"'{examples.split}'"
    elif len(predictions.labels) < 2:
        return None
    else:
        half, rest = stratified_parts(predictions.labels, 2)
        fitted = SplitPredictions(*(array[half] for array in predictions))
        words = f"{len(half):,} of the examples", f"the other {len(rest):,}"
    temperature = fit_temperature(fitted.logits, fitted.labels, outputs)
    others = SplitPredictions(*(array[rest] for array in predictions))
    return Scaling(
        temperature,
        *words,
        before=probability_metrics(judged.of(rest)),
        after=probability_metrics(judge(scaled(others, temperature, outputs), outputs)),
    )
