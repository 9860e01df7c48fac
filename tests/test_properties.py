"""What holds for all values: of the order, splits, crops, durations and typed options."""

import contextlib
import math
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from flaxcls.config.durations import SECONDS, in_steps, parse_duration
from flaxcls.config.options import (
    BelowOne,
    Count,
    NonNegative,
    Positive,
    Range,
    UpToOne,
    accepted,
    check,
    describe,
    fits,
)
from flaxcls.data.order import Order, evaluation_batches, take_rows
from flaxcls.data.source import resolve_split, take_slices
from flaxcls.data.transform import RandomResizedCrop
from flaxcls.errors import ConfigError

# The order of the examples

SIZES = st.integers(1, 60)  # of splits and of batches, either of them the larger one
SEEDS = st.integers(0, 2**64 - 1)


@given(SIZES, SIZES, SEEDS, st.integers(1, 3))
def test_every_example_comes_once_an_epoch_and_repeat(size, batch_size, seed, repeats):
    order = Order(size, batch_size=batch_size, seed=seed, repeats=repeats)
    batches = [order.batch(step) for step in range(-(-2 * size * repeats // batch_size))]
    index, epoch = (np.concatenate([b[name] for b in batches]) for name in ("index", "epoch"))
    for number in range(2):
        counts = np.bincount(index[epoch == number], minlength=size)
        assert counts.tolist() == [repeats] * size


@given(SIZES, SIZES, SEEDS, st.lists(st.integers(0, 2**40), min_size=1, max_size=6))
def test_a_batch_is_a_function_of_seed_and_step(size, batch_size, seed, steps):
    def new_order():
        return Order(size, batch_size=batch_size, seed=seed)

    order = new_order()
    for step in [*steps, *reversed(steps)]:
        again, batch = new_order(), order.batch(step)
        for name, column in again.batch(step).items():
            np.testing.assert_array_equal(batch[name], column)
        np.testing.assert_array_equal(order.draws(step, 8), again.draws(step, 8))


@given(SIZES, SEEDS, st.integers(0, 1000), st.data())
def test_rows_of_hosts_make_up_the_batch(size, seed, step, data):
    hosts, rows_each = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    rows = np.asarray(data.draw(st.permutations(range(hosts * rows_each)))).reshape(hosts, -1)
    batch = Order(size, batch_size=rows.size, seed=seed).batch(step)
    parts = [take_rows(batch, mine) for mine in rows]
    for name, column in batch.items():
        together = np.empty_like(column)
        together[rows.ravel()] = np.concatenate([part[name] for part in parts])
        np.testing.assert_array_equal(together, column)


@given(SIZES, SIZES)
def test_an_evaluation_counts_every_example_once(size, batch_size):
    batches = list(evaluation_batches(size, batch_size))
    assert all(len(batch["index"]) == batch_size for batch in batches)
    counted = np.concatenate([batch["index"][batch["mask"] == 1] for batch in batches])
    np.testing.assert_array_equal(counted, np.arange(size))
    assert sum(batch["mask"].sum() for batch in batches) == size


# Splits

PERCENT = st.integers(0, 100) | st.decimals(0, 100, places=1).map(float)


def examples_of(spec, *lengths):
    """What a split's slices hold, where example i of "train" is i; empty if that is refused."""
    size = sum(lengths)
    try:
        slices = resolve_split(spec, {"train": lengths})
    except ConfigError as error:
        assert "is empty" in str(error)
        return []
    return take_slices({"train": np.arange(size)}, slices).tolist()


@given(st.integers(1, 300), st.data())
def test_slices_are_those_of_numpy(size, data):
    begin, end = (data.draw(st.none() | st.integers(-size, size)) for _ in range(2))
    assume((begin, end) != (None, None))
    spec = f"train[{'' if begin is None else begin}:{'' if end is None else end}]"
    assert examples_of(spec, size) == np.arange(size)[begin:end].tolist()


@given(st.integers(1, 300), PERCENT, PERCENT)
def test_percentages_are_slices_to_the_nearest_example(size, begin, end):
    expected = np.arange(size)[round(begin * size / 100) : round(end * size / 100)]
    assert examples_of(f"train[{begin}%:{end}%]", size) == expected.tolist()


@given(st.lists(st.integers(1, 100), min_size=1, max_size=3), st.lists(PERCENT, max_size=5))
def test_what_is_cut_at_percentages_is_the_whole(shards, cuts):
    cuts = [0, *sorted(cuts), 100]
    parts = [
        examples_of(f"train[{begin}%:{end}%]", *shards)
        for begin, end in zip(cuts, cuts[1:], strict=False)
    ]
    assert sum(parts, []) == list(range(sum(shards)))


@given(st.integers(1, 300), st.integers(0, 100))
def test_two_parts_are_the_whole(size, percent):
    head, tail = f"train[:{percent}%]", f"train[{percent}%:]"
    whole = list(range(size))
    assert examples_of(head, size) + examples_of(tail, size) == whole
    if examples_of(head, size) and examples_of(tail, size):
        assert examples_of(f"{head}+{tail}", size) == whole


@given(
    st.text(max_size=12)
    | st.text("0123456789:%-+._ shard", max_size=8).map("train[{}]".format)
    | st.lists(
        st.sampled_from(["train", "test", "all", "[", "]", "5", ":", "%", "shard", "+"])
    ).map("".join)
)
def test_any_text_is_a_split_or_refused(spec):
    sizes = {"train": 12, "test": 3}
    with contextlib.suppress(ConfigError):
        for part in resolve_split(spec, {"train": [5, 7], "test": [3]}):
            assert 0 <= part.start < part.stop <= sizes[part.split]


# Crops

SIDES = st.integers(1, 2000)
SHARES = st.tuples(*[st.floats(0.001, 1)] * 2).map(sorted).map(tuple)
ASPECTS = st.tuples(*[st.floats(0.01, 100)] * 2).map(sorted).map(tuple)
DRAWS = st.lists(st.floats(0, 1, exclude_max=True), min_size=24, max_size=24)


@given(SIDES, SIDES, SHARES, ASPECTS, DRAWS)
def test_a_crop_lies_in_the_picture_and_keeps_share_and_aspect(height, width, area, aspect, draws):
    box = RandomResizedCrop(area=area, aspect=aspect).box(height, width, draws)
    top, left, tall, wide = box
    assert 0 <= top < top + tall <= height and 0 <= left < left + wide <= width
    assert all(type(side) is int for side in box)
    assert RandomResizedCrop(area=area, aspect=aspect).box(height, width, draws) == box

    # Sides are rounded to pixels, and none is less than one.
    assert wide - 1 <= aspect[1] * (tall + 1) and wide + 1 >= aspect[0] * (tall - 1)
    least, most = (share * height * width for share in area)
    is_within = (tall + 0.5) * (wide + 0.5) >= least and (tall - 0.5) * (wide - 0.5) <= most
    is_largest = tall == height or wide == width or 1 in (tall, wide)
    is_central = (top, left) == ((height - tall) // 2, (width - wide) // 2)
    assert is_within or (is_largest and is_central)


# Durations

UNITS = ("epochs", "steps", "examples", "%")
LENGTHS = st.floats(0, 1e12)


@given(LENGTHS, st.sampled_from([*UNITS, *SECONDS]), st.booleans(), st.sampled_from(["", " "]))
def test_a_duration_that_is_written_is_read(value, unit, is_singular, space):
    word = unit.removesuffix("s") if is_singular else unit.upper()
    expected = (value * SECONDS.get(unit, 1), "seconds" if unit in SECONDS else unit)
    assert parse_duration(f" {value!r}{space}{word} ") == expected


@given(LENGTHS, st.integers(1, 10**5), st.integers(1, 10**7), st.integers(1, 10**7))
def test_units_agree_on_what_a_step_is(value, batch_size, num_examples, total_steps):
    def steps(number, unit):
        sizes = {"batch_size": batch_size, "num_examples": num_examples}
        return in_steps(f"{number!r} {unit}", **sizes, total_steps=total_steps)

    assert steps(value, "steps") == value
    assert steps(num_examples, "examples") == pytest.approx(steps(1, "epochs"))
    assert steps(batch_size, "examples") == pytest.approx(1)
    assert steps(value, "epochs") == pytest.approx(value * num_examples / batch_size)
    assert steps(100, "%") == pytest.approx(total_steps)


@given(
    st.text(max_size=12)
    | st.builds(
        "{}{}".format,
        st.floats() | st.integers(-5, 10**400) | st.text("0123456789_.e+-", max_size=8),
        st.sampled_from(["", *UNITS, *(f" {unit}" for unit in (*UNITS, *SECONDS))]),
    )
)
@example("1e308 hours")
@example("1e308 epochs")
def test_any_text_is_a_duration_or_refused(text):
    with contextlib.suppress(ConfigError):
        duration = parse_duration(text)
        assert 0 <= duration.value < math.inf and duration.unit in (*UNITS, "seconds")
        steps = in_steps(text, batch_size=128, num_examples=50_000, total_steps=1000)
        assert round(steps) >= 0


# Options

RANGED = (Count, NonNegative, Positive, BelowOne, UpToOne, Annotated[int, Range(-1, 2)])
PLAIN = (int, float, bool, str, type(None), Literal["a", "b"], Literal[1, 3], Literal["none", 0])
ANNOTATIONS = st.recursive(
    st.sampled_from(PLAIN + RANGED),
    lambda inner: (
        inner.map(lambda a: tuple[a, ...])
        | inner.map(lambda a: Sequence[a])
        | st.tuples(inner, inner).map(lambda pair: tuple[pair])
        | st.tuples(inner, inner).map(lambda pair: pair[0] | pair[1])
    ),
    max_leaves=4,
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=5,
)


def values_of(annotation: Any, in_range: bool = True) -> st.SearchStrategy:
    """Values that a user might give to an option of that type, or would but for their range."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        numbers = values_of(arguments[0], in_range)
        return numbers.filter(lambda number: number in arguments[1]) if in_range else numbers
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_of(each, in_range) for each in arguments])
    if origin is tuple and arguments[-1] is not ...:
        return st.tuples(*[values_of(each, in_range) for each in arguments])
    if origin:
        several = st.lists(values_of(arguments[0], in_range), max_size=3)
        return several | several.map(tuple)
    return {
        int: st.integers(-3, 3) | st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(-3, 3),
        bool: st.booleans(),
        str: st.text(max_size=4),
    }.get(annotation, st.none())


def is_of(value: Any, annotation: Any) -> bool:
    """Whether a converted value is exactly of the annotated type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return is_of(value, arguments[0]) and value in arguments[1]
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, each) for each in arguments)
    if origin:
        kinds = arguments
        if origin is not tuple or arguments[-1] is ...:
            kinds = arguments[:1] * len(value) if isinstance(value, tuple) else ()
        return type(value) is tuple and len(value) == len(kinds) and all(map(is_of, value, kinds))
    return type(value) is annotation and (annotation is not float or math.isfinite(value))


def checked(value, annotation):
    def function(*, x):
        return x

    function.__annotations__["x"] = annotation
    return check("config.part", "thing", {"x": value}, accepted(function))["x"]


@given(ANNOTATIONS.flatmap(lambda a: st.tuples(st.just(a), VALUES | values_of(a, in_range=False))))
@example((Literal[1, 3], True))
@example((Literal[1, 3], 1.0))
@example((float, math.nan))
@example((float | str, math.inf))
@example((tuple[float, ...], [10**400]))
def test_a_value_becomes_the_type_or_is_refused(annotated):
    annotation, value = annotated
    if fits(value, annotation):
        converted = checked(value, annotation)
        assert is_of(converted, annotation)
        assert repr(checked(converted, annotation)) == repr(converted)
    else:
        with pytest.raises(ConfigError) as error:
            checked(value, annotation)
        message = f"config.part.x must be {describe(annotation)} for thing, got {value!r}"
        assert str(error.value) == message


@given(st.data(), ANNOTATIONS)
def test_what_is_of_the_type_fits(data, annotation):
    value = data.draw(values_of(annotation))
    assert fits(value, annotation)
    assert is_of(checked(value, annotation), annotation)
