"""What a sweep tries: the values of config fields, as its command line writes them."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from flaxcls.config.recipes import load_recipe
from flaxcls.errors import ConfigError

Values = Mapping[str, str]  # from fields such as "optimizer.learning_rate" to what to set them to

_SPAN = re.compile(r"(?P<low>[^.:,]+(?:\.\d+)?[^.:,]*)\.\.(?P<high>[^:,]+?)(?P<log>:log)?")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_LONGEST = 100  # characters of a folder's name
_UNSAFE = re.compile(r"[^A-Za-z0-9._=+,()-]")


class Choice(NamedTuple):
    """Some values of a field."""

    field: str
    values: tuple[str, ...]


class Span(NamedTuple):
    """All numbers from `low` to `high`, both included; on a logarithmic scale if `is_log`."""

    field: str
    low: float
    high: float
    is_int: bool
    is_log: bool


def parse_choice(text: str, flag: str = "grid") -> Choice:
    """`optimizer.learning_rate=0.1,0.3`; commas within brackets or quotes do not separate."""
    field, equals, values = text.partition("=")
    split = _split(values)
    if not equals or not field or not all(split):
        raise ConfigError(
            f"--{flag}={text} must be FIELD=VALUE,VALUE, such as optimizer.learning_rate=0.1,0.3"
        )
    if len({*split}) < len(split):
        raise ConfigError(f"--{flag}={text} has a value twice")
    return Choice(field.removeprefix("config."), tuple(split))


def parse_search(text: str) -> Choice | Span:
    """`optimizer.learning_rate=1e-3..1e-1:log`, `batch_size=32..256`, or values as in a grid."""
    field, _, values = text.partition("=")
    if ".." not in values:
        return parse_choice(text, "search")
    match, field = _SPAN.fullmatch(values), field.removeprefix("config.")
    try:
        low, high = (_number(match[name]) for name in ("low", "high"))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--search={text} must be FIELD=LOW..HIGH or FIELD=LOW..HIGH:log, such as "
            "optimizer.learning_rate=1e-3..1e-1:log"
        ) from error
    is_log = match["log"] is not None
    if not low < high or (is_log and low <= 0):
        above = " and above 0 on a logarithmic scale" if is_log else ""
        raise ConfigError(f"--search={text}: the first number must be below the second{above}")
    return Span(field, low, high, isinstance(low, int) and isinstance(high, int), is_log)


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def _split(text: str) -> list[str]:
    """The parts between commas, but for those within brackets or quotes."""
    parts, part, closing = [], "", []
    for character in text:
        if character == "," and not closing:
            parts.append(part.strip())
            part = ""
            continue
        part += character
        if closing and character == closing[-1]:
            closing.pop()
        elif character in "'\"" and not (closing and closing[-1] in "'\""):
            closing.append(character)
        elif character in _CLOSING:
            closing.append(_CLOSING[character])
    return [*parts, part.strip()]


def grid(choices: Sequence[Choice]) -> Iterator[Values]:
    """All combinations, the last field's values changing fastest."""
    fields = [choice.field for choice in choices]
    for values in itertools.product(*(choice.values for choice in choices)):
        yield dict(zip(fields, values, strict=True))


def corners(space: Sequence[Choice | Span]) -> Iterator[Values]:
    """Combinations that have every value of every choice, and both ends of every span."""
    ends = [
        part.values if isinstance(part, Choice) else (repr(part.low), repr(part.high))
        for part in space
    ]
    for number in range(max(map(len, ends))):
        pairs = zip(space, ends, strict=True)
        yield {part.field: values[number % len(values)] for part, values in pairs}


def check_fields(space: Sequence[Choice | Span]) -> None:
    """ConfigError for a field that is named twice."""
    fields = [part.field for part in space]
    for field in fields:
        if fields.count(field) > 1:
            raise ConfigError(f"config.{field} is named twice: give all of its values at once")


def trial_name(values: Values) -> str:
    """A folder's name, `learning_rate=0.1,name=resnet18`, another one for other values."""
    ends = [field.rpartition(".")[2] for field in values]
    parts = [
        f"{end if ends.count(end) == 1 else field}={value}"
        for end, (field, value) in zip(ends, values.items(), strict=True)
    ]
    name = ",".join(parts)
    safe = _UNSAFE.sub("_", name)[:_LONGEST]
    return safe if safe == name else f"{safe}-{blake2b(name.encode(), digest_size=4).hexdigest()}"


def overrides_of(values: Values) -> list[str]:
    """As `load_recipe` takes them."""
    return [f"{field}={value}" for field, value in values.items()]


def check_values(recipe: str, overrides: Sequence[str], values: Values) -> None:
    """ConfigError for what `--config.FIELD=VALUE` would refuse; no data or devices are looked at.

    What a recipe leaves to the data and the devices is not checked before its trial.
    """
    from flaxcls.build import accepted, check  # JAX
    from flaxcls.config import options
    from flaxcls.config.tree import get

    loaded = load_recipe(recipe, [*overrides, *overrides_of(values)])
    config = loaded.config
    for _ in accepted.drop_unused(config, loaded.given):
        pass  # a trial says it
    if loaded.adapt is None:
        check(config)
    for where, section in accepted.SECTIONS.items():
        name = get(config, f"{where}.name")
        if name is not None and (where != "data" or name in section.names):
            given = accepted.options_given(config, where)
            options.check(f"config.{where}", name, given, section.options(name))
