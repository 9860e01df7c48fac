"""What a compiled program reads from and writes to a chip's memory, read off its HLO text.

XLA's own count, `cost_analysis`, has as traffic also what is read from and written to a TPU core's
fast memory (VMEM), and an array that is copied there in slices as a whole for each slice.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from flaxcls.perf.hlo import bits
from flaxcls.perf.hlo_text import Instruction, Module

# `bf16[128,56,56,64]{0,3,2,1:T(8,128)(2,1)S(1)}`: type, sides, their order from the innermost on,
# the tile that the innermost ones are filled up to, and the memory, where it isn't the chip's main.
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)([^}]*)\})?")
_TILE = re.compile(r"T\(([\d,]+)\)")
_FREE = re.compile(
    r"parameter|constant|bitcast|tuple|get-tuple-element|after-all|opt-barrier|.*-done|while"
    r"|conditional|call"
)
_CONTROL = ("while", "conditional", "call")
_COPIES = ("copy-start", "slice-start", "async-start")
_PRODUCTS = ("convolution", "dot")
_SLICES = ("slice", "dynamic-slice", "gather")
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
    which an operator takes nothing but slices counts as these; one that it updates in part, whole.
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
    operands = [array for shape in instruction.operands for array in _arrays(shape)]
    if instruction.opcode in _COPIES:  # (result, operand, ...), or ((operand), result, ...)
        result = results[0 if instruction.opcode == "copy-start" else 1 :][:1]
        size = sum(size for size, _ in result)
        return size * (not operands or operands[0][1]), sum(size for size, main in result if main)
    read = sum(size for size, main in operands if main)
    return read - _skipped(instruction, module), sum(size for size, main in results if main)


def _skipped(instruction: Instruction, module: Module) -> int:
    """Bytes of main memory in none of the slices that are all that an instruction takes of it."""
    if instruction.opcode in _SLICES:
        taken = {instruction.names[0]: instruction.operands[0]}
        inside = [instruction]
    elif instruction.opcode == "fusion":
        inside = module.computations[instruction.called[0]]
        taken = {
            each.name: instruction.operands[int(each.rest.partition(")")[0])]
            for each in inside
            if each.opcode == "parameter"
        }
    else:
        return 0
    skipped = 0
    for name, shape in taken.items():
        users = [each for each in inside if name in each.names]
        if users and all(user.opcode in _SLICES and user.names.index(name) == 0 for user in users):
            whole = sum(size for size, main in _arrays(shape) if main)
            parts = sum(size for user in users for size, _ in _arrays(user.shape))
            skipped += max(0, whole - parts)
    return skipped


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
