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

_CONFIGS = Path(__file__).parents[2] / "configs"  # flaxcls' own, which need nothing beside them


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
    if path and path.parent.resolve() != _CONFIGS:  # what is beside it, it can import and name
        search(path.parent)
    namespace = _read_recipe(path) if path else {"get_config": default}
    with in_recipe(path):
        config = namespace["get_config"]() if "get_config" in namespace else None
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path} must define get_config(), returning flaxcls.config.default() changed"
        )
    for override in overrides:
        _override(config, override)
    given = [override.partition("=")[0] for override in overrides]
    return Recipe(config, given, path, namespace.get("adapt"))


def _find_recipe(text: str) -> Path:
    """The file of a recipe, given as a path or as the name of one in configs/."""
    folders = (Path("configs"), _CONFIGS)
    named = [folder / f"{text.removesuffix('.py')}.py" for folder in folders if "/" not in text]
    for path in (Path(text), Path(f"{text}.py"), *named):
        if path.is_file():
            return path
    path = Path(text)
    if path.is_dir():
        raise ConfigError(
            f"--config={text} is a folder; it must be a recipe, such as configs/digits_cnn.py (a "
            "folder of pictures goes with --config=configs/folder.py --config.data.path=DIR)"
        )
    if "/" in text:
        known = {str(other) for other in path.parent.glob("*.py")}
    else:
        known = {other.stem for folder in folders for other in folder.glob("*.py")}
    raise ConfigError(f"there is no config file {text}{did_you_mean(text, known)}")


def _read_recipe(path: Path) -> dict[str, Any]:
    """What the file defines."""
    module = ModuleType(f"the recipe {path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where a dataclass in it looks for its fields' types
    with in_recipe(path):
        exec(compile(path.read_text(), str(path), "exec"), vars(module))
    return vars(module)


def _override(config: ConfigDict, override: str) -> None:
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
