"""What a run's network says of its evaluation split: a pass over the data."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from flaxcls import models
from flaxcls.core.losses import outputs_of
from flaxcls.core.metrics import best_of
from flaxcls.data.loader import materialize
from flaxcls.data.pipeline import Pipeline
from flaxcls.inference.predictions import predict_split
from flaxcls.inference.restored import RestoredRun, restore
from flaxcls.insight.scores import Judged, judge
from flaxcls.report.run_files import RunFiles, number_in

MISTAKES = 24  # that are shown
_SIDE = 160  # pixels of a picture on the page
_SMALL = 64  # up to this side, pictures are kept as they are, as PNG


class Mistake(NamedTuple):
    """An example that is taken for another class."""

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
      mistakes: the most confident ones, at most MISTAKES.
      parameters: how many the network has.
    """

    step: int
    weights: str
    data: str
    split: str
    class_names: Sequence[str]
    judged: Judged
    mistakes: list[Mistake]
    parameters: int


def answers_of(workdir: Path, data_dir: str | None = None) -> Answers:
    """The answers of the last checkpoint of a run, with the better of its weights.

    Raises what restoring the run and reading its data raise: FlaxclsError.
    """
    run = restore(workdir)
    experiment, results = run.experiment, run.metadata["progress"]["results"]
    weights = best_of(results, experiment.best_metric) if results else "eval"
    variables = run.ema if weights == "ema" else run.variables
    pipeline = experiment.evaluation(None, data_dir)
    predictions = predict_split(run, pipeline, variables)
    judged = judge(predictions, outputs_of(experiment.loss.name))
    return Answers(
        step=run.step,
        weights=weights,
        data=pipeline.source.name,
        split=pipeline.source.split,
        class_names=pipeline.source.class_names,
        judged=judged,
        mistakes=_mistakes(run, pipeline, judged),
        parameters=models.parameter_count(run.variables["params"]),
    )


def seconds_of_a_pass(run: RunFiles) -> float | None:
    """How long a pass over the evaluation split takes, by those of training; None if none was."""
    passes = sum(name in row for row in run.rows for name in ("eval", "ema"))
    spent = number_in(run.goodput, "seconds", "evaluate")
    return spent / passes if passes and spent is not None else None


def _mistakes(run: RestoredRun, pipeline: Pipeline, judged: Judged) -> list[Mistake]:
    wrong = np.flatnonzero(judged.rank > 0)
    wrong = wrong[np.argsort(-judged.confidence[wrong], kind="stable")][:MISTAKES]
    if not len(wrong):
        return []
    images, _ = materialize(
        pipeline.source,
        pipeline.transform,
        pipeline.sizes(0),
        indices=wrong,
        max_pixels=pipeline.options.max_pixels,
    )
    return [
        Mistake(
            where=pipeline.source.where(int(index)),
            picture=data_uri(image),
            label=int(judged.labels[index]),
            best=int(judged.best[index]),
            confidence=float(judged.confidence[index]),
            own=float(judged.own[index]),
        )
        for index, image in zip(wrong, images, strict=True)
    ]


def data_uri(image: np.ndarray) -> str:
    """An image, uint8 [H, W, C] with 1, 3 or 4 channels, as small as a page needs it."""
    picture = Image.fromarray(image.squeeze(axis=2) if image.shape[2] == 1 else image)
    kind, content = "png", io.BytesIO()
    if max(picture.size) > _SMALL and picture.mode in ("L", "RGB"):
        kind = "jpeg"
        picture.thumbnail((_SIDE, _SIDE))
    picture.save(content, kind, **({"quality": 80} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
