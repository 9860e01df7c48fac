"""Adversarial training: what config.adversarial.name may be, and its part in a training step."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.config.options import Count, Positive, accepted, check
from flaxcls.core.perturbation import Ball, Norm, parse_eps, pgd
from flaxcls.errors import ConfigError, did_you_mean

# logits [B, K] of normalised images [B, H, W, C]; `train`: as the training step computes them
Predict = Callable[..., jax.Array]
Loss = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class PgdAt:
    """Trains on adversarial images alone, found by PGD on the loss (Madry et al. 2018).

    The attack begins at random in the ball and sees the network as the step does: BatchNorm by the
    batch's statistics, as in the paper's code, and the dropout of the step. Running statistics move
    once, by the adversarial images; in the paper's code by every step of the attack as well.
    """

    eps: str | float = "8/255"
    steps: Count = 10
    step_size: str | float = "2/255"
    norm: Norm = "linf"

    train_mode: ClassVar[bool] = True
    trains_on: ClassVar[str] = "image"
    beta: ClassVar[float] = 0.0

    def start(self, ball: Ball, keys: jax.Array, images: jax.Array) -> jax.Array:
        return ball.random_start(keys, images)

    def objective(self, loss: Loss, natural: Callable, targets: jax.Array) -> Callable:
        return lambda logits: loss(logits, targets)[0]


@dataclasses.dataclass(frozen=True)
class Trades:
    """Adds beta KL(p(image) || p(adversarial image)) to the loss (Zhang et al. 2019, TRADES).

    The attack maximises that divergence, from the image with normal noise of deviation 0.001, on
    the network as it predicts: BatchNorm by its running statistics, no dropout, as in the paper's
    code. In the update each of the two batches is normalised by its own statistics, and the running
    ones move by the mean of both.
    """

    eps: str | float = "8/255"
    steps: Count = 10
    step_size: str | float = "2/255"
    norm: Norm = "linf"
    beta: Positive = 6.0

    train_mode: ClassVar[bool] = False
    trains_on: ClassVar[str] = "adversarial"

    def start(self, ball: Ball, keys: jax.Array, images: jax.Array) -> jax.Array:
        noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
        return ball.project(images, images + 1e-3 * noise)

    def objective(self, loss: Loss, natural: Callable, targets: jax.Array) -> Callable:
        return partial(divergence, natural())


AdversarialMethod = PgdAt | Trades
METHODS: dict[str, type[AdversarialMethod]] = {"pgd_at": PgdAt, "trades": Trades}


def build(name: str | None, options: Mapping[str, Any]) -> AdversarialMethod | None:
    """The method of config.adversarial; None where it names none. ConfigError for what is wrong."""
    if name is None:
        return None
    if name not in METHODS:
        raise ConfigError(
            f"config.adversarial.name is {name!r}, which is not known{did_you_mean(name, METHODS)}"
        )
    options = check("config.adversarial", name, options, accepted(METHODS[name]))
    method = METHODS[name](**options)
    for field in ("eps", "step_size"):
        parse_eps(f"config.adversarial.{field}", getattr(method, field))
    return method


def divergence(natural: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(softmax(natural) || softmax(logits)) of each example, [B], of logits [B, K]."""
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (natural, logits))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


@dataclasses.dataclass(frozen=True)
class AdversarialTraining:
    """A method and the normalisation, per channel in units of [0, 1], that its images have had."""

    method: AdversarialMethod
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(
        self, key: jax.Array, predict: Predict, loss: Loss, batch: Batch, platform: str
    ) -> Batch:
        """The batch with what the method trains on: other images, or "adversarial" ones besides.

        The random start of an example depends on the key and its "index" alone: it is the same in
        whatever part of a batch, on whatever device. Pixels that an augmentation has put out of
        [0, 1] come back into it. All to be jitted for a `platform`.
        """
        method = self.method
        ball = Ball(method.norm, parse_eps("eps", method.eps))
        mean, std = (np.asarray(values, np.float32) for values in (self.mean, self.std))
        pixels = jnp.clip(batch["image"] * std + mean, 0, 1)
        natural = partial(predict, batch["image"], train=method.train_mode)
        grows = method.objective(loss, natural, batch["label"])

        def total(pixels: jax.Array) -> jax.Array:
            return grows(predict((pixels - mean) / std, train=method.train_mode)).sum()

        found = pgd(
            ball,
            jax.grad(total),
            pixels,
            method.start(ball, jax.vmap(partial(jax.random.fold_in, key))(batch["index"]), pixels),
            steps=method.steps,
            step_size=parse_eps("step_size", method.step_size),
            platform=platform,
        )
        return {**batch, method.trains_on: (found - mean) / std}

    def penalty(self, logits: jax.Array, adversarial: jax.Array) -> jax.Array:
        """What TRADES adds to the losses, [B], of logits [B, K] of both images."""
        return self.method.beta * divergence(logits, adversarial)
