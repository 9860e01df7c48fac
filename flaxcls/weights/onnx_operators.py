"""A jaxpr as nodes of ONNX: what networks in evaluation mode are made of, and no more.

Whatever depends on the weights alone is computed here and now: so BatchNorm is a difference, a
product and a sum in the graph, and the positions that are gathered from are known. Of what differs
by platform the default is taken.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flaxcls.weights.onnx_graph import Graph, Unsupported, Value, is_number, known


class Call(NamedTuple):
    """An operation of a jaxpr: its operands, with all their axes, its parameters, its result."""

    graph: Graph
    operands: list[Value]
    parameters: dict[str, Any]
    result: Any  # its shape and dtype

    def node(self, operator: str, *more: str, **attributes: Any) -> Value:
        """The result, of a node that takes the first operand."""
        name = self.graph.name(self.operands[0])
        return Value(self.graph.add(operator, name, *more, **attributes), self.result.shape)


def convert(
    graph: Graph, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Value]
) -> list[Value]:
    """Adds what a jaxpr computes to the graph; returns its outputs.

    Raises Unsupported for an operation that has no counterpart.
    """
    values = dict(zip(jaxpr.constvars, map(known, constants), strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        is_literal = isinstance(atom, jax.extend.core.Literal)
        return known(np.asarray(atom.val, atom.aval.dtype)) if is_literal else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        outputs = _convert_equation(graph, equation, operands)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _convert_equation(graph: Graph, equation: Any, operands: list[Value]) -> list[Value]:
    name, parameters = equation.primitive.name, equation.params
    if name == "platform_index":
        platforms = parameters["platforms"]
        return [known(np.int32(platforms.index(None) if None in platforms else 0))]
    if name == "cond" and operands[0].is_known:
        branch = parameters["branches"][int(operands[0].content)]
        return convert(graph, branch.jaxpr, branch.consts, operands[1:])
    inner = next((parameters[key] for key in ("call_jaxpr", "jaxpr") if key in parameters), None)
    if inner is not None and name not in ("while", "scan", "cond"):
        return convert(
            graph, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands
        )
    if name in ("stop_gradient", "copy", "copy_p", "optimization_barrier"):
        return operands
    if name == "broadcast_in_dim":
        return [_broadcast(graph, operands[0], parameters)]
    shapes = [variable.aval.shape for variable in equation.outvars]
    is_elementwise = name in ELEMENTWISE
    if not is_elementwise:
        operands = [
            graph.expand(value, atom.aval.shape)
            for value, atom in zip(operands, equation.invars, strict=True)
        ]
    if all(value.is_known for value in operands) and all(map(is_number, itertools.chain(*shapes))):
        return _compute(equation, operands, is_elementwise)
    result = equation.outvars[0].aval
    try:
        if is_elementwise:
            return [_elementwise(graph, ELEMENTWISE[name], operands, parameters, result)]
        outputs = OPERATORS[name](Call(graph, operands, parameters, result))
    except KeyError as error:
        raise Unsupported(f"the operation {name}") from error
    return outputs if isinstance(outputs, list) else [outputs]


def _compute(equation: Any, operands: list[Value], is_elementwise: bool) -> list[Value]:
    """The results of an operation on what is known."""
    if function := _NUMPY.get(equation.primitive.name):
        return [known(function(*(value.content for value in operands)))]
    arrays = [jnp.asarray(value.content) for value in operands]
    if is_elementwise and arrays:
        arrays = jnp.broadcast_arrays(*arrays)
    results = equation.primitive.bind(*arrays, **equation.params)
    return list(map(known, results if equation.primitive.multiple_results else [results]))


# Of BatchNorms, mostly: JAX would compile a program for each of their sizes.
_NUMPY: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "mul": np.multiply,
    "rsqrt": lambda x: np.reciprocal(np.sqrt(x)),
    "sub": np.subtract,
}


def _broadcast(graph: Graph, value: Value, parameters: dict[str, Any]) -> Value:
    """A value whose axes are where they will be, the others 1."""
    shape = [1] * len(parameters["shape"])
    for axis, size in zip(parameters["broadcast_dimensions"], value.shape, strict=True):
        shape[axis] = size
    return graph.reshape(value, shape)


def _elementwise(
    graph: Graph, operator: Any, operands: list[Value], parameters: dict[str, Any], result: Any
) -> Value:
    names = [graph.name(value) for value in operands]
    if isinstance(operator, str):
        name = graph.add(operator, *names)
    else:
        name = operator(graph, names, parameters, result.dtype)
    rank = max(len(value.shape) for value in operands)
    padded = [(1,) * (rank - len(value.shape)) + tuple(value.shape) for value in operands]
    shape = tuple(
        next((size for size in sizes if not (is_number(size) and size == 1)), 1)
        for sizes in zip(*padded, strict=True)
    )
    return Value(name, shape)


def _cast(graph: Graph, names: list[str], parameters: dict, dtype: Any) -> str:
    from onnx import helper

    return graph.add("Cast", names[0], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _select(graph: Graph, names: list[str], parameters: dict, dtype: Any) -> str:
    which, *cases = names
    if len(cases) != 2:
        raise Unsupported(f"a choice of {len(cases)} cases")
    return graph.add("Where", which, cases[1], cases[0])


def _clamp(graph: Graph, names: list[str], parameters: dict, dtype: Any) -> str:
    low, x, high = names
    return graph.add("Min", graph.add("Max", x, low), high)


def _one(graph: Graph, dtype: Any) -> str:
    return graph.constant(1, dtype)


ELEMENTWISE: dict[str, str | Callable[[Graph, list[str], dict, Any], str]] = {
    "abs": "Abs",
    "add": "Add",
    "and": "And",
    "ceil": "Ceil",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tanh": "Tanh",
    "clamp": _clamp,
    "convert_element_type": _cast,
    "erfc": lambda g, x, _, dtype: g.add("Sub", _one(g, dtype), g.add("Erf", *x)),
    "expm1": lambda g, x, _, dtype: g.add("Sub", g.add("Exp", *x), _one(g, dtype)),
    "integer_pow": lambda g, x, p, dtype: g.add("Pow", *x, g.constant(p["y"], dtype)),
    "log1p": lambda g, x, _, dtype: g.add("Log", g.add("Add", _one(g, dtype), *x)),
    "ne": lambda g, x, *_: g.add("Not", g.add("Equal", *x)),
    "rsqrt": lambda g, x, *_: g.add("Reciprocal", g.add("Sqrt", *x)),
    "select_n": _select,
    "square": lambda g, x, *_: g.add("Mul", *x, *x),
}


def _reduce(operator: str) -> Callable[[Call], Value]:
    def convert(call: Call) -> Value:
        axes = call.graph.integers(*call.parameters["axes"])
        return call.node(operator, axes, keepdims=0)

    return convert


def _argmax(call: Call) -> Value:
    (axis,) = call.parameters["axes"]
    name = call.node("ArgMax", axis=axis, keepdims=0).content
    return Value(_cast(call.graph, [name], {}, call.result.dtype), call.result.shape)


def _slice(call: Call) -> Value:
    starts, stops = call.parameters["start_indices"], call.parameters["limit_indices"]
    steps = call.parameters["strides"] or (1,) * len(starts)
    return call.graph.cut(call.operands[0], starts, stops, steps)


def _dynamic_slice(call: Call) -> Value:
    x, *starts = call.operands
    if not all(start.is_known for start in starts):
        raise Unsupported("a slice at a position that depends on the image")
    return _window(call.graph, x, [int(s.content) for s in starts], call.parameters["slice_sizes"])


def _window(graph: Graph, x: Value, starts: Sequence[int], sizes: Sequence[Any]) -> Value:
    """The part of a value of some sizes that begins at `starts`, moved inside of it."""
    starts = [
        0 if not is_number(size) else min(max(start, 0), whole - size)
        for start, size, whole in zip(starts, sizes, x.shape, strict=True)
    ]
    stops = [start + size for start, size in zip(starts, sizes, strict=True)]
    return graph.cut(x, starts, stops, (1,) * len(starts))


def _gather(call: Call) -> Value:
    """Parts at positions that are known: a window, or every pair of some rows and some columns.

    Of a matrix also an element of each row, at any position inside of it.
    """
    x, indices = call.operands
    numbers, sizes = call.parameters["dimension_numbers"], call.parameters["slice_sizes"]
    axes = list(numbers.start_index_map)
    if (numbers.operand_batching_dims, axes, len(x.shape)) == ((0,), [1], 2):
        at = _cast(call.graph, [call.graph.name(indices)], {}, np.int64)
        return call.node("GatherND", at, batch_dims=1)
    if not indices.is_known or numbers.operand_batching_dims:
        raise Unsupported("a gather at positions that depend on the image")
    positions = indices.content
    if positions.ndim == 1:
        starts = dict(zip(axes, positions.tolist(), strict=True))
        window = _window(call.graph, x, [starts.get(a, 0) for a in range(len(x.shape))], sizes)
        return call.graph.reshape(window, call.result.shape)
    # The axes of the positions come in the result where those that are gathered from were.
    first, count = axes[0], positions.ndim - 1
    kept = [axis for axis in range(len(call.result.shape)) if axis not in numbers.offset_dims]
    in_place = kept == list(range(first, first + count)) and axes == sorted(axes)
    if not in_place or axes != list(numbers.collapsed_slice_dims):
        raise Unsupported("a gather that moves axes")
    if len(axes) == 1:
        at = call.graph.constant(positions[..., 0], np.int64)
        return call.node("Gather", at, axis=first)
    for number, axis in enumerate(axes):
        lines = np.moveaxis(positions[..., number], number, 0).reshape(positions.shape[number], -1)
        if count != len(axes) or axis != first + number or (lines != lines[:, :1]).any():
            raise Unsupported("a gather of scattered positions")
        at = call.graph.constant(lines[:, 0], np.int64)
        x = Value(call.graph.add("Gather", call.graph.name(x), at, axis=axis), ())
    return Value(x.content, call.result.shape)


def _pad(call: Call) -> Value:
    before, after, between = zip(*call.parameters["padding_config"], strict=True)
    if any(between):
        raise Unsupported("padding between elements")
    if not any(before) and not any(after):
        return call.operands[0]
    value = call.graph.name(call.operands[1])
    return call.node("Pad", call.graph.integers(*before, *after), value)


def _split(call: Call) -> list[Value]:
    (x,), axis, sizes = call.operands, call.parameters["axis"], call.parameters["sizes"]
    at = itertools.accumulate(sizes, initial=0)
    parts = []
    for start, size in zip(at, sizes, strict=False):
        starts, stops = [0] * len(x.shape), list(x.shape)
        starts[axis], stops[axis] = start, start + size
        parts.append(call.graph.cut(x, starts, stops, (1,) * len(x.shape)))
    return parts


def _reverse(call: Call) -> Value:
    axes = call.parameters["dimensions"]
    integers = call.graph.integers
    end = np.iinfo(np.int64).min
    bounds = integers(*[-1] * len(axes)), integers(*[end] * len(axes))
    return call.node("Slice", *bounds, integers(*axes), integers(*[-1] * len(axes)))


def _sort(call: Call) -> list[Value]:
    if len(call.operands) != 1:
        raise Unsupported("sorting by keys")
    (x,), axis = call.operands, call.parameters["dimension"]
    count = call.graph.integers(x.shape[axis])
    values, _ = call.graph.add(
        "TopK", call.graph.name(x), count, outputs=2, axis=axis, largest=0, sorted=1
    )
    return [Value(values, x.shape)]


def _dot(call: Call) -> Value:
    (contract_left, contract_right), (batch_left, batch_right) = call.parameters[
        "dimension_numbers"
    ]
    left, right = call.operands
    graph = call.graph
    free = [
        [axis for axis in range(len(x.shape)) if axis not in (*contracted, *batch)]
        for x, contracted, batch in (
            (left, contract_left, batch_left),
            (right, contract_right, batch_right),
        )
    ]

    def size(x: Value, axes: Sequence[int]) -> Any:
        return math.prod(x.shape[axis] for axis in axes)

    left = graph.transpose(left, [*batch_left, *free[0], *contract_left])
    right = graph.transpose(right, [*batch_right, *contract_right, *free[1]])
    inner = size(call.operands[0], contract_left)
    outer = [call.operands[1].shape[axis] for axis in batch_right]
    if len(contract_left) != 1:
        kept = len(batch_left) + len(free[0])
        left = graph.reshape(left, [*left.shape[:kept], inner])
    # The right one is a matrix; the left one too where there is a batch of them.
    columns = size(call.operands[1], free[1])
    right = graph.reshape(right, [*outer, inner, columns])
    if batch_left and len(free[0]) != 1:
        left = graph.reshape(left, [*outer, size(call.operands[0], free[0]), inner])
    product = graph.add("MatMul", graph.name(left), graph.name(right))
    return graph.reshape(Value(product, (*left.shape[:-1], columns)), call.result.shape)


def _convolution(call: Call) -> Value:
    parameters, graph = call.parameters, call.graph
    numbers = parameters["dimension_numbers"]
    if {*parameters["lhs_dilation"]} != {1} or parameters["batch_group_count"] != 1:
        raise Unsupported("a transposed convolution")
    x, kernel = call.operands
    x, kernel = graph.transpose(x, numbers.lhs_spec), graph.transpose(kernel, numbers.rhs_spec)
    before, after = zip(*parameters["padding"], strict=True)
    y = graph.add(
        "Conv",
        graph.name(x),
        graph.name(kernel),
        strides=parameters["window_strides"],
        pads=[*before, *after],
        dilations=parameters["rhs_dilation"],
        group=parameters["feature_group_count"],
    )
    shape = tuple(call.result.shape[axis] for axis in numbers.out_spec)
    return graph.transpose(Value(y, shape), np.argsort(numbers.out_spec))


def _pool(operator: str) -> Callable[[Call], Value]:
    def convert(call: Call) -> Value:
        parameters, graph = call.parameters, call.graph
        window, strides = parameters["window_dimensions"], parameters["window_strides"]
        if (
            len(window) != 4
            or (window[0], window[3]) != (1, 1)
            or {*parameters["base_dilation"]} != {1}
        ):
            raise Unsupported("a window over other axes than height and width")
        before, after = zip(*parameters["padding"][1:3], strict=True)
        attributes: dict[str, Any] = {"dilations": parameters["window_dilation"][1:3]}
        if operator == "AveragePool":
            attributes = {"count_include_pad": 1}
        x = graph.transpose(call.operands[0], (0, 3, 1, 2))
        y = graph.add(
            operator,
            graph.name(x),
            kernel_shape=window[1:3],
            strides=strides[1:3],
            pads=[*before, *after],
            **attributes,
        )
        if operator == "AveragePool":  # which is a sum in JAX
            y = graph.add("Mul", y, graph.constant(window[1] * window[2], call.result.dtype))
        shape = tuple(call.result.shape[axis] for axis in (0, 3, 1, 2))
        return graph.transpose(Value(y, shape), (0, 2, 3, 1))

    return convert


OPERATORS: dict[str, Callable[[Call], Value | list[Value]]] = {
    "argmax": _argmax,
    "concatenate": lambda call: Value(
        call.graph.add(
            "Concat", *map(call.graph.name, call.operands), axis=call.parameters["dimension"]
        ),
        call.result.shape,
    ),
    "conv_general_dilated": _convolution,
    "cumsum": lambda call: call.node(
        "CumSum",
        call.graph.constant(call.parameters["axis"], np.int64),
        reverse=int(call.parameters["reverse"]),
    ),
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "pad": _pad,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool"),
    "reshape": lambda call: call.graph.reshape(call.operands[0], call.result.shape),
    "rev": _reverse,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": lambda call: call.graph.reshape(call.operands[0], call.result.shape),
    "transpose": lambda call: call.graph.transpose(
        call.operands[0], call.parameters["permutation"]
    ),
}
