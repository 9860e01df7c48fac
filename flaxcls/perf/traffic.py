"""What a compiled program reads from and writes to a chip's memory, read off its HLO text.

XLA's own count, `cost_analysis`, has as traffic also what is read from and written to a TPU core's
fast memory (VMEM), and an array that is copied there in slices as a whole for each slice.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from flaxcls.perf.hlo_text import Instruction, Module, arrays

_TILE = re.compile(r"T\(([\d,]+)\)")
_FREE = re.compile(
    r"parameter|constant|bitcast|tuple|get-tuple-element|after-all|opt-barrier|.*-done|while"
    r"|conditional|call"
)
_CONTROL = ("while", "conditional", "call")
_COPIES = ("copy-start", "slice-start", "async-start")
_PRODUCTS = ("convolution", "dot")
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATE = "dynamic-update-slice"
_MOVES = ("bitcast", "copy", "pad", "reshape", "transpose")  # within a fusion, of what is asked for
_KERNELS = re.compile(r'custom_call_target="(__cublas|__cudnn|tpu_custom_call)')


class Traffic(NamedTuple):
    """What operators of one kind move, with what layouts pad.

    Attributes:
      kind: "convolutions", with matrix products, attention's kernels and all that is fused into
        these; "copies" to and from fast memory; "others".
      count: operators that one run of the program does.
      read, written: bytes of the chip's main memory.
    """

    kind: str
    count: int
    read: int
    written: int


def traffic(module: Module) -> list[Traffic]:
    """The memory traffic of a compiled program by kind, the most first.

    What is inside of a loop counts as often as it runs, where the compiler knows that. An array of
    which an operator takes nothing but slices, or updates nothing else, counts as these.
    """
    products = {
        name
        for name, instructions in module.computations.items()
        if any(map(_is_product, instructions))
    }
    counts: Counter[str] = Counter()
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for instruction, times, read, written in operators(module):
        kind = "others"
        if instruction.opcode in _COPIES:
            kind = "copies"
        elif _is_product(instruction) or not products.isdisjoint(instruction.called):
            kind = "convolutions"
        counts[kind] += times
        sizes[kind][0] += times * read
        sizes[kind][1] += times * written
    found = (Traffic(kind, counts[kind], *sizes[kind]) for kind in counts)
    return sorted(found, key=lambda one: -one.read - one.written)


def operators(module: Module) -> Iterator[tuple[Instruction, int, int, int]]:
    """What a run does one by one: how often, and the bytes that it reads and writes each time."""
    # What is fused is done within the operator that has it.
    for instruction, times in module.instructions(lambda call: call.opcode in _CONTROL):
        if not _FREE.fullmatch(instruction.opcode):
            yield instruction, times, *_moved(instruction, module)


def _is_product(instruction: Instruction) -> bool:
    return instruction.opcode in _PRODUCTS or bool(_KERNELS.search(instruction.rest))


def _moved(instruction: Instruction, module: Module) -> tuple[int, int]:
    """Bytes of main memory that an instruction reads and writes."""
    results = list(_arrays(instruction.shape))
    if instruction.opcode in _COPIES:  # (result, operand, ...), or ((operand), result, ...)
        operands = [array for shape in instruction.operands for array in _arrays(shape)]
        result = results[0 if instruction.opcode == "copy-start" else 1 :][:1]
        size = sum(size for size, _ in result)
        return size * (not operands or operands[0][1]), sum(size for size, main in result if main)
    read = sum(
        min(_in_main_memory(shape), _taken(instruction, position, module))
        for position, shape in enumerate(instruction.operands)
    )
    made = _made(instruction, len(results), module)
    written = sum(
        main and min(size, made) for (size, main), made in zip(results, made, strict=True)
    )
    return int(read), int(written)


def _taken(user: Instruction, position: int, module: Module) -> float:
    """Bytes that an instruction reads of an operand; infinite where that is all of it."""
    if position == 0 and user.opcode in _SLICES:
        return _size(user.shape)
    if position == 0 and user.opcode == _UPDATE:
        return 0
    if user.opcode != "fusion":
        return math.inf
    inside = module.computations[user.called[0]]
    for one in inside:
        if one.opcode == "parameter" and one.rest.startswith(f"{position})"):
            return _taken_inside(one.name, inside, module)
    return math.inf


def _taken_inside(name: str, inside: Sequence[Instruction], module: Module) -> float:
    uses = [(user, i) for user in inside for i, used in enumerate(user.names) if used == name]
    if not uses:
        return math.inf
    return sum(
        _taken_inside(user.name, inside, module)
        if user.opcode in _MOVES
        else _taken(user, position, module)
        for user, position in uses
    )


def _made(instruction: Instruction, results: int, module: Module) -> list[float]:
    """Bytes that an instruction writes of each result; infinite where that is all of it."""
    inside, made = {}, [instruction]
    if instruction.opcode == "fusion":
        inside = {one.name: one for one in module.computations[instruction.called[0]]}
        *_, root = inside.values()
        made = [inside[name] for name in root.names] if root.opcode == "tuple" else [root]
    if len(made) != results:
        return [math.inf] * results
    return [_updated(one, inside) for one in made]


def _updated(made: Instruction, inside: Mapping[str, Instruction]) -> float:
    """Bytes that are new in what is made by updates of an array that a fusion is given."""
    one, new = made, 0
    while one is not None and one.opcode in (_UPDATE, "bitcast"):
        new += _size(one.operands[1]) if one.opcode == _UPDATE else 0
        one = inside.get(one.names[0])
    is_given = one is None or one.opcode == "parameter"
    return new if new and is_given else math.inf


def _size(shape: str) -> int:
    return sum(size for size, _ in _arrays(shape))


def _in_main_memory(shape: str) -> int:
    return sum(size for size, main in _arrays(shape) if main)


def _arrays(shape: str) -> Iterator[tuple[int, bool]]:
    """The bytes of each array of a shape, with padding, and whether it is in main memory."""
    for array in arrays(shape):
        # The innermost axes are filled up to the tile's, `T(8,128)`; "S" is other memory than main.
        tile = _TILE.search(array.layout)
        steps = [int(step) for step in tile[1].split(",")][::-1] if tile else []
        steps += [1] * (len(array.sides) - len(steps))
        product = array.bits
        for axis, step in zip(array.inner_first, steps, strict=False):
            product *= -(-array.sides[axis] // step) * step
        yield product // 8, "S(" not in array.layout
