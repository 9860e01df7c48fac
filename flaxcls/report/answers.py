"""What a run's network says of its evaluation split: a pass over the data, some explained."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flaxcls import models
from flaxcls.buckets import AnyPath
from flaxcls.core.losses import outputs_of
from flaxcls.core.metrics import best_of
from flaxcls.data.pipeline import Pipeline
from flaxcls.inference.predictions import predict_split
from flaxcls.inference.restored import RestoredRun, restore
from flaxcls.insight.scores import Judged, judge
from flaxcls.report.pictures import data_uri, with_heat

_MISTAKES = 24  # that are shown
_EXPLAINED = 4  # answers that are wrong, and as many that are right


class Example(NamedTuple):
    """An example, and what the network takes it for."""

    where: str
    picture: str  # a data URI
    label: int
    best: int
    confidence: float  # probability of `best`
    own: float  # and of `label`


class Answers(NamedTuple):
    """What a network says of a split.

    Attributes:
      step, weights: which it is; "eval" or "ema" for averaged parameters.
      data, split: of the examples.
      class_names: of the K classes.
      judged: what each prediction is worth.
      parameters: how many the network has.
      mistakes: the surest ones.
      explained: some answers, in pictures that have their heat beside them.
      method: what the heat is.
    """

    step: int
    weights: str
    data: str
    split: str
    class_names: Sequence[str]
    judged: Judged
    parameters: int
    mistakes: Sequence[Example] = ()
    explained: Sequence[Example] = ()
    method: str = ""


def answers_of(workdir: AnyPath, data_dir: str | None = None, *, explain: bool = True) -> Answers:
    """The answers of the last checkpoint of a run, with the better of its weights.

    To `explain` some of them a gradient is compiled. Raises what restoring the run and reading its
    data raise: FlaxclsError.
    """
    run = restore(workdir)
    experiment, results = run.experiment, run.metadata["progress"]["results"]
    weights = best_of(results, experiment.best_metric) if results else "eval"
    variables = run.ema if weights == "ema" else run.variables
    pipeline = experiment.evaluation(None, data_dir)
    predictions = predict_split(run, pipeline, variables)
    judged = judge(predictions, outputs_of(experiment.loss.name))
    answers = Answers(
        step=run.step,
        weights=weights,
        data=pipeline.source.name,
        split=pipeline.source.split,
        class_names=pipeline.source.class_names,
        judged=judged,
        parameters=models.parameter_count(run.variables["params"]),
        mistakes=_mistakes(pipeline, judged),
    )
    return _explained(answers, run, variables, pipeline) if explain else answers


def _mistakes(pipeline: Pipeline, judged: Judged) -> list[Example]:
    surest = np.argsort(-judged.confidence, kind="stable")
    wrong = surest[judged.rank[surest] > 0][:_MISTAKES]
    if not len(wrong):
        return []
    return _examples(pipeline, judged, wrong, pipeline.images(wrong))


def _explained(answers: Answers, run: RestoredRun, variables: Any, pipeline: Pipeline) -> Answers:
    """With the surest mistakes, and the surest right answers of different classes, explained."""
    judged = answers.judged
    surest = np.argsort(-judged.confidence, kind="stable")
    is_right = judged.rank[surest] == 0
    wrong, right = surest[~is_right][:_EXPLAINED], surest[is_right]
    _, of_each_class = np.unique(judged.best[right], return_index=True)
    examples = np.concatenate([wrong, right[np.sort(of_each_class)][:_EXPLAINED]])
    images = pipeline.images(examples)
    method, pictures = with_heat(run, variables, images, judged.best[examples])
    explained = _examples(pipeline, judged, examples, pictures)
    return answers._replace(explained=explained, method=method)


def _examples(
    pipeline: Pipeline, judged: Judged, indices: np.ndarray, images: Sequence[np.ndarray]
) -> list[Example]:
    return [
        Example(
            where=pipeline.source.where(int(index)),
            picture=data_uri(image),
            label=int(judged.labels[index]),
            best=int(judged.best[index]),
            confidence=float(judged.confidence[index]),
            own=float(judged.own[index]),
        )
        for index, image in zip(indices, images, strict=True)
    ]
