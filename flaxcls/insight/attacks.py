"""Attacks on a network, for batches of images: FGSM, PGD and APGD.

An attack is a start and a step, pure functions of jax, so that they can be run in a loop of one
program or, where XLA is slow at that, as one program a step. Images are float32 [B, H, W, C] in
[0, 1]; what is found is for each image the last one seen that the network is wrong about, or else
the last.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.core.perturbation import Ball

LogitsOf = Callable[[jax.Array], jax.Array]
_TINY = 1e-12


class Targets(NamedTuple):
    """What is attacked: images [B, H, W, C], labels int32 [B], and what each of them is keyed by.

    `rank` int32 [] is which of the other classes APGD-T aims at: 1 is the second best.
    """

    images: jax.Array
    labels: jax.Array
    keys: jax.Array
    rank: jax.Array


def cross_entropy(logits: jax.Array, labels: jax.Array, _: jax.Array) -> jax.Array:
    """-log softmax(logits)[label], [B]."""
    return -_of(jax.nn.log_softmax(logits), labels)


def targeted_dlr(logits: jax.Array, labels: jax.Array, aims: jax.Array) -> jax.Array:
    """The targeted difference of logits ratio, [B] (Croce & Hein 2020, arXiv:2003.01690, (6)).

    -(z_label - z_aim) / (z_1 - (z_3 + z_4) / 2) with z_1 >= z_2 >= ..., of 4 classes or more.
    """
    largest = jax.lax.top_k(logits, 4)[0]
    scale = largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2 + _TINY
    return (_of(logits, aims) - _of(logits, labels)) / scale


def _of(logits: jax.Array, classes: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]


LOSSES = {"ce": cross_entropy, "dlr": targeted_dlr}


class Seen(NamedTuple):
    """The last image that the network is wrong about, and whether there was one, bool [B]."""

    images: jax.Array
    is_wrong: jax.Array

    def add(self, images: jax.Array, is_wrong: jax.Array) -> "Seen":
        return Seen(_choose(is_wrong, images, self.images), self.is_wrong | is_wrong)

    def or_else(self, images: jax.Array) -> jax.Array:
        return _choose(self.is_wrong, self.images, images)


@dataclasses.dataclass(frozen=True)
class Pgd:
    """Projected gradient ascent on the cross-entropy (Madry et al. 2018, arXiv:1706.06083).

    Of one step, with `step_size` the radius and no random start, it is FGSM (Goodfellow et al.
    2015), by l2 the fast gradient method.
    """

    name: str
    ball: Ball
    steps: int
    step_size: float
    random_start: bool = True

    aims: ClassVar[bool] = False

    def schedule(self) -> Any:
        """What each step is given, as arrays over the steps."""
        return np.arange(self.steps)

    def start(self, logits_of: LogitsOf, targets: Targets) -> Any:
        images = targets.images
        start = self.ball.random_start(targets.keys, images) if self.random_start else images
        return start, Seen(start, jnp.zeros(len(images), bool))

    def step(self, logits_of: LogitsOf, targets: Targets, state: Any, _: Any) -> Any:
        current, seen = state
        _, gradient, is_wrong = _look(logits_of, "ce", targets, targets.labels, current)
        ascended = self.ball.ascend(targets.images, current, gradient, self.step_size)
        return ascended, seen.add(current, is_wrong)

    def found(self, state: Any) -> jax.Array:
        current, seen = state
        return seen.or_else(current)


class ApgdState(NamedTuple):
    """What APGD carries from step to step; of each image [B, H, W, C], loss [B] or flag [B]."""

    current: jax.Array
    previous: jax.Array
    gradient: jax.Array
    best: jax.Array
    best_gradient: jax.Array
    best_loss: jax.Array
    last_loss: jax.Array
    checked_loss: jax.Array  # the best at the last checkpoint
    increases: jax.Array  # of the loss since then
    halved: jax.Array  # whether the step was, there
    step_size: jax.Array  # [B, 1, 1, 1]
    aims: jax.Array
    seen: Seen


@dataclasses.dataclass(frozen=True)
class Apgd:
    """Auto-PGD (Croce & Hein 2020, arXiv:2003.01690), by AutoAttack's rules.

    With the loss "dlr" it is APGD-T: each image is driven to the class of a rank among its clean
    logits. The step halves at checkpoints where the loss has risen in less than three quarters of
    the steps, or not at all in spite of the last step size, and goes on from the best image.
    """

    name: str
    ball: Ball
    steps: int
    loss: Literal["ce", "dlr"]

    momentum: ClassVar[float] = 0.75
    rising: ClassVar[float] = 0.75

    @property
    def aims(self) -> bool:
        return self.loss == "dlr"

    def schedule(self) -> Any:
        """Of each step its share in the move, and the steps since the last checkpoint, or 0."""
        share = np.full(self.steps, self.momentum, np.float32)
        share[:1] = 1
        windows = np.zeros(self.steps, np.int32)
        window = max(int(0.22 * self.steps), 1)
        at = window - 1
        while at < self.steps:
            windows[at] = window
            window = max(window - max(int(0.03 * self.steps), 1), max(int(0.06 * self.steps), 1))
            at += window
        return share, windows

    def start(self, logits_of: LogitsOf, targets: Targets) -> ApgdState:
        """From a random image at the border of the ball."""
        images = targets.images
        shape, dtype, linf = images.shape[1:], images.dtype, self.ball.norm == "linf"
        draw = jax.random.uniform if linf else jax.random.normal
        limits = (-1, 1) if linf else ()
        noise = jax.vmap(lambda key: draw(key, shape, dtype, *limits))(targets.keys)
        if linf:
            noise /= jnp.max(jnp.abs(noise), axis=(1, 2, 3), keepdims=True) + _TINY
        else:
            noise = self.ball.direction(noise)
        return self.start_at(logits_of, targets, images + self.ball.eps * noise)

    def start_at(self, logits_of: LogitsOf, targets: Targets, images: jax.Array) -> ApgdState:
        images = self.ball.project(targets.images, images)
        aims = targets.labels
        if self.aims:
            order = jnp.argsort(logits_of(targets.images), axis=1)
            aims = jnp.take(order, -1 - targets.rank, axis=1)
        loss, gradient, is_wrong = _look(logits_of, self.loss, targets, aims, images)
        return ApgdState(
            current=images,
            previous=images,
            gradient=gradient,
            best=images,
            best_gradient=gradient,
            best_loss=loss,
            last_loss=jnp.zeros_like(loss),  # as AutoAttack's code compares the first step with 0
            checked_loss=loss,
            increases=jnp.zeros(loss.shape, jnp.int32),
            halved=jnp.ones(loss.shape, bool),
            step_size=jnp.full((len(images), 1, 1, 1), 2 * self.ball.eps, images.dtype),
            aims=aims,
            seen=Seen(images, is_wrong),
        )

    def step(
        self, logits_of: LogitsOf, targets: Targets, state: ApgdState, at: tuple[Any, Any]
    ) -> ApgdState:
        share, window = at
        x, ball = state.current, self.ball
        ascended = ball.ascend(targets.images, x, state.gradient, state.step_size)
        moved = x + share * (ascended - x) + (1 - share) * (x - state.previous)
        moved = ball.project(targets.images, moved)

        loss, gradient, is_wrong = _look(logits_of, self.loss, targets, state.aims, moved)
        better = loss > state.best_loss
        state = state._replace(
            current=moved,
            previous=x,
            gradient=gradient,
            best=_choose(better, moved, state.best),
            best_gradient=_choose(better, gradient, state.best_gradient),
            best_loss=jnp.maximum(loss, state.best_loss),
            last_loss=loss,
            increases=state.increases + (loss > state.last_loss),
            seen=state.seen.add(moved, is_wrong),
        )
        return self._checked(state, window)

    def _checked(self, state: ApgdState, window: jax.Array) -> ApgdState:
        """The state after what happens at a checkpoint, if `window` is above 0."""
        stuck = ~state.halved & (state.checked_loss >= state.best_loss)
        halve = (state.increases <= self.rising * window) | stuck
        back = halve & (window > 0)
        factor = jnp.where(back, 0.5, 1).astype(state.step_size.dtype)
        return state._replace(
            current=_choose(back, state.best, state.current),
            gradient=_choose(back, state.best_gradient, state.gradient),
            step_size=state.step_size * factor[:, None, None, None],
            checked_loss=jnp.where(window > 0, state.best_loss, state.checked_loss),
            increases=jnp.where(window > 0, 0, state.increases),
            halved=jnp.where(window > 0, halve, state.halved),
        )

    def found(self, state: ApgdState) -> jax.Array:
        return state.seen.or_else(state.best)


Attack = Pgd | Apgd


def chain(method: str, ball: Ball, steps: int | None, num_classes: int) -> tuple[Attack, ...]:
    """The attacks that a method is made of, from the weakest on; each contains those before it.

    `steps` None: 20 of PGD and 100 of APGD. Steps of PGD are of 2.5 eps / steps, Madry's rule.
    """
    pgd_steps = steps or 20
    attacks: list[Attack] = [
        Pgd("fgsm", ball, 1, ball.eps, random_start=False),
        Pgd("pgd", ball, pgd_steps, 2.5 * ball.eps / pgd_steps),
        Apgd("apgd-ce", ball, steps or 100, "ce"),
    ]
    if num_classes >= 4:  # which the loss takes
        attacks.append(Apgd("apgd-t", ball, steps or 100, "dlr"))
    return tuple(attacks[: METHODS[method]])


METHODS = {"fgsm": 1, "pgd": 2, "apgd": 4}


def make_runner(
    attack: Attack, logits_of: Callable[[Any, jax.Array], jax.Array], platform: str
) -> Callable[[Any, Targets], jax.Array]:
    """Returns `run(variables, targets) -> adversarial images`, compiled for a platform.

    On CPUs one program a step: XLA runs convolutions inside a loop on one thread there.
    """

    def bound(function: Callable) -> Callable:
        return lambda variables, *rest: function(lambda images: logits_of(variables, images), *rest)

    start, step = bound(attack.start), bound(attack.step)

    def whole(variables: Any, targets: Targets) -> jax.Array:
        state, _ = jax.lax.scan(
            lambda state, at: (step(variables, targets, state, at), None),
            start(variables, targets),
            attack.schedule(),
        )
        return attack.found(state)

    if platform != "cpu":
        return jax.jit(whole)
    start, step, found = jax.jit(start), jax.jit(step), jax.jit(attack.found)
    schedule = attack.schedule()

    def run(variables: Any, targets: Targets) -> jax.Array:
        state = start(variables, targets)
        for index in range(attack.steps):
            at = jax.tree.map(lambda x, index=index: x[index], schedule)
            state = step(variables, targets, state, at)
        return found(state)

    return run


def _look(
    logits_of: LogitsOf, loss: str, targets: Targets, aims: jax.Array, images: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The loss [B], its gradient by the images, and whether the network is wrong about each."""

    def total(images: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits = logits_of(images)
        losses = LOSSES[loss](logits, targets.labels, aims)
        return losses.sum(), (losses, logits.argmax(axis=1) != targets.labels)

    gradient, (losses, is_wrong) = jax.grad(total, has_aux=True)(images)
    return losses, gradient, is_wrong


def _choose(condition: jax.Array, true: jax.Array, false: jax.Array) -> jax.Array:
    return jnp.where(condition[:, None, None, None], true, false)
