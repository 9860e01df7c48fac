"""Temperature scaling: all logits divided by one number, so that confidence is like accuracy.

Guo et al. 2017 (arXiv:1706.04599). The order of the classes stays, and so does the accuracy. It is
fitted on examples that the network was not trained on, and its worth is measured on others.
"""

import numpy as np

from flaxcls.inference.predictions import SplitPredictions, probabilities_of

# Of log T: one step of e is a standard deviation. A few hundred examples outweigh it; without it a
# part in which nothing is wrong would make the network certain of everything.
_PRIOR = 1.0
_BOUNDS = (-4.0, 4.0)  # of log T
_ROWS = 4096


def has_temperature(outputs: str) -> bool:
    """Whether logits mean the same but for a factor: those of the squared error do not."""
    return outputs != "squared_error"


def fit_temperature(logits: np.ndarray, labels: np.ndarray, outputs: str) -> float:
    """The temperature with the largest likelihood of the labels, nearly: see `_PRIOR`.

    Args:
      logits: float [N, K].
      labels: int [N].
      outputs: what the logits mean, see `core.losses.outputs_of`. For "sigmoid_cross_entropy" the
        likelihood is that of all classes, each on its own; for "squared_error" the result is 1.
    """
    from scipy.optimize import minimize_scalar  # not for who imports only

    if not has_temperature(outputs):
        return 1.0

    def cost(log_temperature: float) -> float:
        total = sum(
            _negative_log_likelihood(logits[rows] / np.exp(log_temperature), labels[rows], outputs)
            for rows in (slice(n, n + _ROWS) for n in range(0, len(labels), _ROWS))
        )
        return total + log_temperature**2 / (2 * _PRIOR**2)

    return float(np.exp(minimize_scalar(cost, bounds=_BOUNDS, method="bounded").x))


def _negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, outputs: str) -> float:
    logits = logits.astype(np.float64)
    own = logits[np.arange(len(labels)), labels]
    if outputs == "sigmoid_cross_entropy":
        return float(np.logaddexp(0, logits).sum() - own.sum())
    top = logits.max(axis=1)
    return float((top + np.log(np.exp(logits - top[:, None]).sum(axis=1)) - own).sum())


def scaled(predictions: SplitPredictions, temperature: float, outputs: str) -> SplitPredictions:
    """The predictions with their logits divided by a temperature."""
    logits = predictions.logits / np.float32(temperature)
    return SplitPredictions(logits, probabilities_of(logits, outputs), predictions.labels)


def stratified_parts(labels: np.ndarray, count: int, seed: int = 0) -> list[np.ndarray]:
    """The indices 0 to N - 1 in `count` parts of the same size and classes, but for one of each.

    Each part is in ascending order. The draws are Philox's raw stream, which stays the same in all
    versions of NumPy.
    """
    draws = np.random.Philox(key=seed).random_raw(len(labels))
    by_class = np.lexsort((draws, labels))
    return [np.sort(by_class[part::count]) for part in range(count)]
