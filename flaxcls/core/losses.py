"""The loss of each example, what it weighs, and the weights of classes.

A loss in LOSSES is `loss(logits, targets, /, *, ...) -> losses`, with logits and (soft) targets
float32 [B, K] and losses float32 [B]. What comes after the star are its options. One called
`class_counts`, also of a user's own loss, is the number of training examples of each class unless
the config gives others.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flaxcls.config.options import BelowOne, NonNegative, Range, accepted, check, look_up
from flaxcls.config.user_code import is_path
from flaxcls.data.source import count_classes
from flaxcls.errors import ConfigError

LossFunction = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array, /) -> jax.Array:
    """-sum_k t_k log softmax(logits)_k."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def sigmoid_cross_entropy(
    logits: jax.Array, targets: jax.Array, /, *, target_threshold: BelowOne | None = None
) -> jax.Array:
    """Binary cross-entropy of every class on its own, averaged over the classes as timm does.

    With `target_threshold`, a target above it counts as 1 and any other as 0: what mixup and cutmix
    mix is then present or absent as a whole (Wightman et al. 2021, arXiv:2110.00476, use 0.2).
    """
    if target_threshold is not None:
        targets = (targets > target_threshold).astype(logits.dtype)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


def squared_error(logits: jax.Array, targets: jax.Array, /) -> jax.Array:
    """Mean over the classes of (logits - targets)^2, as in Keras and PyTorch."""
    return jnp.mean(jnp.square(logits - targets), axis=-1)


def focal(logits: jax.Array, targets: jax.Array, /, *, gamma: NonNegative = 2.0) -> jax.Array:
    """-sum_k t_k (1 - p_k)^gamma log p_k with p = softmax(logits) (Lin et al. 2017).

    Easy examples count less; `gamma` 0 is the cross-entropy.
    """
    log_p = jax.nn.log_softmax(logits)
    # Kept above 0, where the derivative of x^gamma is infinite for a gamma below 1.
    distance = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(logits.dtype).tiny)
    return -jnp.sum(targets * distance**gamma * log_p, axis=-1)


def logit_adjusted(
    logits: jax.Array,
    targets: jax.Array,
    /,
    *,
    tau: NonNegative = 1.0,
    class_counts: Annotated[tuple[float, ...], Range(above=0)] | None = None,
) -> jax.Array:
    """The cross-entropy of logits + tau log(class frequencies) (Menon et al. 2021).

    Only the loss adds them: the network learns logits whose argmax is right on the average over the
    classes, arXiv:2007.07314, eq. 10. Evaluation and predictions take these as they are.
    """
    if class_counts is None:
        raise ConfigError("`class_counts` must be given to logit_adjusted")
    counts = np.asarray(class_counts, np.float64)
    adjustment = tau * np.log(counts / counts.sum())
    return softmax_cross_entropy(logits + adjustment.astype(np.float32), targets)


LOSSES: dict[str, Callable[..., jax.Array]] = {
    "softmax_cross_entropy": softmax_cross_entropy,
    "sigmoid_cross_entropy": sigmoid_cross_entropy,
    "squared_error": squared_error,
    "focal": focal,
    "logit_adjusted": logit_adjusted,
}


def build(
    name: str,
    *,
    label_smoothing: BelowOne = 0.0,
    class_weights: Sequence[float] | None = None,
    **options,
) -> LossFunction:
    """Returns `loss(logits, targets) -> (losses, weights)`.

    `logits` of any float type and `targets` float32 are [B, K]; `losses` and `weights` are float32
    [B]. The loss of a batch is sum(losses * weights) / sum(weights). With hard labels and without
    label smoothing this is what PyTorch makes of its losses' `weight`. Smoothing, PyTorch's weighs
    each class's share of the smoothed target by that class's weight; here an example weighs what
    its label does. Of soft labels PyTorch's mean does not divide by the weights.

    Args:
      name: one of LOSSES, or a user's own.
      label_smoothing: share e of a target that goes to all classes alike, t (1 - e) + e / K
        (Szegedy et al. 2016); the weights are those of the targets before smoothing.
      class_weights: a number for each class; an example weighs sum_k t_k class_weights_k. None: 1.
      **options: those of the named loss.

    Raises ConfigError for what is unknown, not taken by the loss, or out of range.
    """
    function = look_up("config.loss.name", name, LOSSES)
    check("config.loss", name, {"label_smoothing": label_smoothing}, accepted(build))
    options = check("config.loss", name, options, accepted(function))
    look_up(f"{name}.evaluated_as", evaluated_as(name), LOSSES)
    weight_of = None if class_weights is None else np.asarray(class_weights, np.float32)
    if weight_of is not None and not (np.isfinite(weight_of).all() and (weight_of >= 0).all()):
        raise ConfigError(
            f"config.loss.class_weights must not be negative, got {weight_of.tolist()}"
        )

    def loss(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
        num_classes = targets.shape[-1]
        if weight_of is None:
            weights = jnp.ones(targets.shape[:-1], jnp.float32)
        elif weight_of.shape != (num_classes,):
            raise ConfigError(
                f"`class_weights` must have a number for each of the {num_classes} classes, "
                f"got {weight_of.size}"
            )
        else:
            weights = jnp.sum(targets * weight_of, axis=-1)
        if label_smoothing:
            targets = targets * (1 - label_smoothing) + label_smoothing / num_classes
        each = function(logits, targets, **options)
        if is_path(name) and getattr(each, "shape", None) != weights.shape:
            raise ConfigError(
                f"{name} must give a loss for each example, of shape {weights.shape}, got "
                f"{getattr(each, 'shape', type(each).__name__)}"
            )
        return each, weights

    return loss


# The negative log-likelihood of the distribution over the classes that a loss makes of logits; the
# squared error has none, and stands for itself.
_LIKELIHOODS = {
    "softmax_cross_entropy": softmax_cross_entropy,
    "focal": softmax_cross_entropy,
    "logit_adjusted": softmax_cross_entropy,
    "sigmoid_cross_entropy": sigmoid_cross_entropy,
    "squared_error": squared_error,
}


def evaluated_as(name: str) -> str:
    """The loss of LOSSES by which the outputs of a network are read that was trained by another.

    It says what the outputs mean: evaluation's loss and the probabilities of classes follow from
    it. Each of LOSSES says it for itself; a user's own by its attribute `evaluated_as`, without
    which it is "softmax_cross_entropy".
    """
    if not is_path(name):
        return name
    own = look_up("config.loss.name", name, LOSSES).__wrapped__
    return getattr(own, "evaluated_as", "softmax_cross_entropy")


def outputs_of(name: str) -> str:
    """What a network that is trained by a loss gives, by the plain loss of its `likelihood`.

    "softmax_cross_entropy", "sigmoid_cross_entropy" or "squared_error".
    """
    return _LIKELIHOODS[evaluated_as(name)].__name__


class LossSpec(NamedTuple):
    """A loss by its name, without what of it may follow from the data.

    Attributes:
      name: one of LOSSES, or a user's own.
      class_weights: a number for each class; "balanced" or "effective_number" by the training
        split; None: all alike.
      options: the other arguments of `build`.
      beta: of `effective_number_weights`.
    """

    name: str
    class_weights: tuple[float, ...] | Literal["balanced", "effective_number"] | None
    options: Mapping[str, Any]
    beta: float = 0.9999

    def of_labels(
        self, labels: Callable[[], np.ndarray], num_classes: int
    ) -> tuple[list[float] | None, list[int] | None]:
        """Its class weights and, where it has use for them, the examples of each class.

        `labels` gives those of the training split; it is called only if they are needed. Raises
        DataError as `count_classes`.
        """
        weights = self.class_weights
        if not isinstance(weights, str) and not self.takes_class_counts:
            return None if weights is None else list(weights), None
        counts = count_classes(labels(), num_classes, "config.loss")
        if weights == "balanced":
            weights = balanced_weights(counts).tolist()
        elif weights == "effective_number":
            weights = effective_number_weights(counts, self.beta).tolist()
        return (
            None if weights is None else list(weights),
            counts.tolist() if self.takes_class_counts else None,
        )

    @property
    def takes_class_counts(self) -> bool:
        """Whether the loss has use for the number of examples of each class."""
        known = accepted(look_up("config.loss.name", self.name, LOSSES))
        return "class_counts" in known and "class_counts" not in self.options

    def with_weights(
        self, class_weights: Sequence[float] | None, class_counts: Sequence[int] | None = None
    ) -> LossFunction:
        """What is trained for, by what `of_labels` gives."""
        options = dict(self.options)
        if class_counts:
            options["class_counts"] = tuple(class_counts)
        return build(self.name, class_weights=class_weights, **options)

    @property
    def likelihood(self) -> LossFunction:
        """The plain loss that a network trained by this one is evaluated by.

        Its negative log-likelihood, without label smoothing, weights and adjustment, which is the
        same for networks that were trained with different ones.
        """
        return build(outputs_of(self.name))

    def objective(
        self, class_weights: Sequence[float] | None, class_counts: Sequence[int] | None = None
    ) -> LossFunction | None:
        """What is trained for, if that is not the `likelihood` for hard targets, else None."""
        is_other = self.name in ("focal", "logit_adjusted") or is_path(self.name)
        if not is_other and not self.options.get("label_smoothing") and class_weights is None:
            return None  # a target_threshold has 0 and 1 on their sides
        return self.with_weights(class_weights, class_counts)


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """N / (K count_k) for each class, so that all classes weigh the same, as scikit-learn's.

    `counts` int [K] are above 0, N their sum. Returns float64 [K].
    """
    return counts.sum() / (len(counts) * counts)


def effective_number_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """Each class by 1 / its effective number of examples, (1 - beta^n) / (1 - beta); they sum to K.

    Class-balanced weights (Cui et al. 2019, arXiv:1901.05555): of `counts` int [K] above 0 and a
    beta from 0, where all classes weigh 1, to below 1, near which they are those of
    `balanced_weights`. Returns float64 [K].
    """
    weights = (1 - beta) / (1 - beta ** np.asarray(counts, np.float64))
    return weights * len(weights) / weights.sum()
