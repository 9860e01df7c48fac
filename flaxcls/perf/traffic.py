"""What a compiled program reads from and writes to a chip's memory, read off its HLO text.

XLA's own count, `cost_analysis`, has as traffic also what is read from and written to a TPU core's
fast memory (VMEM), and an array that is copied there in slices as a whole for each slice.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from flaxcls.perf.hlo import CALLED, COMPUTATION, INSTRUCTION, NAME, TRIPS, bits

# `bf16[128,56,56,64]{0,3,2,1:T(8,128)(2,1)S(1)}`: type, sides, their order from the innermost on,
# the tile that the innermost ones are filled up to, and the memory, where it isn't the chip's main.
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_FREE = re.compile(
    r"parameter|constant|bitcast|tuple|get-tuple-element|after-all|opt-barrier|.*-done|while"
    r"|conditional|call"
)
_COPIES = ("copy-start", "slice-start", "async-start")
_PRODUCTS = re.compile(r" (?:convolution|dot)\(")


class Traffic(NamedTuple):
    """What operators of one kind move, with what layouts pad.

    Attributes:
      kind: "convolutions", matrix products included, with what is fused into them; "copies" to
        and from fast memory; "others".
      count: operators that one run of the program does.
      read, written: bytes of the chip's main memory.
    """

    kind: str
    count: int
    read: int
    written: int


def traffic(text: str) -> list[Traffic]:
    """The memory traffic of `jax.stages.Compiled.as_text()` by kind, the most first.

    What is inside of a loop counts as often as it runs, where the compiler knows that; an operator
    that reads a part of an array counts as if it read it whole, except for copies.
    """
    entry, computations = _computations(text)
    products = {name for name, lines in computations.items() if any(map(_PRODUCTS.search, lines))}
    counts: Counter[str] = Counter()
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def visit(computation: str, times: int) -> None:
        shapes: dict[str, str] = {}
        for line in computations[computation]:
            name, shape, opcode, rest = INSTRUCTION.match(line).groups()
            shapes[name] = shape
            called = CALLED.findall(rest)
            if opcode in ("while", "conditional", "call"):
                trips = TRIPS.search(rest)
                for part in (part.strip(" %{}") for names in called for part in names.split(",")):
                    visit(part, times * (int(trips[1]) if trips else 1))
            if _FREE.fullmatch(opcode):
                continue
            kind = "others"
            if opcode in _COPIES:
                kind = "copies"
            elif _PRODUCTS.search(line) or any(part.strip("%") in products for part in called):
                kind = "convolutions"
            given = [shapes.get(name, "") for name in NAME.findall(rest.partition("), ")[0])]
            read, written = _moved(opcode, shape, given)
            counts[kind] += times
            sizes[kind][0] += times * read
            sizes[kind][1] += times * written

    visit(entry, 1)
    found = (Traffic(kind, counts[kind], *sizes[kind]) for kind in counts)
    return sorted(found, key=lambda one: -one.read - one.written)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The entry's name, and the lines of each computation."""
    entry, name, lines = "", "", defaultdict(list)
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name = head[2]
            entry = name if head[1] else entry
        elif INSTRUCTION.match(line):
            lines[name].append(line)
    return entry, lines


def _moved(opcode: str, shape: str, given: list[str]) -> tuple[int, int]:
    """Bytes of main memory that an instruction reads and writes."""
    results = list(_arrays(shape))
    operands = [array for one in given for array in _arrays(one)]
    if opcode in _COPIES:  # (result, operand, ...), or ((operand), result, ...)
        result = results[0 if opcode == "copy-start" else 1 :][:1]
        size = sum(size for size, _ in result)
        return size * (not operands or operands[0][1]), sum(size for size, main in result if main)
    return sum(size for size, main in operands if main), sum(size for size, main in results if main)


def _arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """The bytes of each array of a shape, with padding, and whether it is in main memory."""
    for dtype, sides, order, layout in _ARRAY.findall(shape):
        sizes = [int(side) for side in sides.split(",") if side]
        inner_first = [sizes[int(i)] for i in order.split(",")] if order else sizes[::-1]
        tile = _TILE.search(layout)
        product = bits(dtype)
        for i, size in enumerate(inner_first):
            steps = [int(step) for step in tile[1].split(",")][::-1] if tile else []
            product *= -(-size // steps[i]) * steps[i] if i < len(steps) else size
        yield product // 8, "S(" not in layout
