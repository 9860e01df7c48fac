"""Where a network looks: how much each pixel speaks for a class.

Each method is a function of a network that returns

    explain(variables, images, labels) -> heat, float32 [B, H, W]

for images as the network takes them, normalised float32 [B, H, W, C], and the labels, int32 [B], of
the classes that are explained. An example's heat depends on that example alone. What is explained
is the class's logit, in evaluation: probabilities hardly change where a network is sure. The
programs are compiled when they are first used; those that evaluate the network many times loop on
the host, because a loop of convolutions within a program is slow on CPUs.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flaxcls import models
from flaxcls.errors import ConfigError
from flaxcls.models.layers import title

Explain = Callable[[Any, jax.Array, jax.Array], jax.Array]

TOLERANCE = 0.01  # of the gap of integrated gradients
_FEWEST_STEPS = 32  # of them, so that no gap is small by chance
_SMALLEST = 1e-12  # difference of two logits that is divided by


def make_score(network: nn.Module) -> Explain:
    """Returns `score(variables, images, labels)`: the logits of these classes, float32 [B]."""

    def score(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return _of_labels(network.apply(variables, images, train=False), labels)

    return score


def make_gradient(network: nn.Module) -> Explain:
    """Returns `gradient(variables, images, labels)`: that of each score, float32 [B, H, W, C]."""
    score = make_score(network)

    def gradient(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        scores, pullback = jax.vjp(lambda images: score(variables, images, labels), images)
        return pullback(jnp.ones_like(scores))[0]

    return gradient


def saliency(network: nn.Module) -> Explain:
    """The largest absolute gradient of a pixel's channels (Simonyan et al. 2013, arXiv:1312.6034).

    How much the logit changes with the pixel, either way.
    """
    gradient = make_gradient(network)
    return jax.jit(lambda *arguments: _largest(gradient(*arguments)))


def smoothgrad(
    network: nn.Module, *, samples: int = 32, noise: float = 0.15, seed: int = 0
) -> Explain:
    """`saliency` of the mean gradient of noisy copies (Smilkov et al. 2017, arXiv:1706.03825).

    Args:
      samples: how many copies. All images have the same noise, so that what is found of one does
        not depend on those beside it.
      noise: its standard deviation, as a share of the range of an image's values.
      seed: of the noise.
    """
    gradient = make_gradient(network)

    @jax.jit
    def add_sample(total, variables, images, labels, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        span = jnp.ptp(images, axis=(1, 2, 3), keepdims=True)
        added = noise * span * jax.random.normal(key, images.shape[1:])
        return total + gradient(variables, images + added, labels)

    def explain(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        total = jnp.zeros_like(images)
        for number in range(samples):
            total = add_sample(total, variables, images, labels, number)
        return _largest(total / samples)

    return explain


class _Step(NamedTuple):
    """The image at a place between the blank one, 0, and itself, 1."""

    place: float
    score: np.ndarray  # [B]
    slope: np.ndarray  # [B], of the score by the place: the sum of `parts`
    parts: jax.Array  # [B, H, W], each pixel's part in the slope


def integrated_gradients(
    network: nn.Module, *, tolerance: float = TOLERANCE, max_steps: int = 256
) -> Explain:
    """The gradient along the way from a blank image (Sundararajan et al. 2017, arXiv:1703.01365).

    The blank image has the mean colour of the training images: zeros. A pixel's heat is its part,
    positive or negative, in the difference that the image makes to the logit; the parts add up to
    that difference (`make_completeness_gap`). The integral is that of the trapezoidal rule. Between
    any two steps the logit tells what the sum of the parts should be, so the next step halves the
    interval where it is the farthest from that: most logits change near the blank image, where
    even steps would be too long. It ends when the gap of each image is at most `tolerance`, or
    after `max_steps`; so many heat maps are in memory.
    """
    score = make_score(network)

    @jax.jit
    def evaluate(variables, images, labels, place):
        scores, pullback = jax.vjp(lambda x: score(variables, x, labels), place * images)
        parts = jnp.sum(images * pullback(jnp.ones_like(scores))[0], axis=-1)
        return scores, parts.sum((1, 2)), parts

    def explain(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        def step(place: float) -> _Step:
            scores, slope, parts = evaluate(variables, images, labels, place)
            return _Step(place, np.asarray(scores), np.asarray(slope), parts)

        steps = [step(0.0), step(1.0)]
        difference = np.maximum(np.abs(steps[1].score - steps[0].score), _SMALLEST)
        while len(steps) < max_steps:
            gaps = np.array([_gap(*two) / difference for two in itertools.pairwise(steps)])
            if len(steps) >= _FEWEST_STEPS and np.abs(gaps.sum(0)).max() <= tolerance:
                break
            worst = int(np.abs(gaps).max(1).argmax())
            middle = (steps[worst].place + steps[worst + 1].place) / 2
            steps.insert(worst + 1, step(middle))
        places = np.array([step.place for step in steps])
        weights = np.gradient(places)  # half the distance of its neighbours
        weights[[0, -1]] /= 2
        return sum(weight * step.parts for weight, step in zip(weights, steps, strict=True))

    return explain


def _gap(left: _Step, right: _Step) -> np.ndarray:
    """By how much the parts between two steps don't add up to the difference of the score, [B]."""
    mean = (left.slope + right.slope) / 2
    return right.score - left.score - (right.place - left.place) * mean


def make_completeness_gap(network: nn.Module) -> Callable[..., jax.Array]:
    """Returns `gap(variables, images, labels, heat) -> float32 [B]`, of integrated gradients.

    How far the sum of an image's heat is from the difference that the image makes to the logit, as
    a share of that difference.
    """
    score = make_score(network)

    def gap(variables: Any, images: jax.Array, labels: jax.Array, heat: jax.Array) -> jax.Array:
        blank = score(variables, jnp.zeros_like(images), labels)
        difference = score(variables, images, labels) - blank
        gaps = jnp.abs(heat.sum((1, 2)) - difference)
        return gaps / jnp.maximum(jnp.abs(difference), _SMALLEST)

    return gap


def occlusion(network: nn.Module, *, patch: float = 0.15) -> Explain:
    """By how much the logit falls when a square is blank (Zeiler & Fergus 2013, arXiv:1311.2901).

    A pixel's heat is the mean over the squares that cover it; it is negative where hiding it helps.

    Args:
      patch: the square's side, as a share of the image's shorter side. The next square begins half
        a side on. It has the mean colour of the training images.
    """
    score = make_score(network)

    @jax.jit
    def add_square(totals, variables, images, labels, square):
        whole, heat, covered = totals
        rows, columns = (jnp.arange(side)[:, None] for side in images.shape[1:3])
        top, left, side = square
        hidden = (rows >= top) & (rows < top + side)
        hidden = hidden & ((columns >= left) & (columns < left + side)).T
        scores = score(variables, jnp.where(hidden[..., None], 0, images), labels)
        fall = (whole - scores)[:, None, None] * hidden
        return whole, heat + fall, covered + hidden

    score = jax.jit(score)

    def explain(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        whole = score(variables, images, labels)
        shape = images.shape[1:3]
        totals = whole, jnp.zeros(images.shape[:3]), jnp.zeros(shape, jnp.int32)
        for square in squares(shape, patch):
            totals = add_square(totals, variables, images, labels, square)
        return totals[1] / totals[2]

    return explain


def squares(shape: tuple[int, int], patch: float) -> Iterator[tuple[int, int, int]]:
    """The (top, left, side) of the squares of `occlusion` that cover an image of that (H, W)."""
    side = min(max(1, round(patch * min(shape))), *shape)
    rows, columns = (
        sorted({*range(0, length - side, max(1, side // 2)), length - side}) for length in shape
    )
    yield from ((top, left, side) for top in rows for left in columns)


def gradcam(network: nn.Module) -> Explain:
    """The last map's channels, each weighed by its mean gradient (Selvaraju et al. 2016).

    arXiv:1610.02391. What speaks against the class is cut off. The last map is the last one that is
    recorded (`models.layers.record`) and has a gradient: that of the last block but one in a
    transformer that pools its class token. It can be blank where a network tells the places of its
    map apart, as one without a global mean does; then `hirescam` has more to show.

    Raises ConfigError when called, for a network that has no map.
    """
    return _cam(network, "gradcam", lambda gradient: gradient.mean((1, 2), keepdims=True))


def hirescam(network: nn.Module) -> Explain:
    """`gradcam` with each place of the map weighed by its own gradient (Draelos & Carin 2020).

    arXiv:2011.08891. The same, but for a factor, where a global mean is followed by the head.
    """
    return _cam(network, "hirescam", lambda gradient: gradient)


def _cam(network: nn.Module, method: str, weigh: Callable[[jax.Array], jax.Array]) -> Explain:
    @jax.jit
    def explain(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        shapes = models.maps(network, variables, images)
        if not shapes:
            raise ConfigError(
                f"{method} needs a network with maps, and {title(network)} records none that its "
                "logits depend on; saliency, smoothgrad, integrated_gradients and occlusion take "
                "any network"
            )

        def score(perturbations):
            logits, found = models.logits_and_features(network, variables, images, perturbations)
            return _of_labels(logits, labels), {name: found[name] for name in shapes}

        zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        scores, pullback, maps = jax.vjp(score, zeros, has_aux=True)
        (gradients,) = pullback(jnp.ones_like(scores))
        heat = jnp.zeros(images.shape[:3])
        for name in shapes:
            gradient = gradients[name].astype(jnp.float32)
            weighed = weigh(gradient) * maps[name].astype(jnp.float32)
            heat_of_map = _resize(nn.relu(weighed.sum(axis=-1)), images.shape)
            matters = jnp.any(gradient != 0, axis=(1, 2, 3))[:, None, None]
            heat = jnp.where(matters, heat_of_map, heat)
        return heat

    return explain


def attention_rollout(network: nn.Module) -> Explain:
    """How much of each patch attention brings to what is pooled (Abnar & Zuidema 2020).

    arXiv:2005.00928. The mean over the heads and the identity, for the residual branch, half each,
    are multiplied from block to block. It is the same for every class.

    Raises ConfigError when called, for a network whose blocks don't attend to all patches.
    """

    @jax.jit
    def explain(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        blocks = models.attention_weights(network, variables, images)
        if not blocks:
            raise ConfigError(
                "attention_rollout needs a network whose blocks attend to all patches, as those "
                f"of vit, and {title(network)} has none; gradcam takes any network with maps"
            )
        tokens = blocks[0].shape[-1]
        parts = jnp.broadcast_to(network.pooling_weights(tokens), (len(images), tokens))
        for weights in reversed(blocks):  # from what is pooled back to the patches
            attended = jnp.einsum("bi,bij->bj", parts, weights.mean(1), precision="highest")
            parts = (attended + parts) / 2
        *_, last = models.maps(network, variables, images).values()
        rows, columns = last.shape[1:3]
        patches = parts[:, tokens - rows * columns :]  # those before are no patches
        return _resize(patches.reshape(-1, rows, columns), images.shape)

    return explain


METHODS: dict[str, Callable[[nn.Module], Explain]] = {
    "gradcam": gradcam,
    "hirescam": hirescam,
    "integrated_gradients": integrated_gradients,
    "smoothgrad": smoothgrad,
    "saliency": saliency,
    "occlusion": occlusion,
    "attention_rollout": attention_rollout,
}


def _of_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """[B, K] -> [B], float32."""
    return jnp.take_along_axis(logits.astype(jnp.float32), labels[:, None], axis=1)[:, 0]


def _largest(gradient: jax.Array) -> jax.Array:
    return jnp.abs(gradient).max(axis=-1)


def _resize(heat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, h, w] -> [B, H, W] of images of that shape [B, H, W, C], bilinearly."""
    return jax.image.resize(heat, shape[:3], "bilinear")
