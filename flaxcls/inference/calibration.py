"""What `calibrate` has fitted to a checkpoint, in calibration.json of the run's folder.

A temperature; thresholds of the probabilities, above which a class belongs to the set that holds
the right one as often as promised; and the least probability of the best class with which an answer
is given at all. How they are fitted is in flaxcls/insight/calibrate.py.
"""

import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxcls.config import options
from flaxcls.core.metrics import WEIGHTS
from flaxcls.errors import ConfigError
from flaxcls.files import read_json, write_json
from flaxcls.runtime.output import printable, say

NAME = "calibration.json"


class Checkpoint(NamedTuple):
    """Which weights something was fitted to, and how they were used.

    Attributes:
      step: of the run.
      weights: "eval" or "ema".
      tta: the views that logits are the mean over, or None.
      digest: of the step's manifest, which names the digests of its files, as a run that was rolled
        back may save other weights at the same step; None where there is no manifest.
    """

    step: int
    weights: str
    tta: str | None
    digest: str | None

    def describe(self) -> str:
        views = f", views of {self.tta}" if self.tta else ""
        return f"step {self.step}, {WEIGHTS.get(self.weights, self.weights)}{views}"


def checkpoint_of(run: Path, step: int, weights: str, tta: str | None) -> Checkpoint:
    """The weights of a step of the run in a folder."""
    try:
        content = (run / "checkpoints" / str(step) / "manifest.json").read_bytes()
    except OSError:
        return Checkpoint(step, weights, tta, None)
    return Checkpoint(step, weights, tta, hashlib.sha256(content).hexdigest()[:16])


class Calibration(NamedTuple):
    """See the module.

    Attributes:
      checkpoint: what it was fitted to, and is used with.
      temperature: what logits are divided by.
      coverage: how often the set holds the right class, 0.9 for nine times of ten.
      thresholds: of the probability of each class, [K].
      risk: how large the share of wrong answers may be among those that are given; None: nothing
        is promised of it.
      confidence: how sure it is that `risk` is kept, for pictures like those it was fitted to.
      answer_from: the least probability of the best class with which it is given as the answer.
    """

    checkpoint: Checkpoint
    temperature: float
    coverage: float
    thresholds: tuple[float, ...]
    risk: float | None
    confidence: float
    answer_from: float

    def sets(self, probabilities: np.ndarray, best: np.ndarray) -> np.ndarray:
        """Which classes are in the set of each picture, bool [N, K]; the `best` one always is."""
        inside = probabilities >= np.array(self.thresholds, np.float32)
        inside[np.arange(len(inside)), best] = True
        return inside

    def answers(self, probabilities: np.ndarray) -> np.ndarray:
        """Whether the best class of each picture is an answer, or "none of these", bool [N]."""
        return probabilities.max(axis=1) >= np.float32(self.answer_from)

    def describe(self) -> str:
        per_class = len({*self.thresholds}) > 1
        return (
            f"temperature {self.temperature:.3g}, sets of {self.coverage:.0%} coverage"
            f"{' per class' if per_class else ''}, answers from {self.answer_from:.1%} on"
        )

    def as_json(self) -> dict[str, Any]:
        """What is told to others: the thresholds as one number where they are the same."""
        same = len({*self.thresholds}) == 1
        return {
            "temperature": self.temperature,
            "coverage": self.coverage,
            "thresholds": self.thresholds[0] if same else list(self.thresholds),
            "risk": self.risk,
            "confidence": self.confidence,
            "answer_from": self.answer_from,
        }


def save(run: Path, calibration: Calibration, measured: dict[str, Any]) -> None:
    """Writes calibration.json, atomically, with what was `measured`; ConfigError if it can't be."""
    content = {
        **calibration.checkpoint._asdict(),
        **calibration.as_json(),
        "measured": measured,
    }
    try:
        write_json(run / NAME, content)
    except OSError as error:
        raise ConfigError(f"{run / NAME} can't be written: {error.strerror or error}") from error


def load(run: Path, checkpoint: Checkpoint, num_classes: int) -> Calibration | None:
    """The calibration of a run's checkpoint; None where there is none.

    One of another checkpoint is not used, which is said in a sentence. Raises ConfigError for a
    file that is damaged.
    """
    path = run / NAME
    content = read_json(path)
    if content is None:
        return None
    thresholds = content.get("thresholds")
    if options.fits(thresholds, float):
        thresholds = [thresholds] * num_classes
    names = ("temperature", "coverage", "confidence", "answer_from")
    numbers, risk = [content.get(name) for name in names], content.get("risk")
    found = [content.get(name) for name in Checkpoint._fields]
    if (
        not all(options.fits(number, float) and math.isfinite(number) for number in numbers)
        or not options.fits(risk, float | None)
        or not options.fits(thresholds, tuple[float, ...])
        or not isinstance(found[0], int)
        or numbers[0] <= 0
    ):
        raise ConfigError(
            f"{printable(path)} is no calibration: delete it, or make it anew by "
            "python -m flaxcls.calibrate"
        )
    if Checkpoint(*found) != checkpoint or len(thresholds) != num_classes:
        fitted = Checkpoint(found[0], str(found[1]), found[2], None).describe()
        say(
            f"note: {printable(path)} belongs to {fitted}, and is not used for "
            f"{checkpoint.describe()}{_again(found, checkpoint)}: probabilities are as the network "
            "gives them",
            error=True,
        )
        return None
    temperature, coverage, confidence, answer_from = map(float, numbers)
    return Calibration(
        checkpoint=checkpoint,
        temperature=temperature,
        coverage=coverage,
        thresholds=tuple(map(float, thresholds)),
        risk=risk,
        confidence=confidence,
        answer_from=answer_from,
    )


def _again(found: list[Any], checkpoint: Checkpoint) -> str:
    return ", which was saved anew" if tuple(found[:3]) == checkpoint[:3] else ""
