"""Where a network looks: how much each pixel speaks for a class.

Each method is a function of a network that returns

    explain(variables, images, labels) -> heat, float32 [B, H, W]

for images as the network takes them, normalised float32 [B, H, W, C], and the labels, int32 [B], of
the classes that are explained. An example's heat depends on that example alone. What is explained
is the class's logit, in evaluation: probabilities hardly change where a network is sure. The
programs are compiled when they are first used; those that evaluate the network many times loop on
the host, because a loop of convolutions within a program is slow on CPUs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flaxcls import models
from flaxcls.errors import ConfigError
from flaxcls.models.layers import title

Explain = Callable[[Any, jax.Array, jax.Array], jax.Array]

TOLERANCE = 0.01  # of the gap of integrated gradients
_FEWEST_STEPS = 16  # of them, so that no gap is small by chance


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


def integrated_gradients(
    network: nn.Module, *, tolerance: float = TOLERANCE, max_steps: int = 512
) -> Explain:
    """The gradient along the way from a blank image (Sundararajan et al. 2017, arXiv:1703.01365).

    The blank image has the mean colour of the training images: zeros. A pixel's heat is its part,
    positive or negative, in the difference that the image makes to the logit; the parts add up to
    that difference (`make_completeness_gap`). The integral is that of the trapezoidal rule, whose
    steps are halved, which keeps what is computed, until the gap of each image is at most
    `tolerance`, or there are `max_steps`.
    """
    gradient, gap = make_gradient(network), jax.jit(make_completeness_gap(network))

    @jax.jit
    def add_step(total, variables, images, labels, place):
        return total + gradient(variables, place * images, labels)

    @jax.jit
    def heat_of(total, images, steps):
        return jnp.sum(images * total / steps, axis=-1)

    def explain(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        total = add_step(jnp.zeros_like(images), variables, images, labels, 0.0)
        total = add_step(total, variables, images, labels, 1.0) / 2
        steps = 1
        while True:
            heat = heat_of(total, images, float(steps))
            close = gap(variables, images, labels, heat) <= tolerance
            if steps >= max_steps or (steps >= _FEWEST_STEPS and close.all()):
                return heat
            for number in range(steps):
                total = add_step(total, variables, images, labels, (number + 0.5) / steps)
            steps *= 2

    return explain


def make_completeness_gap(network: nn.Module) -> Callable[..., jax.Array]:
    """Returns `gap(variables, images, labels, heat) -> float32 [B]`, of integrated gradients.

    How far the sum of an image's heat is from the difference that the image makes to the logit, as
    a share of that difference.
    """
    score = make_score(network)

    def gap(variables: Any, images: jax.Array, labels: jax.Array, heat: jax.Array) -> jax.Array:
        blank = score(variables, jnp.zeros_like(images), labels)
        difference = score(variables, images, labels) - blank
        return jnp.abs(heat.sum((1, 2)) - difference) / jnp.abs(difference)

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
    transformer that pools its class token.

    Raises ConfigError when called, for a network that has no map.
    """

    @jax.jit
    def explain(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        shapes = models.maps(network, variables, images)
        if not shapes:
            raise ConfigError(
                f"gradcam needs a network with maps, and {title(network)} records none that its "
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
            weights = gradient.mean((1, 2), keepdims=True)
            heat_of_map = nn.relu(jnp.sum(weights * maps[name].astype(jnp.float32), axis=-1))
            matters = jnp.any(gradient != 0, axis=(1, 2, 3))[:, None, None]
            heat = jnp.where(matters, _resize(heat_of_map, images.shape), heat)
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
