"""Named things with typed options: what a name accepts, and whether the values given to it fit.

Models, losses, optimizer rules, schedules and augmentations are all "a name and some options" in a
config. What they accept is read off the signature of the function or dataclass behind the name, so
that it is written in one place only.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from flaxcls.errors import ConfigError, did_you_mean


def look_up(where: str, name: str, table: Mapping[str, Any]) -> Any:
    """The entry of `table` called `name`; a ConfigError that names the closest one if there is none."""
    if name not in table:
        raise ConfigError(
            f"{where} is {name!r}, which is not known{did_you_mean(str(name), table)}"
        )
    return table[name]


def accepted(function: Callable, hidden: tuple[str, ...] = ()) -> dict[str, inspect.Parameter]:
    """The options that a function or dataclass takes by keyword, without those in `hidden`."""
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in hidden and parameter.kind is not parameter.VAR_KEYWORD
    }


def fits(value: Any, annotation: Any) -> bool:
    """Whether a config value is of the annotated type; an int is a fine float, a bool is no int."""
    if annotation in (inspect.Parameter.empty, Any):
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is typing.Literal:
        return value in arguments
    if annotation is None or annotation is types.NoneType:
        return value is None
    if isinstance(value, bool):
        return annotation is bool
    if annotation is float:
        return isinstance(value, (int, float))
    kind = origin or annotation
    if isinstance(value, list):  # what JSON makes of a tuple
        value = tuple(value)
    if not isinstance(kind, type) or not isinstance(value, kind):
        return False
    if kind is tuple and arguments:
        return all(fits(item, arguments[0]) for item in value)
    return True


def describe(annotation: Any) -> str:
    """The type as a user would write it: `float`, `tuple[int, ...]`, `'max' or 'average'`."""
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(annotation))
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def check(
    where: str, name: str, options: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> None:
    """Raises a ConfigError for an option that `name` does not take, or whose type is wrong.

    Args:
      where: the place in the config, such as `config.model`.
      name: the chosen name, such as `resnet50`.
      options: those that were given.
      parameters: what `accepted` says of the function behind the name.
    """
    for option, value in options.items():
        if option not in parameters:
            known = did_you_mean(option, parameters) if parameters else "; it takes no options"
            raise ConfigError(f"{where}.{option} is not used by {name}{known}")
        annotation = parameters[option].annotation
        if not fits(value, annotation):
            raise ConfigError(
                f"{where}.{option} must be {describe(annotation)} for {name}, got {value!r}"
            )
