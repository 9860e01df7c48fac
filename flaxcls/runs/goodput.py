"""Where the seconds of a run go, over all its restarts.

Each second is in one category: "startup" (of the process, up to the loop), "compile", "data_wait",
"step", "evaluate", "save" (the part that training waits for), "lost" (whatever was spent after the
checkpoint that a restart or a rollback went back to) or "down" (between the last sign of life of a
process and the start of the next). Goodput is the share of "step".

The totals are part of every checkpoint, as the seconds that led to its state. goodput.json in the
run's folder says how much was spent beyond that, when the process was last alive and how long its
start took, and is for people to read.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flaxcls.buckets import AnyPath
from flaxcls.errors import ConfigError
from flaxcls.files import read_json, write_json

NAMES = {  # as a sentence says them
    "startup": "starting",
    "compile": "compiling and initialising",
    "data_wait": "waiting for data",
    "step": "stepping",
    "evaluate": "evaluating",
    "save": "saving",
    "lost": "lost",
    "down": "down",
}
STAGES = ("imported", "checked", "read", "initialised", "compiled", "first_step")  # of a start
_MOST_SECONDS = 1e11  # seconds: more than since 1970, some 3,000 years


class Goodput:
    """A clock that always runs, in one category at a time; at first in "startup".

    The devices compute while Python runs ahead: `lap`, and any stretch other than "step" and
    "data_wait", must begin when they are known to have finished.

    Args:
      age: the seconds that "startup" has taken already, such as `process_age()`.
    """

    def __init__(self, age: float = 0.0):
        self._path: AnyPath | None = None
        self._totals = dict.fromkeys(NAMES, 0.0) | {"startup": age}
        self._restarts = 0
        self._age, self._stages = age, dict[str, float]()
        self._category, self._since = "startup", time.perf_counter()
        self._began, self._written = self._since, -math.inf
        self._begin_lap()
        self.reach("imported")

    def resume(self, path: AnyPath | None, saved: Mapping[str, float] | float) -> None:
        """Continues from a checkpoint's `totals`, {} where there is none yet.

        What earlier processes spent beyond it, as goodput.json says, is lost.

        Args:
          path: of goodput.json; None to read and write none, as all processes but the first do.
          saved: seconds by category, or a number: what a run knew before there were categories.
        """
        self._path = path
        saved, earlier, mine = _totals(saved), _read(path), self.totals
        began = time.time() - sum(mine.values())
        self._totals = _rolled_back(saved, earlier.seconds)
        self._totals["down"] += max(0.0, began - earlier.last_sign_of_life)
        for category, seconds in mine.items():
            self._totals[category] += seconds
        if any(saved.values()) or any(earlier.seconds.values()):
            self._restarts = earlier.restarts + 1
        self._begin_lap()

    def reach(self, stage: str) -> None:
        """Notes when this process came to one of STAGES for the first time."""
        if stage not in self._stages:
            self._stages[stage] = self._age + time.perf_counter() - self._began

    def roll_back(self, saved: Mapping[str, float] | float) -> None:
        """Continues from an earlier checkpoint's `totals`; what was spent since then is lost."""
        self._totals = _rolled_back(_totals(saved), self.totals)
        self._begin_lap()

    @contextlib.contextmanager
    def spending(self, category: str) -> Iterator[None]:
        """Counts what is inside for `category`, one of NAMES; a stretch inside it for its own."""
        outer = self._category
        self._switch(category)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, category: str) -> None:
        now = time.perf_counter()
        self._totals[self._category] += now - self._since
        self._category, self._since = category, now

    @property
    def totals(self) -> dict[str, float]:
        """The seconds of each category so far."""
        self._switch(self._category)
        return dict(self._totals)

    def lap(self, steps: int) -> tuple[float, float]:
        """Ends a stretch of `steps` steps: its steps per second and share of time spent waiting."""
        before = self._lap
        self._begin_lap()
        return _rate(steps, {name: self._lap[name] - before[name] for name in self._lap})

    def _begin_lap(self) -> None:
        self._lap = self.totals

    def rate(self, steps: int) -> tuple[float, float]:
        """As `lap`, of the whole run, all of whose steps are `steps`."""
        return _rate(steps, self.totals)

    def write(self, every: float = 0.0) -> None:
        """Writes goodput.json, unless that was less than `every` seconds ago."""
        if self._path is None or time.perf_counter() - self._written < every:
            return
        self._written = time.perf_counter()
        stages = {stage: round(seconds, 3) for stage, seconds in self._stages.items()}
        content = {**self.numbers(), "start": stages, "last_sign_of_life": time.time()}
        with contextlib.suppress(OSError):  # a full disk: training is worth more
            write_json(self._path, content)

    def numbers(self) -> dict[str, Any]:
        """{"goodput": a share, "seconds": of each category, "restarts": their number}; JSON."""
        totals = self.totals
        return {
            "goodput": _goodput(totals),
            "seconds": {name: round(seconds, 3) for name, seconds in totals.items()},
            "restarts": self._restarts,
        }

    def describe(self) -> str:
        """The numbers in a sentence."""
        return describe(self.numbers())


def describe(numbers: Mapping[str, Any]) -> str:
    """`goodput 93.1 %: stepping 512 s, compiling 12 s, ...; 2 restarts`, of `Goodput.numbers`."""
    largest_first = sorted(numbers["seconds"].items(), key=lambda item: -item[1])
    parts = [
        f"{NAMES.get(name, name)} {spent:.0f} s" for name, spent in largest_first if spent >= 0.5
    ]
    text = f"goodput {100 * numbers['goodput']:.1f} %: {', '.join(parts) or 'less than a second'}"
    if restarts := numbers["restarts"]:
        text += f"; {restarts} restart{'s' if restarts > 1 else ''}"
    return text


def process_age() -> float:
    """The seconds since this process began.

    Where the system does not say so, the processor time so far: importing, which most of a start
    is, does little else than compute.
    """
    try:
        # The name, in parentheses, may hold spaces; the start, in ticks since boot, is field 22.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError, ValueError, IndexError):
        return time.process_time()


class _File(NamedTuple):
    """What goodput.json says; the defaults are what a run knows without it."""

    seconds: dict[str, float]
    restarts: int = 0
    last_sign_of_life: float = math.inf


def _read(path: AnyPath | None) -> _File:
    """What an earlier process wrote, as far as it can be used: no run depends on it."""
    try:
        content = read_json(path) if path else {}
        seconds = _totals(content["seconds"])
        found = _File(seconds, int(content["restarts"]), float(content["last_sign_of_life"]))
        if all(0 <= number < _MOST_SECONDS for number in (*seconds.values(), *found[1:])):
            return found
    except (ConfigError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        pass
    return _File(_totals({}))


def _rolled_back(saved: dict[str, float], spent: dict[str, float]) -> dict[str, float]:
    """The totals of a checkpoint when `spent` had been spent: the rest is "lost", save "down"."""
    down = max(saved["down"], spent["down"])
    beyond = sum(spent.values()) - spent["down"] - (sum(saved.values()) - saved["down"])
    # A file that was written before the checkpoint knows less than it.
    return saved | {"lost": saved["lost"] + max(0.0, beyond), "down": down}


def _totals(saved: Mapping[str, float] | Any) -> dict[str, float]:
    """The seconds of all categories, of those that were saved; a number alone is all "step"."""
    if not isinstance(saved, Mapping):
        saved = {"step": saved}
    return {name: float(saved.get(name, 0.0)) for name in NAMES}


def _rate(steps: int, seconds: Mapping[str, float]) -> tuple[float, float]:
    """Steps per second, and the share of the time that waited for data."""
    training = seconds["step"] + seconds["data_wait"]
    return (steps / training, seconds["data_wait"] / training) if training else (0.0, 0.0)


def _goodput(totals: Mapping[str, float]) -> float:
    everything = sum(totals.values())
    return totals["step"] / everything if everything else 0.0
