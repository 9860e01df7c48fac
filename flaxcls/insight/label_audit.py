"""Confident learning: which labels are probably wrong, by predictions of who has not seen them.

Northcutt, Jiang & Chuang 2021, arXiv:1911.00068, with the thresholds, the calibrated joint and the
pruning by noise rate that cleanlab has by default. An example's probabilities must come from a
network that was not trained on it.
"""

from typing import NamedTuple

import numpy as np


class LabelIssues(NamedTuple):
    """The examples whose labels are probably wrong, the most suspicious first; M of them."""

    indices: np.ndarray  # int [M]
    suggested: np.ndarray  # int32 [M], the class that the network takes them for
    confidence: np.ndarray  # float32 [M], its probability of the label that they have


class Confusion(NamedTuple):
    """A pair of classes, and the estimated number of examples of `true` that are labelled so."""

    label: int
    true: int
    count: int


def confident_joint(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The estimated number of examples by label and true class, int [K, K]; row i sums to those
    labelled i.

    An example counts for the class of the largest probability among those whose probability is at
    least its mean over the examples that have its label.

    Args:
      labels: int [N].
      probabilities: float [N, K].
    """
    classes = probabilities.shape[1]
    there = np.unique(labels)
    thresholds = np.full(classes, np.inf)  # of a class without a label nothing is known
    for label in there:
        thresholds[label] = probabilities[labels == label, label].mean()
    confident = probabilities >= thresholds - 1e-6  # of a mean of equal numbers, too
    taken_for = np.where(confident, probabilities, -1).argmax(1)
    counted = confident.any(1)
    joint = np.zeros((classes, classes))
    np.add.at(joint, (labels[counted], taken_for[counted]), 1)
    counts = np.bincount(labels, minlength=classes)
    bare = joint.sum(1) == 0
    joint[bare, bare] = 1
    joint = joint / joint.sum(1, keepdims=True) * counts[:, None]
    return np.stack([_rounded(row) for row in joint])


def _rounded(row: np.ndarray) -> np.ndarray:
    """Integers of the same sum: those that rounding moved most are rounded the other way."""
    whole = np.round(row)
    missing = int(round(row.sum() - whole.sum()))
    order = np.argsort(row - whole, kind="stable")
    whole[order[::-1][:missing] if missing > 0 else order[:-missing]] += np.sign(missing)
    return whole.astype(int)


def find_label_issues(labels: np.ndarray, probabilities: np.ndarray) -> LabelIssues:
    """The labels that are probably wrong, by `confident_joint`.

    Of the examples labelled i as many as the joint has for the true class j, those whose
    probability of j exceeds that of i by most, if j is what the network takes them for at all.

    Args:
      labels: int [N].
      probabilities: float [N, K].
    """
    joint, rows = confident_joint(labels, probabilities), np.arange(len(labels))
    own = probabilities[rows, labels]
    taken_for = probabilities.argmax(1)
    suspicious = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        for true in range(len(joint)):
            count = joint[label, true]
            if true != label and count:
                margin = probabilities[members, true] - own[members]
                suspicious[members[np.argsort(-margin, kind="stable")[:count]]] = True
    suspicious &= taken_for != labels
    indices = np.flatnonzero(suspicious)
    indices = indices[np.argsort(own[indices], kind="stable")]
    return LabelIssues(indices, taken_for[indices].astype(np.int32), own[indices])


def confused_classes(labels: np.ndarray, probabilities: np.ndarray) -> list[Confusion]:
    """The pairs of different classes by the estimated number of wrong labels, most first."""
    joint = confident_joint(labels, probabilities)
    pairs = [
        Confusion(label, true, int(joint[label, true]))
        for label in range(len(joint))
        for true in range(len(joint))
        if label != true and joint[label, true]
    ]
    return sorted(pairs, key=lambda pair: -pair.count)


def outlierness(features: np.ndarray, labels: np.ndarray, neighbors: int = 10) -> np.ndarray:
    """How far each example is from its class, float32 [N]: 1 - cosine, from 0 to 2.

    The mean over its nearest neighbours with the same label; 0 for one that is alone.

    Args:
      features: float [N, D].
      labels: int [N].
    """
    unit, scores = unit_rows(features), np.zeros(len(labels), np.float32)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            continue
        count = min(neighbors, len(members) - 1)
        for part in np.array_split(members, -(-len(members) // 1024)):
            similar = unit[part] @ unit[members].T
            similar[part[:, None] == members] = -np.inf
            nearest = -np.partition(-similar, count - 1, axis=1)[:, :count]
            scores[part] = 1 - nearest.mean(1)
    return scores


class Pair(NamedTuple):
    """Two pictures, by their places in two sets, and how alike they are."""

    one: int
    other: int
    similarity: float  # the cosine of their features, at most 1
    distance: int  # the bits of 64 in which their hashes differ


def near_duplicates(
    one: tuple[np.ndarray, np.ndarray],
    other: tuple[np.ndarray, np.ndarray],
    *,
    similarity: float = 0.95,
    distance: int = 6,
) -> list[Pair]:
    """The pictures of one set with the picture of another that is nearest, if that is very near.

    Both must say so: the features do not see what the network has learned to ignore, and the hash
    takes all plain pictures for one.

    Args:
      one, other: features float [N, D] and hashes bool [N, 64] of `difference_hash`.
      similarity: the least cosine.
      distance: the most bits.

    Returns the pairs, the most alike first.
    """
    (features, hashes), (known, known_hashes) = one, other
    known, signs = unit_rows(known), np.where(known_hashes, 1, -1).astype(np.float32)
    pairs = []
    for begin in range(0, len(features), 512):
        part = slice(begin, begin + 512)
        cosine = unit_rows(features[part]) @ known.T
        bits = (64 - np.where(hashes[part], 1, -1).astype(np.float32) @ signs.T) / 2
        cosine[bits > distance] = -np.inf
        best = cosine.argmax(1)
        for row in np.flatnonzero(cosine[np.arange(len(best)), best] >= similarity):
            nearest = int(best[row])
            near = float(cosine[row, nearest]), int(bits[row, nearest])
            pairs.append(Pair(begin + int(row), nearest, *near))
    return sorted(pairs, key=lambda pair: (pair.distance, -pair.similarity))


def difference_hash(small: np.ndarray) -> np.ndarray:
    """The perceptual hash dHash, bool [N, 64]: where a pixel is brighter than its left neighbour.

    Args:
      small: grey pictures reduced to 8 x 9, float [N, 8, 9].
    """
    return (small[:, :, 1:] > small[:, :, :-1]).reshape(len(small), 64)


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Each row at length 1, float32; one of zeros stays."""
    length = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    return (features / np.maximum(length, 1e-12)).astype(np.float32)
