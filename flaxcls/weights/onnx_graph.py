"""A graph of ONNX in the making: nodes, constants, and values that know their shapes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

OPSET = 18


class Unsupported(Exception):
    """Something that has no counterpart in the graph; its text names it."""


class Value(NamedTuple):
    """A tensor of the graph by its name, or an array that is known.

    `shape` is its own, of ints and of JAX's dimensions where they follow from the batch's size. It
    may have axes of 1 where JAX has more: ONNX's operators broadcast by themselves.
    """

    content: str | np.ndarray
    shape: tuple

    @property
    def is_known(self) -> bool:
        return not isinstance(self.content, str)


def known(array: Any) -> Value:
    """A value that is known."""
    array = np.asarray(array)
    return Value(array, array.shape)


def is_number(size: Any) -> bool:
    """Whether a size is known, and does not follow from the batch's."""
    return isinstance(size, (int, np.integer))


class Graph:
    """Nodes and constants.

    Args:
      image: the name of the input whose first axis is the batch's.
    """

    def __init__(self, image: str):
        self._image, self._batch_size = image, None
        self._names: dict[Any, str] = {}
        self._arrays: list[np.ndarray] = []  # kept, so that an id names one array for good
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def add(self, operator: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node; returns the name of its output, or the names of several."""
        from onnx import helper

        names = [f"{operator}_{len(self.nodes)}_{number}" for number in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: Any, dtype: Any = None) -> str:
        """The name of an array, of which there is one however often it is used."""
        from onnx import numpy_helper

        array = np.asarray(array, dtype)
        is_small = array.size < 64
        key = (array.tobytes(), array.dtype.str, array.shape) if is_small else id(array)
        if key not in self._names:
            self._names[key] = f"constant_{len(self.initializers)}"
            self._arrays.append(array)
            contiguous = np.ascontiguousarray(array).reshape(array.shape)
            self.initializers.append(numpy_helper.from_array(contiguous, self._names[key]))
        return self._names[key]

    def name(self, value: Value) -> str:
        """The name of a value in the graph."""
        return self.constant(value.content) if value.is_known else value.content

    def integers(self, *numbers: Any) -> str:
        """The name of a constant of int64, as operators take axes and sizes."""
        return self.constant([int(number) for number in numbers], np.int64)

    def reshape(self, value: Value, shape: Sequence[Any]) -> Value:
        """A value with other axes, of which at most one follows from the batch's size."""
        shape = tuple(shape)
        if value.shape == shape:
            return value
        if value.is_known:
            return Value(value.content.reshape(shape), shape)
        sizes = [size if is_number(size) else -1 for size in shape]
        return Value(self.add("Reshape", value.content, self.integers(*sizes)), shape)

    def transpose(self, value: Value, axes: Sequence[int]) -> Value:
        """A value with its axes in another order."""
        axes = [int(axis) for axis in axes]
        if axes == sorted(axes):
            return value
        shape = tuple(value.shape[axis] for axis in axes)
        if value.is_known:
            return Value(value.content.transpose(axes), shape)
        return Value(self.add("Transpose", value.content, perm=axes), shape)

    def expand(self, value: Value, shape: tuple) -> Value:
        """A value with all the axes that JAX has."""
        if value.shape == shape:
            return value
        if value.is_known and all(map(is_number, shape)):
            return Value(np.broadcast_to(value.content, shape), shape)
        return Value(self.add("Expand", self.name(value), self._dimensions(shape)), shape)

    def cut(self, value: Value, starts: Sequence, stops: Sequence, steps: Sequence[int]) -> Value:
        """A value's part, by a start, a stop and a step for every axis."""
        bounds = zip(starts, stops, steps, value.shape, strict=True)
        axes = [
            axis
            for axis, (start, stop, step, size) in enumerate(bounds)
            if not (is_number(start) and start == 0 and stop == size and step == 1)
        ]
        if not axes:
            return value
        shape = list(value.shape)
        for axis in axes:
            shape[axis] = -(-(stops[axis] - starts[axis]) // steps[axis])
        slices = (self.integers(*(bound[a] for a in axes)) for bound in (starts, stops))
        by = self.integers(*axes), self.integers(*(steps[a] for a in axes))
        return Value(self.add("Slice", self.name(value), *slices, *by), tuple(shape))

    def output(self, value: Value, name: str) -> None:
        """Gives an output of the graph its name."""
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [self.name(value)], [name]))

    def keep(self, outputs: Sequence[str]) -> None:
        """Drops what no output needs."""
        needed = {*outputs}
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        self.nodes = kept[::-1]
        self.initializers = [tensor for tensor in self.initializers if tensor.name in needed]

    def _dimensions(self, shape: Sequence[Any]) -> str:
        """The name of a shape, int64 [rank], some of whose sizes are multiples of the batch's."""
        if all(map(is_number, shape)):
            return self.integers(*shape)
        if self._batch_size is None:
            sizes = self.add("Shape", self._image)
            self._batch_size = self.add("Slice", sizes, self.integers(0), self.integers(1))
        parts = [
            self.integers(size)
            if is_number(size)
            else self.add("Mul", self._batch_size, self.integers(_multiple(size)))
            for size in shape
        ]
        return self.add("Concat", *parts, axis=0)


def _multiple(size: Any) -> int:
    """k of a size that is k times the batch's."""
    once, twice = (int(size._evaluate({"b": count})) for count in (1, 2))
    if twice != 2 * once:
        raise Unsupported(f"an axis of {size} elements")
    return once
