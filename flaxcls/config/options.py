"""Named things with typed options: what a name accepts, and whether the values given to it fit.

Models, losses, optimizer rules, schedules and augmentations are all "a name and some options" in a
config. What they accept is read off the signature of the function or dataclass behind the name, so
that it is written in one place only: `final: UpToOne = 0.0` says type, range and default.
"""

import contextlib
import dataclasses
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from flaxcls.config import user_code
from flaxcls.errors import ConfigError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of a number, `Annotated[int, Range(1)]`, or of each in a tuple, then not empty."""

    at_least: float = -math.inf
    at_most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, number: float) -> bool:
        return self.at_least <= number <= self.at_most and self.above < number < self.below

    def __str__(self) -> str:
        limits = dataclasses.asdict(self).items()
        return " and ".join(f"{k.replace('_', ' ')} {v:g}" for k, v in limits if math.isfinite(v))


Count = Annotated[int, Range(1)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(above=0)]
BelowOne = Annotated[float, Range(0, below=1)]
UpToOne = Annotated[float, Range(0, 1)]


def look_up(where: str, name: str, table: Mapping[str, Any]) -> Any:
    """The entry of `table` called `name`, or the user's own that `package.module:Name` stands for.

    Raises ConfigError if there is none, with the closest one; see `user_code.load`.
    """
    if user_code.is_path(name) and (own := user_code.load(where, name)):
        return own
    if name not in table:
        raise ConfigError(
            f"{where} is {name!r}, which is not known{did_you_mean(str(name), table)}"
        )
    return table[name]


def accepted(function: Callable, hidden: Sequence[str] = ()) -> dict[str, inspect.Parameter]:
    """The options that a function or dataclass takes by keyword, without those in `hidden`."""
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in hidden
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def check(
    where: str, name: str, options: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """The options as the types they are annotated with: an int as a float, a list as a tuple.

    Raises a ConfigError for an option that `name` does not take, or whose type or range is wrong.

    Args:
      where: the place in the config, such as `config.model`.
      name: the chosen name, such as `resnet50`.
      options: those that were given.
      parameters: what `accepted` says of the function behind the name.
    """
    converted = {}
    for option, value in options.items():
        if option not in parameters:
            known = did_you_mean(option, parameters) if parameters else "; it takes no options"
            raise ConfigError(f"{where}.{option} is not used by {name}{known}")
        annotation = parameters[option].annotation
        try:
            converted[option] = _convert(value, annotation)
        except ValueError:
            raise ConfigError(
                f"{where}.{option} must be {describe(annotation)} for {name}, got {value!r}"
            ) from None
    return converted


def fits(value: Any, annotation: Any) -> bool:
    """Whether a config value is of the annotated type; an int is a fine float, a bool is no int."""
    try:
        _convert(value, annotation)
    except ValueError:
        return False
    return True


def describe(annotation: Any) -> str:
    """The type as a user would write it: `float at least 0`, `tuple[int, ...]`, `'a' or 'b'`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        several = ", each" if typing.get_origin(arguments[0]) is tuple else ""
        return f"{describe(arguments[0])}{several} {arguments[1]}"
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin:
        return f"{origin.__name__}[{', '.join(map(describe, arguments))}]"
    if annotation is types.NoneType:
        return "None"
    return "..." if annotation is ... else getattr(annotation, "__name__", str(annotation))


def _convert(value: Any, annotation: Any) -> Any:
    """The value as the annotated type; ValueError if it doesn't fit."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (inspect.Parameter.empty, Any, object):
        return value
    if origin is Annotated:
        value = _convert(value, arguments[0])
        numbers = value if isinstance(value, tuple) else (value,)
        if numbers and all(number in arguments[1] for number in numbers):
            return value
    elif origin is typing.Literal:
        if any(type(value) is type(known) and value == known for known in arguments):
            return value
    elif origin in (typing.Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(ValueError):
                return _convert(value, option)
    elif origin in (tuple, Sequence):
        if isinstance(value, (list, tuple)):  # a list is what JSON makes of a tuple
            if origin is Sequence or arguments[-1] is ...:
                arguments = arguments[:1] * len(value)
            if len(arguments) == len(value):
                return tuple(map(_convert, value, arguments))
    elif isinstance(value, bool):  # which is an int to Python
        if annotation is bool:
            return value
    elif annotation is float:
        if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
            return float(value)
    elif _is_instance(value, origin or annotation):
        return value
    raise ValueError


def _is_instance(value: Any, kind: Any) -> bool:
    """Also where a user's own code is annotated with what can't be asked, such as a Protocol."""
    try:
        return isinstance(value, kind)
    except TypeError:
        return True
