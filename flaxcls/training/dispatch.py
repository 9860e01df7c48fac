"""Several steps in one dispatch: light steps on accelerators else wait for Python, not for work.

The batches of k steps are stacked, [k, B, ...], and one compiled loop does the steps in turn. Only
indices are stacked, of examples that are on the devices.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from flaxcls.runtime.sharding import is_stacked

AUTOMATIC = 16  # steps
LIGHT = 1e11  # operations of a device in a step: about a third of a millisecond of a recent GPU


def several_steps(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step(state, data, batch) -> state` that takes a stack of batches, too."""

    def update(state: Any, data: Any, batch: Mapping[str, jax.Array]) -> Any:
        if not is_stacked(batch):
            return step(state, data, batch)
        return jax.lax.scan(lambda state, one: (step(state, data, one), None), state, batch)[0]

    return update


def stacks(
    batches: Iterator[dict[str, np.ndarray]], step: int, steps_at: Callable[[int], int]
) -> Iterator[dict[str, np.ndarray]]:
    """The batches from a step on, as many in one as `steps_at(step)` says; one is not stacked."""
    for batch in batches:
        count = steps_at(step)
        if count > 1:
            several = [batch, *itertools.islice(batches, count - 1)]
            batch = {name: np.stack([one[name] for one in several]) for name in batch}
        yield batch
        step += count


def automatic(compiled: jax.stages.Compiled, platform: str) -> int:
    """How many steps are best one dispatch: AUTOMATIC where a step is light, else 1.

    On CPUs always 1: XLA computes convolutions in a loop on one thread.
    """
    if platform == "cpu":
        return 1
    flops = (compiled.cost_analysis() or {}).get("flops", LIGHT)
    return AUTOMATIC if flops < LIGHT else 1
