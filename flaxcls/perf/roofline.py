"""The least time that a compiled program can take on a chip: by what it computes and moves."""

from typing import NamedTuple

from flaxcls.perf.devices import Chip
from flaxcls.perf.flops import flops_of
from flaxcls.perf.hlo_text import Module
from flaxcls.perf.traffic import operators


class Roofline(NamedTuple):
    """Seconds that a run on a chip takes at least, at its published peaks.

    Attributes:
      flops: of all that it computes.
      memory: of all that it moves to and from the chip's main memory.
      operators: that it does one after the other, each with the slower of its products and its own
        traffic; copies to fast memory and what is sent are made beside them.
    """

    flops: float
    memory: float
    operators: float

    @property
    def seconds(self) -> float:
        return max(self)


def roofline(module: Module, chip: Chip, flops: float) -> Roofline:
    """Of a compiled program that computes so many FLOPs (Williams et al. 2009)."""
    moved, seconds = 0, 0.0
    for operator, times, read, written in operators(module):
        moved += times * (read + written)
        if not operator.opcode.endswith("-start"):
            of_memory = (read + written) / chip.hbm_bandwidth
            seconds += times * max(flops_of(operator, module) / chip.peak_flops, of_memory)
    return Roofline(flops / chip.peak_flops, moved / chip.hbm_bandwidth, seconds)
