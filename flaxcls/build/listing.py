"""What there is to choose from, with its options: `python -m flaxcls.main --list=models`.

On a terminal it is laid out for the eye; elsewhere each line stands alone, in columns separated by
tabs, so that `grep ^resnet50` finds all about one thing:

    NAME    what it is
    NAME    field=default    type and range of the field

The name * stands for all. Of a network there is a third kind of line, its row in the table that a
terminal shows: parameters, GFLOPs of an image's forward pass, input, classes, source and weights.
These are of `flaxcls/models/zoo.json`, which `tests/golden/update_zoo.py` writes.
"""

import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flaxcls import models
from flaxcls.augment import AUGMENTATIONS, normalize
from flaxcls.augment.views import VIEWS
from flaxcls.build.accepted import SECTIONS, Parameters
from flaxcls.config.options import accepted, describe
from flaxcls.config.recipes import docstring, known_recipes
from flaxcls.config.tree import default, get
from flaxcls.data import open_tfds
from flaxcls.errors import ConfigError, did_you_mean
from flaxcls.runtime.output import Guarded, printable, write_result

_SHORT = 140  # characters of a sentence that is listed
_RESULT = re.compile(r"^(?:Run|Published)\b.*?%.*?(?=[.;](?:\s|$))", re.MULTILINE | re.DOTALL)


class Entry(NamedTuple):
    """A line about a thing, and its options.

    Attributes:
      name: as a config has it; "*" for what all things of a kind take.
      about: one line.
      options: pairs such as ("config.model.width=64", "int at least 1"): the field as an override
        has it with its default (of an augmentation, which has no field of its own, the option as
        in Python), and what it may be, "" where that is left to what reads it.
      figures: what stands in its row of a table of all, by the names of the columns.
    """

    name: str
    about: str
    options: Sequence[tuple[str, str]] = ()
    figures: Mapping[str, str] = MappingProxyType({})


def write(kind: str) -> None:
    """Prints what there is of a kind; ConfigError if it isn't one, OutputError if it can't be."""
    if kind not in KINDS:
        raise ConfigError(f"--list={kind} is not known{did_you_mean(kind, KINDS)}")
    entries = list(KINDS[kind]())
    out: Any = Guarded(result=True)  # a file as far as rich looks
    if out.isatty():
        _print(entries, Console(file=out, highlight=False, markup=False, emoji=False))
    else:
        write_result("\n".join(map("\t".join, _rows(entries))))


def _rows(entries: Sequence[Entry]) -> Iterator[Sequence[str]]:
    for entry in entries:
        yield entry.name, entry.about
        if entry.figures:
            yield entry.name, *entry.figures.values()
        for option in entry.options:
            yield entry.name, *option


def _print(entries: Sequence[Entry], console: Console) -> None:
    if rows := [entry for entry in entries if entry.figures]:
        overview = Table(
            "name", *rows[0].figures, box=None, padding=(0, 2, 0, 0), header_style="dim"
        )
        for entry in rows:
            overview.add_row(Text(entry.name, "bold"), *entry.figures.values())
        console.print(overview, "")
    width = max((len(field) for entry in entries for field, _ in entry.options), default=0)
    for entry in entries:
        console.print(Text.assemble((entry.name, "bold"), "  ", entry.about))
        table = Table.grid(padding=(0, 2))
        table.add_column(width=min(width, console.width // 2), overflow="fold")
        table.add_column(style="dim", overflow="fold")
        for option in entry.options:
            table.add_row(*option)
        if entry.options:
            console.print(Padding(table, (0, 0, 0, 4)))


def _section(where: str) -> Iterator[Entry]:
    """What a section of the config may name."""
    section = SECTIONS[where]
    options = {name: section.options(name) for name in section.names}
    first, *others = options.values()
    common = {
        name: parameter
        for name, parameter in first.items()
        if all(other.get(name) == parameter for other in others)
    }
    if section.own or common:
        own = [_field(f"{where}.{name}") for name in sorted(section.own)]
        yield Entry("*", "what all of these take", [*own, *_options(common, f"config.{where}.")])
    for name, parameters in options.items():
        particular = {name: p for name, p in parameters.items() if name not in common}
        about = _about(section.names[name])
        yield Entry(name, about, _options(particular, f"config.{where}."))


def _models() -> Iterator[Entry]:
    zoo = json.loads(resources.files(models).joinpath("zoo.json").read_text())
    for entry in _section("model"):
        yield entry._replace(figures=_figures(**zoo[entry.name])) if entry.name in zoo else entry


def _figures(
    *,
    parameters: int,
    flops: int,
    input: Sequence[int],
    classes: int,
    source: str,
    imports: bool,
    weights: str | None,
) -> dict[str, str]:
    return {
        "parameters": f"{parameters / 1e6:.2f} M",
        "GFLOPs": f"{flops / 1e9:.3g}",
        "input": "x".join(map(str, input)),
        "classes": str(classes),
        "source": source,
        "weights": "known" if weights else "can be imported" if imports else "",
    }


def _data() -> Iterator[Entry]:
    yield from _section("data")
    yield Entry("(any of TFDS)", _about(open_tfds))


def _augmentations() -> Iterator[Entry]:
    for name, augmentation in AUGMENTATIONS.items():
        options = [
            (f"{option}={parameter.default!r}", _values(parameter.annotation))
            for option, parameter in accepted(augmentation).items()
        ]
        yield Entry(name, _about(augmentation), options)
    yield Entry("normalize", _about(normalize))


def _views() -> Iterator[Entry]:
    for name, views in VIEWS.items():
        yield Entry(name, _about(views))


def _recipes() -> Iterator[Entry]:
    for name, path in sorted(known_recipes().items()):
        yield Entry(printable(name), _about_recipe(path))


KINDS: dict[str, Callable[[], Iterator[Entry]]] = {
    "models": _models,
    "crops": functools.partial(_section, "crop"),
    "augmentations": _augmentations,
    "optimizers": functools.partial(_section, "optimizer"),
    "schedules": functools.partial(_section, "schedule"),
    "losses": functools.partial(_section, "loss"),
    "adversarial": functools.partial(_section, "adversarial"),
    "data": _data,
    "tta": _views,
    "recipes": _recipes,
}


def _options(parameters: Parameters, prefix: str) -> list[tuple[str, str]]:
    return [
        (_override(f"{prefix}{name}", parameter.default), _values(parameter.annotation))
        for name, parameter in parameters.items()
    ]


def _field(path: str) -> tuple[str, str]:
    """A field that the default config has itself; its type is that of its default."""
    where, _, name = path.rpartition(".")
    section = get(default(), where)
    kind = section.get_type(name)
    return _override(f"config.{path}", section[name]), "" if kind is NoneType else _values(kind)


def _override(field: str, value: Any) -> str:
    """As on the command line, where text has no quotes."""
    return field if value is inspect.Parameter.empty else f"{field}={value}"


def _values(annotation: Any) -> str:
    return "" if annotation in (inspect.Parameter.empty, Any, object) else describe(annotation)


def _about(thing: Callable) -> str:
    """The first line of its docstring, and what a variant fixes of what it is a variant of."""
    fixed: Mapping[str, Any] = getattr(thing, "keywords", {})
    line = (inspect.getdoc(getattr(thing, "func", thing)) or "").partition("\n")[0]
    settings = (f"{name} = {getattr(v, '__name__', v)}" for name, v in fixed.items())
    return " ".join([line, f"Here {', '.join(settings)}." if fixed else ""]).strip()


def _about_recipe(path: Path) -> str:
    """The first line of a recipe, and what it has reached where that is said in short."""
    text = docstring(path)
    result = _RESULT.search(text)
    said = " ".join(result[0].split()) + "." if result else ""
    return printable(f"{text.partition(chr(10))[0]} {said if len(said) <= _SHORT else ''}".strip())
