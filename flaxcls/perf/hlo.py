"""What a compiled program computes and sends between devices, read off its HLO text."""

import re
from collections import Counter, defaultdict
from typing import NamedTuple

import jax

from flaxcls.runtime import onednn

_KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all"
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# `%name = TYPE opcode(`, where a TYPE may be a tuple and has layouts such as {1,0:T(8,128)S(1)}.
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_COLLECTIVE = re.compile(rf"({_KINDS})(-start)?")
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
NAME = re.compile(r"%([\w.\-]+)")
# What a TPU sends while it computes is in each operator of that time, with the same channel.
_IN_PIECES = re.compile(r'channel_id=(\d+).*"async_collective_fusion_config"')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def flops(compiled: jax.stages.Compiled, text: str) -> float:
    """Of one run on one device, as XLA counts them; 0 where it does not.

    Of what oneDNN computes XLA knows nothing; it is added here, from `compiled.as_text()`.
    """
    counted = (compiled.cost_analysis() or {}).get("flops", 0.0)
    return counted + sum(onednn.flops(text)) if counted else 0.0


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


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, in the order of their bytes, the most first.

    Args:
      text: `jax.stages.Compiled.as_text()`. What is inside of a loop counts as often as it runs,
        where the compiler knows that; once otherwise. All branches of a conditional count.
    """
    entry, calls, found = _read(text)
    times: Counter[str] = Counter()

    def visit(computation: str, number: int) -> None:
        times[computation] += number
        for called, trips in calls[computation]:
            visit(called, number * trips)

    visit(entry, 1)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for computation, kind, size in found:
        counts[kind] += times[computation]
        sizes[kind] += times[computation] * size
    kinds = (Collective(kind, counts[kind], sizes[kind]) for kind in counts if counts[kind])
    return sorted(kinds, key=lambda collective: -collective.bytes)


def _read(text: str) -> tuple[str, dict, list[tuple[str, str, int]]]:
    """The entry's name, what each computation calls how often, and (where, kind, bytes) of all."""
    entry = computation = ""
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    found, sizes, begun = [], {}, set()
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            computation = head[2]
            entry = computation if head[1] else entry
            continue
        instruction = INSTRUCTION.match(line)
        if not instruction:
            continue
        name, shape, opcode, rest = instruction.groups()
        sizes[name] = _bytes(shape)
        trips = TRIPS.search(rest) if opcode == "while" else None
        for called in () if opcode.endswith("-done") else CALLED.findall(rest):
            names = [part.strip(" %{}") for part in called.split(",")]
            calls[computation] += [(part, int(trips[1]) if trips else 1) for part in names]
        if kind := _COLLECTIVE.fullmatch(opcode):
            if pieces := _IN_PIECES.search(rest):
                if pieces[1] in begun:
                    continue
                begun.add(pieces[1])
            taken = sum(sizes[name] for name in NAME.findall(rest.partition("), ")[0]))
            given = sizes[name] - (taken if kind[2] else 0)  # a start's result holds its operands
            found.append((computation, kind[1], given if kind[1] == "all-gather" else taken))
    return entry, calls, found


def _bytes(shape: str) -> int:
    """The size of an array or of all arrays of a tuple, without what a layout pads."""
    return sum(
        bits(dtype) * _product(dimensions) // 8 for dtype, dimensions in _ARRAY.findall(shape)
    )


def bits(dtype: str) -> int:
    """Of a number of that type, as HLO names it."""
    if dtype in ("token", "opaque"):
        return 0
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8  # pred


def _product(dimensions: str) -> int:
    product = 1
    for size in filter(None, dimensions.split(",")):
        product *= int(size)
    return product
