"""What is done every so many steps or seconds."""

import time

from flaxcls.config.durations import Duration
from flaxcls.runtime import processes


class Due:
    """Says after which steps something is due: every so many steps or seconds, and at the end.

    All processes must say the same, so the clock is process 0's; as asking it takes them a moment,
    what is due by time `may_wait` for a step at which they have to stop anyway.
    """

    def __init__(self, interval: Duration, total_steps: int):
        self._interval, self._total_steps = interval, total_steps
        self._last = time.monotonic()

    def at(self, step: int) -> bool:
        """Whether it is due after a step whatever the time: a pure function of the step."""
        if step == self._total_steps:
            return True
        if self._interval.unit != "steps":
            return False
        # An epoch need not be a whole number of them.
        return step // self._interval.value > (step - 1) // self._interval.value

    def __call__(self, step: int, may_wait: bool = False) -> bool:
        if step == self._total_steps or self._interval.unit == "steps":
            return self.at(step)
        if may_wait:
            return False
        due = bool(processes.agree(time.monotonic() - self._last >= self._interval.value))
        if due:
            self._last = time.monotonic()
        return due
