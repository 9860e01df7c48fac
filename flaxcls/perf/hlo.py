"""What a compiled program sends between devices, read off its HLO text."""

import re
from collections import Counter
from math import prod
from typing import NamedTuple

from flaxcls.perf.hlo_text import Module, arrays

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"({_KINDS})(-start)?")
# What a TPU sends while it computes is in each operator of that time, with the same channel.
_IN_PIECES = re.compile(r'channel_id=(\d+).*"async_collective_fusion_config"')


class Collective(NamedTuple):
    """Operations of one kind that a program does between devices.

    Attributes:
      kind: such as "all-reduce".
      count: operations that one run of the program does; an asynchronous one counts once.
      bytes: that they take in on a device, or give out where that is more (all-gather); how often
        these cross a link depends on the algorithm and the network.
    """

    kind: str
    count: int
    bytes: int


def collectives(module: Module) -> list[Collective]:
    """The collectives of a compiled program, in the order of their bytes, the most first.

    What is inside of a loop counts as often as it runs, where the compiler knows that; once
    otherwise. All branches of a conditional count.
    """
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    begun = set()  # channels
    for instruction, times in module.instructions(lambda call: not call.opcode.endswith("-done")):
        kind = _COLLECTIVE.fullmatch(instruction.opcode)
        if not kind:
            continue
        if pieces := _IN_PIECES.search(instruction.rest):
            if pieces[1] in begun:
                continue
            begun.add(pieces[1])
        taken = sum(map(_bytes, instruction.operands))
        # A start's result holds its operands.
        given = _bytes(instruction.shape) - (taken if kind[2] else 0)
        counts[kind[1]] += times
        sizes[kind[1]] += times * (given if kind[1] == "all-gather" else taken)
    kinds = (Collective(kind, counts[kind], sizes[kind]) for kind in counts)
    return sorted(kinds, key=lambda collective: -collective.bytes)


def _bytes(shape: str) -> int:
    """The size of an array or of all arrays of a tuple, without what a layout pads."""
    return sum(array.bits * prod(array.sides) // 8 for array in arrays(shape))
