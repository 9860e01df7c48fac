"""Learning rates as functions of the step."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.config.durations import parse_duration
from flaxcls.config.options import NonNegative, UpToOne, accepted, check, look_up
from flaxcls.config.user_code import file_of, in_user_code, is_path
from flaxcls.errors import ConfigError


class Run(NamedTuple):
    """The steps of a schedule: after the warm-up and before the cooldown.

    Attributes:
      start: the first step after the warm-up.
      end: the step at which the schedule has arrived at its end.
      to_steps: turns a duration into steps.
    """

    start: int
    end: int
    to_steps: Callable[[str], int]

    def progress(self, step: jax.Array) -> jax.Array:
        """0 at `start` and before, 1 at `end` and after."""
        return jnp.clip((step - self.start) / max(self.end - self.start, 1), 0, 1)


# A schedule is `schedule(run, /, *, ...)`; what comes after the star are its options. It returns
# the rate as a multiple of the peak, a function of the step, a float32 scalar.
Factor = Callable[[jax.Array], jax.Array]


def constant(run: Run, /) -> Factor:
    """The peak rate throughout."""
    del run
    return lambda step: jnp.ones_like(step)


def piecewise(
    run: Run,
    /,
    *,
    boundaries: tuple[str, ...] = ("33.3333%", "66.6667%", "88.8889%"),
    factor: NonNegative = 0.1,
) -> Factor:
    """Times `factor` at each boundary, a duration from the beginning of the run, warm-up included.

    The default is ImageNet's at 30, 60 and 80 of 90 epochs. At the boundary's step itself the new
    rate holds, as in PyTorch's MultiStepLR.
    """
    steps = np.asarray([run.to_steps(boundary) for boundary in boundaries], np.float32)
    if (np.diff(steps) < 0).any():
        raise ConfigError(f"config.schedule.boundaries must go forward, got {tuple(boundaries)}")
    return lambda step: np.float32(factor) ** jnp.sum(step >= steps)


def cosine(run: Run, /, *, final: UpToOne = 0.0) -> Factor:
    """From 1 to `final` along half a cosine (Loshchilov & Hutter 2017)."""
    return lambda step: final + (1 - final) * (1 + jnp.cos(jnp.pi * run.progress(step))) / 2


def polynomial(run: Run, /, *, power: NonNegative = 2.0, final: UpToOne = 0.0) -> Factor:
    """From 1 to `final` as (1 - progress)^power."""
    return lambda step: final + (1 - final) * (1 - run.progress(step)) ** power


def linear(run: Run, /, *, final: UpToOne = 0.0) -> Factor:
    """From 1 to `final` in a straight line."""
    return lambda step: final + (1 - final) * (1 - run.progress(step))


def one_cycle(
    run: Run, /, *, peak: str = "30%", start: UpToOne = 0.04, final: UpToOne = 0.0
) -> Factor:
    """A triangle: straight from `start` up to 1 at the duration `peak`, straight down to `final`.

    As in the fast CIFAR-10 recipes (airbench: peak 23%, start 0.2, final 0.07), and as PyTorch's
    OneCycleLR with `anneal_strategy="linear"` but for its ends lying one step earlier.
    """
    top = min(run.start + run.to_steps(peak), run.end)  # a run may be cut short, to try something
    # Interpolation needs increasing points: with the peak at either end, that leg has no length.
    legs = [(run.start, start), (top, 1.0), (run.end, final)]
    legs = [leg for leg in legs if leg[0] != top or leg[1] == 1.0]
    steps, factors = (np.asarray(column, np.float32) for column in zip(*legs, strict=True))
    return lambda step: jnp.interp(step, steps, factors)


def exponential(run: Run, /, *, decay: UpToOne = 0.97, every: str = "1 epochs") -> Factor:
    """Times `decay` for each duration `every` since the warm-up, smoothly."""
    steps = run.to_steps(every)
    if parse_duration(every).unit == "%":  # a small part of a short run may be less than a step
        steps = max(1, steps)
    if steps < 1:
        raise ConfigError(f"`every` of exponential must be at least one step, got {every!r}")
    return lambda step: np.float32(decay) ** ((step - run.start) / steps)


SCHEDULES: dict[str, Callable[..., Factor]] = {
    "constant": constant,
    "step": piecewise,
    "cosine": cosine,
    "linear": linear,
    "one_cycle": one_cycle,
    "polynomial": polynomial,
    "exponential": exponential,
}


def fitted(warmup: int, cooldown: int, total_steps: int) -> tuple[int, int]:
    """Steps of warm-up and cooldown, shortened in proportion where the run has not so many."""
    if warmup + cooldown <= total_steps:
        return warmup, cooldown
    warmup = warmup * total_steps // (warmup + cooldown)
    return warmup, (total_steps - warmup if cooldown else 0)


def build(
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    to_steps: Callable[[str], int],
    warmup: str | None = None,
    warmup_start: UpToOne = 0.0,
    cooldown: str | None = None,
    **options,
) -> Callable[[jax.Array | int], jax.Array]:
    """Returns `rate(step)`, the learning rate (float32) of update number `step`, counted from 0.

    The warm-up goes straight up: with w steps of it, step s < w has the share
    warmup_start + (1 - warmup_start) (s + 1) / w of the peak. So no step is wasted on a rate of 0,
    and step w - 1 and step w, the schedule's first, both have the peak. The schedule is at its end
    at step `total_steps`, the first one that is not made; with a cooldown of c steps, c steps
    earlier, and its final rate is then multiplied by (total_steps - s) / c.

    Args:
      name: one of SCHEDULES, or a user's own.
      learning_rate: the peak.
      total_steps: length of the run in steps.
      to_steps: turns a duration into steps; see the function of that name.
      warmup: a duration; None for none.
      warmup_start: share of the peak from which the warm-up rises.
      cooldown: a duration; None for none. See `fitted` for runs that are too short for both.
      **options: those of the named schedule.

    Raises ConfigError for what is unknown or out of range.
    """
    schedule = look_up("config.schedule.name", name, SCHEDULES)
    own = {"warmup": warmup, "warmup_start": warmup_start, "cooldown": cooldown}
    check("config.schedule", name, own, accepted(build))
    options = check("config.schedule", name, options, accepted(schedule))
    if not (math.isfinite(learning_rate) and learning_rate >= 0):
        raise ConfigError(
            f"config.optimizer.learning_rate must be a number of at least 0, got {learning_rate}"
        )
    warmup_steps, cooldown_steps = fitted(
        to_steps(warmup) if warmup else 0, to_steps(cooldown) if cooldown else 0, total_steps
    )
    end = total_steps - cooldown_steps
    if name == "one_cycle" and warmup_steps:
        raise ConfigError("one_cycle rises to its `peak` by itself; `warmup` must be None with it")
    factor = schedule(Run(warmup_steps, end, to_steps), **options)
    if is_path(name):
        _check_factor(name, factor, file_of(schedule))

    def rate(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)  # exact up to 2^24 steps
        body = factor(jnp.clip(step, warmup_steps, end))
        if warmup_steps:
            share = warmup_start + (1 - warmup_start) * (step + 1) / warmup_steps
            body = jnp.where(step < warmup_steps, share, body)
        if cooldown_steps:
            body = body * jnp.clip((total_steps - step) / cooldown_steps, 0, 1)
        return jnp.asarray(learning_rate * body, jnp.float32)

    return rate


def _check_factor(name: str, factor: Factor, file: str) -> None:
    """ConfigError unless what a user's own schedule has made turns a step into a number."""
    rate = None
    if callable(factor):
        with in_user_code(file):
            rate = jax.eval_shape(factor, jax.ShapeDtypeStruct((), jnp.float32))
    if getattr(rate, "shape", None) != ():
        raise ConfigError(
            f"{name} must return a function of the step (float32 []) that gives a multiple of the "
            f"peak learning rate (float32 []), got {rate or factor!r:.80}"
        )
