"""Recipes: files that make a config, and the overrides of the command line."""

import ast
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flaxcls.config import options
from flaxcls.config.tree import default
from flaxcls.config.user_code import in_user_code as in_recipe
from flaxcls.config.user_code import search
from flaxcls.errors import ConfigError, did_you_mean

# Where flaxcls' own recipes are, which need nothing beside them: installed, or in a checkout.
_OWN = tuple(Path(__file__).parents[up] / "configs" for up in (1, 2))


class Recipe(NamedTuple):
    """A recipe's config, changed by the command line, before it is adapted (`build.adapt`).

    Attributes:
      config: what `get_config()` returned, with the overrides.
      given: the fields that the overrides set, such as "optimizer.name".
      path: the recipe's file; None for the default config.
      adapt: the recipe's own `adapt(config) -> str`, which fills in what it leaves to the data and
        the devices and says so; None if it has none.
    """

    config: ConfigDict
    given: Sequence[str]
    path: Path | None
    adapt: Callable[[ConfigDict], str] | None


def load_recipe(recipe: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """What `get_config()` of the file `recipe` returns, changed by overrides "field=value".

    Values are written as in Python; text needs no quotes. Without a recipe the default config is
    changed. Raises ConfigError for whatever is wrong.
    """
    path = _find_recipe(recipe) if recipe is not None else None
    if path and path.parent.resolve() not in _OWN:  # what is beside it, it can import and name
        search(path.parent)
    namespace: dict[str, Any] = _read_recipe(path) if path else {"get_config": default}
    with in_recipe(path):
        config = namespace["get_config"]() if "get_config" in namespace else None
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path} must define get_config(), returning flaxcls.config.default() changed"
        )
    for override in overrides:
        apply_override(config, override)
    given = [override.partition("=")[0] for override in overrides]
    return Recipe(config, given, path, namespace.get("adapt"))


def known_recipes() -> dict[str, Path]:
    """The files of the recipes that are found by name: those in ./configs, then flaxcls' own."""
    installed, checkout = _OWN
    folders = (installed if installed.is_dir() else checkout, Path("configs"))
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.py"))}


def docstring(path: Path) -> str:
    """What a Python file says of itself, without running it; "" if it can't be read."""
    try:
        return ast.get_docstring(ast.parse(path.read_bytes())) or ""
    except (OSError, SyntaxError, ValueError):
        return ""


def _find_recipe(text: str) -> Path:
    """The file of a recipe, given as a path or by name."""
    path, known = Path(text), known_recipes()
    named = known.get(text.removesuffix(".py"))
    for candidate in (path, Path(f"{text}.py"), named):
        if candidate and candidate.is_file():
            return candidate
    if path.is_dir():
        raise ConfigError(
            f"--config={text} is a folder; it must be a recipe, such as configs/digits_cnn.py (a "
            "folder of pictures goes with --config=configs/folder.py --config.data.path=DIR)"
        )
    beside = {str(other) for other in path.parent.glob("*.py")} if "/" in text else ()
    hint = did_you_mean(text, beside) if beside else did_you_mean(path.stem, known)
    raise ConfigError(f"there is no config file {text}{hint}")


def _read_recipe(path: Path) -> dict[str, Any]:
    """What the file defines."""
    module = ModuleType(f"the recipe {path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where a dataclass in it looks for its fields' types
    with in_recipe(path):
        exec(compile(path.read_text(), str(path), "exec"), vars(module))
    return vars(module)


def apply_override(config: ConfigDict, override: str) -> None:
    """Changes a config by "field=value", as `load_recipe` does."""
    path, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--config.{path} needs a value, as in --config.{path}=VALUE")
    field, section = f"config.{path}", config
    *sections, name = path.split(".")
    for part in path.split("."):
        if not isinstance(section, ConfigDict):
            raise ConfigError(
                f"{field} is not a config field: config.{'.'.join(sections)} has none"
            )
        if part not in section and (section.is_locked or part != name):
            raise ConfigError(f"{field} is not a config field{did_you_mean(part, section)}")
        parent, section = section, section.get(part)
    section = parent
    kind = section.get_type(name) if name in section else object
    if kind is type(None) or not (section.is_locked or issubclass(kind, (str, ConfigDict))):
        kind = object  # left open, or an option of a named thing: checked when that is built
    if issubclass(kind, ConfigDict):
        raise ConfigError(f"{field} is a section; its fields are {', '.join(section[name])}")
    value = _read(text, kind)
    if kind is not object and value is not None and not options.fits(value, kind):
        raise ConfigError(f"{field} must be {options.describe(kind)}, got {text!r}")
    section[name] = value


def _read(text: str, kind: type) -> Any:
    """The value that `text` writes for a field of a type; text that is no Python is itself."""
    words = {"None": None} if kind is str else {"None": None, "true": True, "false": False}
    if kind is str or text in words:
        return words.get(text, text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
