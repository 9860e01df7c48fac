"""Durations with a unit: "90 epochs", "5000 steps", "5%" of the run, "10 minutes"."""

import math
import re
from typing import NamedTuple

from flaxcls.errors import ConfigError

UNITS = "'90 epochs', '5000 steps', '1.28e6 examples' or '5%' of the run"
SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600}


class Duration(NamedTuple):
    """A length: `value` in `unit`, one of "epochs", "steps", "examples", "%" and "seconds"."""

    value: float
    unit: str


def parse_duration(text: str) -> Duration:
    """Reads "90 epochs", "5000 steps", "1.28e6 examples", "5%" and times such as "10 minutes".

    Times may be in seconds, minutes or hours, and come out in seconds. Raises ConfigError for
    anything else, and for what is below 0.
    """
    match = re.fullmatch(r"\s*([-+]?[\d_]*\.?\d+(?:e[-+]?\d+)?)\s*([a-z]+|%)\s*", str(text), re.I)
    try:
        value = float(match[1]) if match else math.nan
    except ValueError:
        value = math.nan
    unit = match[2].lower().removesuffix("s") if match else ""
    unit = unit if unit == "%" else unit + "s"
    value, unit = value * SECONDS.get(unit, 1), "seconds" if unit in SECONDS else unit
    if not math.isfinite(value) or unit not in ("epochs", "steps", "examples", "%", "seconds"):
        raise ConfigError(
            f"a duration is a number and a unit, such as {UNITS} (or, between actions, "
            f"'30 seconds', '10 minutes', '2 hours'), got {text!r}"
        )
    if value < 0:
        raise ConfigError(f"a duration can't be negative, got {text!r}")
    return Duration(value, unit)


def in_steps(
    duration: str, *, batch_size: int, num_examples: int, total_steps: int | None = None
) -> float:
    """The duration in steps, which need not be a whole number.

    Args:
      duration: see `parse_duration`; a time has no number of steps and is refused.
      batch_size: examples per step, over all devices.
      num_examples: examples an epoch, which is num_examples / batch_size steps, whole or not.
      total_steps: length of the run, for "%"; None while it is not known.
    """
    value, unit = parse_duration(duration)
    if unit == "seconds":
        raise ConfigError(f"{duration!r} is a time; here a duration is {UNITS}")
    if unit == "%" and total_steps is None:
        raise ConfigError(f"the length of the run can't be a part of itself, got {duration!r}")
    if unit == "%" and value > 100:
        raise ConfigError(f"a part of the run is at most 100%, got {duration!r}")
    steps_per_unit = {
        "steps": 1,
        "examples": 1 / batch_size,
        "epochs": num_examples / batch_size,
        "%": (total_steps or 0) / 100,
    }
    steps = value * steps_per_unit[unit]
    if not math.isfinite(steps):
        raise ConfigError(f"a duration of {duration!r} is more steps than can be counted")
    return steps


def to_steps(
    duration: str, *, batch_size: int, num_examples: int, total_steps: int | None = None
) -> int:
    """The duration in steps, rounded to the nearest; arguments as those of `in_steps`."""
    return round(
        in_steps(
            duration, batch_size=batch_size, num_examples=num_examples, total_steps=total_steps
        )
    )
