"""How long a run is and how often things happen in it, in steps."""

from typing import NamedTuple

from ml_collections import ConfigDict

from flaxcls.build.validate import about
from flaxcls.config import durations
from flaxcls.config.durations import Duration, parse_duration
from flaxcls.config.tree import get
from flaxcls.errors import ConfigError

_MOST_STEPS = 2**31 - 1  # that a state can count


class Length(NamedTuple):
    """The length of a run in steps of `batch_size` of its `num_examples`."""

    total_steps: int
    batch_size: int
    num_examples: int

    @property
    def steps_per_epoch(self) -> float:
        return self.num_examples / self.batch_size

    def in_steps(self, duration: str) -> float:
        """A duration in steps, which need not be a whole number."""
        return durations.in_steps(duration, **self._asdict())

    def to_steps(self, duration: str) -> int:
        """A duration in steps, rounded to the nearest."""
        return durations.to_steps(duration, **self._asdict())


def run_length(config: ConfigDict, num_examples: int) -> Length:
    """The length of the run for a training split of that size."""
    sizes = {"batch_size": config.batch_size, "num_examples": num_examples}
    with about("duration"):
        total_steps = durations.in_steps(config.duration, **sizes)
    if total_steps > _MOST_STEPS:
        raise ConfigError(
            f"config.duration must be at most {_MOST_STEPS:,} steps, got {config.duration!r}, "
            f"which are {total_steps:.3g}"
        )
    if total_steps == 0 and config.init_from is not None:
        return Length(0, **sizes)  # the weights are evaluated and saved as they are
    if total_steps <= 0.5:
        raise ConfigError(f"config.duration must be at least a step, got {config.duration!r}")
    return Length(round(total_steps), **sizes)


def interval(config: ConfigDict, field: str, run: Length, *, may_be_time: bool = False) -> Duration:
    """What a field says of how often something is due: every so many steps or, perhaps, seconds."""
    text = get(config, field)
    with about(field):
        duration = parse_duration(text)
        if not (may_be_time and duration.unit == "seconds"):
            steps = run.in_steps(text)
            # A small part of a short run, or an epoch of few examples, may be less than a step.
            if duration.unit == "%" or (duration.unit == "epochs" and duration.value >= 1):
                steps = max(1, steps)
            duration = Duration(steps, "steps")
    if duration.value < 1:
        raise ConfigError(f"config.{field} must be at least a step, got {text!r}")
    return duration


def profiled_steps(config: ConfigDict, run: Length) -> range:
    """The updates, counted from 0, of which config.profile asks for a trace; empty: of none."""
    given = {end: config.profile[end] for end in ("start", "stop")}
    if all(text is None for text in given.values()):
        return range(0)
    steps = {}
    for end, text in given.items():
        if text is None:
            raise ConfigError(
                f"config.profile.{end} is missing: a trace needs config.profile.start and "
                "config.profile.stop, such as '100 steps' and '105 steps'"
            )
        with about(f"profile.{end}"):
            steps[end] = run.to_steps(text)
    if steps["stop"] > run.total_steps:
        raise ConfigError(
            f"config.profile.stop must be within the run, which has {run.total_steps:,} steps, got "
            f"{given['stop']!r}"
        )
    if steps["start"] >= steps["stop"]:
        raise ConfigError(
            f"config.profile.start must be at least a step before config.profile.stop, got "
            f"{given['start']!r} and {given['stop']!r}"
        )
    return range(steps["start"], steps["stop"])
