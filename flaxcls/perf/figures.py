"""Measured figures: how they are taken, said and stored."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flaxcls.runtime.output import write_result

Figures = dict[str, dict[str, Any]]  # by name {"value": number, "unit": str}, maybe "rounds"


class Effort(NamedTuple):
    """How much is measured: `rounds` of `steps` steps; one round more comes first and warms up."""

    steps: int
    rounds: int


def rates_of(work: Callable[[], int], rounds: int) -> list[float]:
    """Examples/s of every round of `work`, which returns their number."""
    rates = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        count = work()
        rates.append(count / (time.perf_counter() - start))
    return rates[1:]  # the first round warms up


def print_rates(rates: Sequence[float]) -> None:
    write_result("images/s: " + ", ".join(f"{rate:,.0f}" for rate in rates))
    write_result(f"median {statistics.median(rates):,.0f} images/s")


def figure(value: float | Sequence[float], unit: str) -> dict[str, Any]:
    """A figure, or the median of those of the rounds and all of them."""
    if isinstance(value, Sequence):
        return {"value": statistics.median(value), "unit": unit, "rounds": list(value)}
    return {"value": value, "unit": unit}
