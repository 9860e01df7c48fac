"""The instructions of a compiled program, read off its HLO text, and how often a run does each."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# `%name = TYPE opcode(`, where a TYPE may be a tuple and has layouts such as {1,0:T(8,128)S(1)}.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"%([\w.\-]+)")
# `bf16[128,56,56,64]{0,3,2,1:T(8,128)(2,1)S(1)}`: type, sides, axes from the innermost on, layout.
_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)([^}]*)\})?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_INDEX = re.compile(r"index=(\d+)")


class Instruction(NamedTuple):
    """A line of the text.

    Attributes:
      name: of its result, such as "fusion.12".
      opcode: such as "fusion".
      shape: of its result, as the text has it; of several in parentheses.
      names: of what it takes.
      operands: the shapes of these.
      called: the computations that it names.
      trips: how often these run each time that it does, as far as the compiler knows; else once.
      rest: all that comes after its opcode.
    """

    name: str
    opcode: str
    shape: str
    names: tuple[str, ...]
    operands: tuple[str, ...]
    called: tuple[str, ...]
    trips: int
    rest: str


class Array(NamedTuple):
    """An array's type as the text has it.

    Attributes:
      dtype: of its numbers, such as "bf16".
      sides: how long it is.
      inner_first: its axes from the innermost in memory on.
      layout: the rest of what is said of that, such as ":T(8,128)(2,1)S(1)".
    """

    dtype: str
    sides: tuple[int, ...]
    inner_first: tuple[int, ...]
    layout: str

    @property
    def bits(self) -> int:
        """Of a number."""
        if self.dtype in ("token", "opaque"):
            return 0
        number = re.search(r"\d+", self.dtype)
        return int(number[0]) if number else 8  # pred


def arrays(shape: str) -> Iterator[Array]:
    """The array that a type is of, or the arrays of a tuple."""
    for dtype, sides, order, layout in _ARRAY.findall(shape):
        axes = _numbers(order) or tuple(reversed(range(len(_numbers(sides)))))
        yield Array(dtype, _numbers(sides), axes, layout)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def sides(shape: str) -> tuple[int, ...]:
    """Those of an array, or of the first one of several."""
    return next(arrays(shape)).sides


class Module:
    """The computations of `jax.stages.Compiled.as_text()`, each a list of instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = defaultdict(list)
        self._entry = name = ""
        shapes: dict[str, str] = {}
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                name, shapes = head[2], {}
                self._entry = name if head[1] else self._entry
            elif found := _INSTRUCTION.match(line):
                result, shape, opcode, rest = found.groups()
                shapes[result] = shape
                names = tuple(_NAME.findall(rest.partition("), ")[0]))
                self.computations[name].append(
                    Instruction(
                        result,
                        opcode,
                        shape,
                        names,
                        tuple(shapes.get(operand, "") for operand in names),
                        tuple(
                            part.strip(" %{}")
                            for names in _CALLED.findall(rest)
                            for part in names.split(",")
                        ),
                        self._trips(rest) if opcode == "while" else 1,
                        rest,
                    )
                )

    def _trips(self, rest: str) -> int:
        """How often a loop runs: as the text says or, for TPUs, as its condition does.

        That is `counter < constant`, of a counter from 0 to which the body adds a constant.
        """
        if known := _TRIPS.search(rest):
            return int(known[1])
        condition, body = (
            {one.name: one for one in self.computations[name[1]]} if name else {}
            for name in (_CONDITION.search(rest), _BODY.search(rest))
        )
        for one in condition.values():
            if one.opcode == "compare" and "direction=LT" in one.rest:
                counter, limit = (condition.get(name) for name in one.names)
                return -(-_number(limit) // _step(counter, list(body.values())))
        return 1

    def instructions(
        self, enters: Callable[[Instruction], bool]
    ) -> Iterator[tuple[Instruction, int]]:
        """Each instruction of the program with how often a run does it, in the text's order.

        Those of the computations that are called are among them where `enters` says so of the call;
        all branches of a conditional count.
        """
        times: Counter[str] = Counter()

        def visit(computation: str, number: int) -> None:
            times[computation] += number
            for instruction in filter(enters, self.computations[computation]):
                for called in instruction.called:
                    visit(called, number * instruction.trips)

        visit(self._entry, 1)
        for name, instructions in self.computations.items():
            if times[name]:
                yield from ((instruction, times[name]) for instruction in instructions)


def _number(instruction: Instruction | None) -> int:
    """Of a constant; 1 of anything else."""
    is_constant = instruction is not None and instruction.opcode == "constant"
    number = instruction.rest.partition(")")[0] if is_constant else ""
    return int(number) if number.isdecimal() else 1


def _step(counter: Instruction | None, body: Sequence[Instruction]) -> int:
    """What a loop's body adds to the part of its state that is its counter."""
    index = _INDEX.search(counter.rest) if counter is not None else None
    if not index or not body or int(index[1]) >= len(body[-1].names):
        return 1
    by_name = {one.name: one for one in body}
    added = by_name.get(body[-1].names[int(index[1])])
    if added is None or added.opcode != "add":
        return 1
    return max(1, *(_number(by_name.get(name)) for name in added.names))
