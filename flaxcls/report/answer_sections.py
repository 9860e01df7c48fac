"""Sections on what a run's network says of its evaluation split."""

from collections.abc import Sequence

import numpy as np

from flaxcls.insight.intervals import wilson
from flaxcls.insight.scores import class_scores, confusion, reliability
from flaxcls.report import svg
from flaxcls.report.answers import Answers, Example
from flaxcls.report.blocks import (
    Block,
    Chart,
    Charts,
    Gallery,
    Image,
    Matrix,
    Number,
    Picture,
    Section,
    Table,
    Text,
    count,
    percent,
)
from flaxcls.report.figures import share
from flaxcls.report.pictures import data_uri
from flaxcls.report.run_data import RunData
from flaxcls.runtime.output import printable

_MOST_IN_GRID = 40  # classes of a confusion matrix whose every cell is written
_PAIRS = 20  # of classes that are confused most
_CELLS = 250  # of a coarse image of the matrix, per side
_RED = (214, 69, 65)  # is seen on light and on dark ground


def confusions(run: RunData) -> Section | None:
    """The confusion matrix: every cell of it, or an image of many classes; and the worst pairs."""
    answers = run.answers
    if not answers:
        return None
    matrix, names = confusion(answers.judged), answers.class_names
    blocks: list[Block] = [Text(_about(answers))]
    if len(names) <= _MOST_IN_GRID:
        caption = "Rows: labels. Columns: predictions."
        blocks.append(Matrix(caption, list(map(printable, names)), matrix.tolist()))
    else:
        blocks.append(_coarse(matrix))
    blocks.append(_worst_pairs(matrix, answers))
    return Section("Confusion", blocks)


def _about(answers: Answers) -> str:
    averaged = ", with averaged parameters" if answers.weights == "ema" else ""
    return (
        f"What the network says of the {len(answers.judged.labels):,} images of {answers.data} "
        f"'{answers.split}' after step {answers.step:,}{averaged}."
    )


def _coarse(matrix: np.ndarray) -> Image:
    """The mistakes as an image: a dot is a block of labels (rows) and predictions (columns)."""
    size = len(matrix)
    block = -(-size // _CELLS)
    mistakes = np.where(np.eye(size, dtype=bool), 0, matrix)
    starts = np.arange(0, size, block)
    sums = np.add.reduceat(np.add.reduceat(mistakes, starts, axis=0), starts, axis=1)
    strength = np.sqrt(sums / max(sums.max(), 1))
    pixels = np.zeros((*sums.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = _RED, (255 * strength).round()
    dot = f"{block} × {block} classes" if block > 1 else "a pair of classes"
    return Image(
        data_uri(pixels),
        f"Image of the mistakes among {size:,} classes",
        f"Mistakes among {size:,} classes in their order, from the top left: a dot is {dot}, rows "
        f"are labels, columns predictions, the strongest dot has {sums.max():,} mistakes. Right "
        "answers, the diagonal, are left out.",
    )


def _worst_pairs(matrix: np.ndarray, answers: Answers) -> Table | Text:
    """The cells off the diagonal with the most examples."""
    mistakes = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:_PAIRS]
    totals, names, rows = matrix.sum(axis=1), answers.class_names, []
    for label, best in zip(*np.unravel_index(order, matrix.shape), strict=True):
        if mistakes[label, best]:
            of_class = percent(mistakes[label, best] / totals[label])
            rows.append((names[label], names[best], count(int(mistakes[label, best])), of_class))
    if not rows:
        return Text("No image is taken for another class.")
    head = ["label", "taken for", "images", "of the class"]
    return Table("The most confused pairs", head, rows, sortable=True)


def classes(run: RunData) -> Section | None:
    """Every class, the one with the lowest recall first."""
    answers = run.answers
    if not answers:
        return None
    scores, matrix = class_scores(answers.judged), confusion(answers.judged)
    np.fill_diagonal(matrix, 0)
    low, high = wilson(scores.right, scores.count)
    worst_first = np.lexsort((np.arange(len(matrix)), scores.recall, scores.count == 0))
    rows = []
    for label in worst_first.tolist():
        shown, predicted = scores.count[label], scores.predicted[label]
        interval = f"{100 * low[label]:.1f} to {100 * high[label]:.1f}" if shown else "–"
        rows.append(
            (
                answers.class_names[label],
                count(shown),
                percent(scores.recall[label] if shown else None),
                Number(low[label], interval),
                percent(scores.precision[label] if predicted else None),
                percent(scores.f1[label] if shown + predicted else None),
                _taken_for(matrix[label], answers),
            )
        )
    head = ["class", "images", "recall", "95 %", "precision", "F1", "mostly taken for"]
    caption = "Recall is the share of a class's images that are right, its accuracy"
    return Section("Classes", [Table(caption, head, rows, sortable=True)])


def _taken_for(mistakes: np.ndarray, answers: Answers) -> str:
    most = int(mistakes.argmax())
    return f"{answers.class_names[most]} ({mistakes[most]:,})" if mistakes[most] else ""


def calibration(run: RunData) -> Section | None:
    """The reliability diagram: whether the network is as often right as it is sure."""
    if not run.answers:
        return None
    found = reliability(run.answers.judged)
    bins, error = found.count.tolist(), share(found.error)
    diagram = svg.reliability_diagram(
        found.confidence.tolist(),
        found.accuracy.tolist(),
        bins,
        f"Reliability diagram in {len(bins)} bins: the expected calibration error is {error}",
    )
    mean = float(run.answers.judged.confidence.mean())
    sure = svg.histogram(
        bins, "confidence", f"Histogram of the confidence, {share(mean)} on average"
    )
    return Section(
        "Calibration",
        [
            Charts(
                [
                    Chart(
                        "Reliability",
                        diagram,
                        [
                            ("c0 block", "accuracy of a bin"),
                            ("c4", "its distance from the confidence"),
                        ],
                        f"Expected calibration error {error}",
                    ),
                    Chart(
                        "Confidence", sure, caption=f"Images in each bin, {share(mean)} on average"
                    ),
                ]
            )
        ],
    )


def mistakes(run: RunData) -> Section | None:
    """Pictures of what the network is surest of and wrong about."""
    answers = run.answers
    if not answers or not answers.mistakes:
        return None
    shown, wrong = len(answers.mistakes), int(np.count_nonzero(answers.judged.rank))
    some = f"The {shown} of {wrong:,} mistakes that the network is surest of"
    which = "All mistakes, the surest first" if wrong == shown else some
    text = Text(f"{which}, with the network's probabilities.")
    return Section("Mistakes", [text, _gallery(answers, answers.mistakes)])


def explanations(run: RunData) -> Section | None:
    """Where in some pictures the network sees what it takes them for."""
    answers = run.answers
    if not answers or not answers.explained:
        return None
    text = Text(
        f"What in a picture speaks for the class that it is taken for, by {answers.method}: the "
        "brighter, the more. It shows what the answer depends on, not that it is right."
    )
    return Section("Explanations", [text, _gallery(answers, answers.explained, wide=True)])


def _gallery(answers: Answers, examples: Sequence[Example], wide: bool = False) -> Gallery:
    names = answers.class_names
    pictures = []
    for each in examples:
        lines = [(f"label, {100 * each.own:.1f} %", names[each.label])]
        if each.best != each.label:
            lines.append((f"taken for, {100 * each.confidence:.1f} %", names[each.best]))
        alt = f"{names[each.label]}, taken for {names[each.best]}"
        pictures.append(Picture(each.picture, alt, lines, each.where))
    return Gallery(pictures, wide)
