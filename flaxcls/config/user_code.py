"""A user's own network, source, augmentation, loss, ... in a config: `package.module:Name`.

Modules are found as Python finds them, and first beside the recipe (`search`). What stands behind a
name is checked when it is looked up, and called so that its errors name its file and line.
"""

import contextlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flaxcls.errors import ConfigError, FlaxclsError, did_you_mean, one_line


class Kind(NamedTuple):
    """What a section of the config can name.

    Attributes:
      what: the thing in words.
      call: how it is called.
      positional: how many arguments it is given by position; the others are its options.
    """

    what: str
    call: str
    positional: int


KINDS = {
    "model": Kind("a network", "network(*, num_classes, ...)", 0),
    "data": Kind("a source", "source(split, /, *, ...)", 1),
    "augment": Kind("an augmentation", "augmentation(key, batch, /, *, ...)", 2),
    "loss": Kind("a loss", "loss(logits, targets, /, *, ...)", 2),
    "optimizer": Kind("an update rule", "rule(context, /, *, ...)", 1),
    "schedule": Kind("a schedule", "schedule(run, /, *, ...)", 1),
    "eval.tta": Kind("a test-time augmentation", "views(images, /)", 1),
}
_PATH = re.compile(r"([A-Za-z_]\w*\.)*[A-Za-z_]\w*:[A-Za-z_]\w*")  # no version: cifar10:3.0.2
_FLAXCLS = Path(__file__).parents[1]


def is_path(name: Any) -> bool:
    """Whether a name is that of a user's own thing, `package.module:Name`."""
    return isinstance(name, str) and _PATH.fullmatch(name) is not None


def names(config: Mapping[str, Any]) -> dict[str, str]:
    """The `package.module:Name`s in a config by field, such as "config.model.name"."""
    named: dict[str, Any] = {f"config.{name}.name": config.get(name) for name in KINDS}
    specs = named.pop("config.augment.name")
    if isinstance(specs, (list, tuple)):
        named |= {f"config.augment[{i}].name": spec for i, spec in enumerate(specs)}
    found = {
        field: thing["name"]
        for field, thing in named.items()
        if isinstance(thing, (Mapping, ConfigDict)) and "name" in thing
    }
    if "eval" in config:
        found["config.eval.tta"] = config["eval"].get("tta")
    return {field: name for field, name in found.items() if is_path(name)}


def search(folder: Path) -> None:
    """Modules are looked for in this folder before all others."""
    entry = str(folder.resolve())
    if sys.path[:1] != [entry]:
        sys.path[:] = [entry, *(other for other in sys.path if other != entry)]
        importlib.invalidate_caches()


def load(where: str, name: str) -> Callable[..., Any] | None:
    """What `package.module:Name` stands for, as the function that makes or is the thing.

    Arguments that flaxcls gives by position are positional only in its signature, so that what is
    left are options. `__wrapped__` is the user's own function or class. None where the config's
    field `where`, such as "config.loss.name", names no thing that can be a user's.

    Raises ConfigError if there is no such module or name in it, if its import fails, or if what it
    stands for can't be called as its kind is.
    """
    kind = KINDS.get(re.sub(r"^config\.|\[\d+\]|\.name$", "", where))
    if kind is None:
        return None
    module_name, _, attribute = name.partition(":")
    about = f"{where} is {name!r}"
    if module_name == "__main__":
        raise ConfigError(
            f"{about}: it must be in a module, where others than this program find it"
        )
    module = import_module(about, module_name)
    if not hasattr(module, attribute):
        public = [n for n, v in vars(module).items() if n[0] != "_" and not inspect.ismodule(v)]
        raise ConfigError(
            f"{about}, but {getattr(module, '__file__', None) or module_name} defines no "
            f"{attribute}{did_you_mean(attribute, public) if public else ''}"
        )
    return _guarded(where, name, getattr(module, attribute), kind)


def import_module(about: str, name: str) -> ModuleType:
    """The module; `about` begins the sentence of the ConfigError if there is none."""
    importlib.invalidate_caches()  # it may have been written a moment ago
    with in_user_code(_origin(name.partition(".")[0]) or name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if f"{name}.".startswith(f"{error.name}."):  # not one that it imports itself
                folders = [Path(entry) for entry in sys.path if not is_installed(Path(entry))]
                known = {path.stem for folder in folders for path in folder.glob("*.py")}
                raise ConfigError(
                    f"{about}, but there is no module {error.name} beside the recipe or installed"
                    f"{did_you_mean(str(error.name), known) if known else ''}"
                ) from error
            raise


def _origin(top: str) -> str | None:
    """The file of a module or package, found without importing it; None if there is none."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(top)
        return spec.origin if spec else None
    return None


def is_installed(path: Path) -> bool:
    """Whether a file is Python's, an installed package's or flaxcls' own, not a user's."""
    standard = sysconfig.get_path("stdlib")
    return (
        not {"site-packages", "dist-packages"}.isdisjoint(path.parts)
        or path.is_relative_to(standard)
        or path.is_relative_to(_FLAXCLS)
    )


def _guarded(where: str, name: str, entry: Any, kind: Kind) -> Callable[..., Any]:
    """The user's function or class, called as `kind` says, with errors in one sentence."""
    wrong = ConfigError(
        f"{where} is {name!r}, which can't be {kind.what}: that is called as {kind.call}"
    )
    try:
        parameters = _parameters(entry)
    except (TypeError, ValueError) as error:  # not callable, or written in C
        raise wrong from error
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # An augmentation may be a class of `flaxcls.augment.Augmentation` with options only.
    count = 0 if kind is KINDS["augment"] and isinstance(entry, type) else kind.positional
    first, options = parameters[:count], parameters[count:]
    if (
        len(first) < count
        or any(p.kind not in by_position for p in first)
        or any(p.kind is p.POSITIONAL_ONLY for p in options)
        or (kind is KINDS["model"] and "num_classes" not in [p.name for p in options])
    ):
        raise wrong
    first = [p.replace(kind=p.POSITIONAL_ONLY) for p in first]
    signature = inspect.Signature([*first, *options])

    def call(*arguments: Any, **given: Any) -> Any:
        try:
            signature.bind(*arguments, **given)
        except TypeError as error:
            raise ConfigError(f"{where.removesuffix('.name')}: {name} is {error}") from error
        with in_user_code(file_of(entry)):
            return entry(*arguments, **given)

    call.__signature__, call.__wrapped__ = signature, entry
    return call


def _parameters(entry: Any) -> list[inspect.Parameter]:
    """With annotations as types; those that only a type checker can read count as none."""
    module = sys.modules.get(getattr(entry, "__module__", None) or "")

    def read(parameter: inspect.Parameter) -> inspect.Parameter:
        annotation = parameter.annotation
        if isinstance(annotation, str):  # `from __future__ import annotations`
            try:
                annotation = eval(annotation, vars(module))
            except Exception:
                annotation = parameter.empty
        return parameter.replace(annotation=annotation)

    return [read(parameter) for parameter in inspect.signature(entry).parameters.values()]


def file_of(entry: Any) -> str:
    """Where a function or class is written, also what `load` has made of it."""
    entry = getattr(entry, "__wrapped__", entry)
    module = sys.modules.get(getattr(entry, "__module__", None) or "")
    return getattr(module, "__file__", None) or repr(entry)


@contextlib.contextmanager
def in_user_code(path: Path | str | None) -> Iterator[None]:
    """Around running what a user wrote: its errors are ConfigErrors that name file and line.

    `path` is where the code begins, in a recipe or a module; the line is the innermost one in it,
    or in a file of the user's beside or below it.
    """
    try:
        yield
    except FlaxclsError:
        raise
    except SystemExit as error:
        raise ConfigError(f"{path} ends the program, by SystemExit({error.code!r})") from error
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        where = str(path)
        for frame in traceback.extract_tb(error.__traceback__):
            file = Path(frame.filename)
            is_own = file.is_relative_to(Path(path or "").parent) and not is_installed(file)
            if frame.filename == str(path) or (path and is_own and file.suffix == ".py"):
                where = f"{frame.filename}, line {frame.lineno}"
        raise ConfigError(f"{where}: {_what_is_wrong(error)}") from error


def _what_is_wrong(error: Exception) -> str:
    """One line about an error in a user's code."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    message = one_line(error)
    # ConfigDict says it in many words, listing all fields.
    unknown = re.search(r'Key "(\w+)" does not exist and cannot be added', message)
    close = re.search(r'Did you mean "(\w+)"', message)
    if unknown:
        hint = f", did you mean '{close[1]}'?" if close else ""
        return f"{unknown[1]!r} is not a config field{hint}"
    return f"{type(error).__name__}: {message}"
