"""What the type of an option takes, what it makes of it, and how it is told."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import pytest

from flaxcls.config.options import (
    BelowOne,
    Count,
    Positive,
    Range,
    UpToOne,
    accepted,
    check,
    describe,
    fits,
)
from flaxcls.errors import ConfigError

Pair = Annotated[tuple[float, float], Range(0, 1)]
Widths = Annotated[tuple[int, ...], Range(1)]
Factors = Sequence[tuple[str, UpToOne]]
Fill = float | Literal["noise"]


def convert(value, annotation):
    def function(*, x):
        return x

    function.__annotations__["x"] = annotation
    return check("config.part", "thing", {"x": value}, accepted(function))["x"]


@pytest.mark.parametrize(
    ("annotation", "value", "expected"),
    [
        (int, 3, 3),
        (float, 3, 3.0),
        (bool, True, True),
        (float | None, None, None),
        (Positive | None, 2, 2.0),
        (UpToOne, 1, 1.0),
        (Fill, "noise", "noise"),
        (Fill, 17, 17.0),
        (Pair, [0, 1], (0.0, 1.0)),
        (Widths, [8, 4], (8, 4)),
        (tuple[str, ...], [], ()),
        (Factors, [["a", 1], ("b", 0.5)], (("a", 1.0), ("b", 0.5))),
    ],
)
def test_a_value_that_fits_becomes_the_annotated_type(annotation, value, expected):
    converted = convert(value, annotation)
    assert repr(converted) == repr(expected)


@pytest.mark.parametrize(
    ("annotation", "value", "text"),
    [
        (int, True, "int"),
        (int, 3.0, "int"),
        (float, "3", "float"),
        (float, False, "float"),
        (float, float("nan"), "float"),
        (float, float("inf"), "float"),
        (float, 10**400, "float"),
        (bool, 1, "bool"),
        (str, None, "str"),
        (str | None, 5, "str or None"),
        (Count, 0, "int at least 1"),
        (BelowOne, 1.0, "float at least 0 and below 1"),
        (UpToOne, -0.1, "float at least 0 and at most 1"),
        (Positive, 0.0, "float above 0"),
        (Fill, "red", "float or 'noise'"),
        (Literal["max", "average"], "mean", "'max' or 'average'"),
        (Pair, (0.5,), "tuple[float, float], each at least 0 and at most 1"),
        (Pair, (0.5, 1.5), "tuple[float, float], each at least 0 and at most 1"),
        (Pair, 0.5, "tuple[float, float], each at least 0 and at most 1"),
        (Widths, (), "tuple[int, ...], each at least 1"),
        (Factors, "ab", "Sequence[tuple[str, float at least 0 and at most 1]]"),
        (Factors, (("a", 2),), "Sequence[tuple[str, float at least 0 and at most 1]]"),
    ],
)
def test_a_value_that_does_not_fit_is_told_with_what_would(annotation, value, text):
    assert describe(annotation) == text
    with pytest.raises(ConfigError) as error:
        convert(value, annotation)
    assert str(error.value) == f"config.part.x must be {text} for thing, got {value!r}"


def test_accepted_are_the_options_that_can_be_given_by_keyword():
    def function(run, /, first, *, second=2, **others):
        return run, first, second, others

    @dataclasses.dataclass
    class Thing:
        size: int = 1

    assert list(accepted(function)) == ["first", "second"]
    assert list(accepted(function, ("first",))) == ["second"]
    assert list(accepted(functools.partial(function, second=3))) == ["first", "second"]
    assert list(accepted(Thing)) == ["size"]


def test_an_option_that_is_not_taken_is_told_with_the_closest_one():
    def function(*, width=1):
        return width

    with pytest.raises(ConfigError, match="config.part.widht is not used by thing, did you mean"):
        check("config.part", "thing", {"widht": 1}, accepted(function))
    with pytest.raises(ConfigError, match="width is not used by thing; it takes no options"):
        check("config.part", "thing", {"width": 1}, {})


def test_what_may_be_anything_may_be_a_bool():
    for value in (True, 1, "a", (1,), None):
        assert fits(value, object)
