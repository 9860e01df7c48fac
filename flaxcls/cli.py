"""What the commands share: reading flags and recipes, saying errors in one sentence, exit codes."""

import ast
import contextlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from flaxcls.config import default, options
from flaxcls.errors import SIGNAL_EXIT_CODES, ConfigError, FlaxclsError, did_you_mean
from flaxcls.runtime import output


def parse(
    flag_values: flags.FlagValues, argv: Sequence[str], usage: str, *, others: bool = False
) -> list[str]:
    """Reads the command line into `flag_values`; ConfigError in one sentence if that fails.

    `--help` prints `usage` and the flags, and exits. Returns the arguments that are not flags,
    such as files, for a command that takes `others`; elsewhere they are an error.
    """
    if "--help" in argv or "-h" in argv:
        output.say(f"{usage.strip()}\n\nFlags:{flag_values.get_help()}")
        sys.exit(0)
    try:
        rest = flag_values(list(argv))[1:]
    except flags.Error as error:
        raise ConfigError(_one_line(error)) from error
    if rest and not others:
        raise ConfigError(f"{rest[0]!r} is not a flag; flags are written --name=value")
    return rest


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides, "batch_size=256" of `--config.batch_size=256`, and the other arguments."""
    prefix = "--config."
    overrides = [text.removeprefix(prefix) for text in argv if text.startswith(prefix)]
    return overrides, [text for text in argv if not text.startswith(prefix)]


class Recipe(NamedTuple):
    """A recipe's config, and what fills in the rest of it and says so; "" if there is nothing.

    `given` are the fields that the command line sets, `is_adaptive` is whether the recipe looks at
    data and devices, so that another time it may choose otherwise.
    """

    config: ConfigDict
    adapt: Callable[[], str]
    given: Sequence[str]
    is_adaptive: bool


def load_config(recipe: str | None, overrides: Sequence[str]) -> ConfigDict:
    """The config of a recipe, complete; see `load_recipe`."""
    loaded = load_recipe(recipe, overrides)
    if said := loaded.adapt():
        output.say(said)
    return loaded.config


def load_recipe(recipe: str | None, overrides: Sequence[str]) -> Recipe:
    """What `get_config()` of the file `recipe` returns, changed by overrides "field=value".

    Values are written as in Python; text needs no quotes. A recipe may also define
    `adapt(config) -> str`, which fills in what is left to the data and the devices and says so; it
    is called last, as it uses devices. Without a recipe the default config is changed. Raises
    ConfigError for whatever is wrong.
    """
    path = _find_recipe(recipe) if recipe is not None else None
    namespace = _read_recipe(path) if path else {"get_config": default}
    with _in_recipe(path):
        config = namespace["get_config"]() if "get_config" in namespace else None
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path} must define get_config(), returning flaxcls.config.default() changed"
        )
    for override in overrides:
        _override(config, override)

    given = [override.partition("=")[0] for override in overrides]
    is_adaptive = "adapt" in namespace

    def adapt() -> str:
        if not is_adaptive and not any(field.endswith(".name") for field in given):
            return ""
        from flaxcls.build import named  # JAX, which takes a second

        lines = [*named.drop_unused(config, given)]
        if is_adaptive:
            named.check_names(config)  # before something is said about them
            with _in_recipe(path):
                lines.append(namespace["adapt"](config))
        return "\n".join(lines)

    return Recipe(config, adapt, given, is_adaptive)


def _find_recipe(text: str) -> Path:
    """The file of a recipe, given as a path or as the name of one in configs/."""
    folders = (Path("configs"), Path(__file__).parents[1] / "configs")
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


def local_folder(flag: str, text: str) -> Path:
    """The folder that a flag names; ConfigError for what is in the cloud."""
    if "://" in text:
        raise ConfigError(f"--{flag}={text} must be a folder of a file system, not in the cloud")
    return Path(text).expanduser()


def _read_recipe(path: Path) -> dict[str, Any]:
    """What the file defines."""
    namespace: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    with _in_recipe(path):
        exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace


@contextlib.contextmanager
def _in_recipe(path: Path | None) -> Iterator[None]:
    """Around running a recipe's code: its errors name file and line."""
    try:
        yield
    except FlaxclsError:
        raise
    except SystemExit as error:
        raise ConfigError(f"{path} ends the program, by SystemExit({error.code!r})") from error
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f", line {f.lineno}" for f in reversed(frames) if f.filename == str(path)), "")
        raise ConfigError(f"{path}{line}: {_what_is_wrong(error)}") from error


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
        if part not in section:
            raise ConfigError(f"{field} is not a config field{did_you_mean(part, section)}")
        parent, section = section, section[part]
    section = parent
    kind = section.get_type(name)
    if issubclass(kind, ConfigDict):
        raise ConfigError(f"{field} is a section; its fields are {', '.join(section[name])}")
    if kind is type(None):  # a recipe has left it open; whether the value fits is checked later
        kind = object
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


def _what_is_wrong(error: Exception) -> str:
    """One line about an error in a recipe."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    message = _one_line(error)
    # ConfigDict says it in many words, listing all fields.
    unknown = re.search(r'Key "(\w+)" does not exist and cannot be added', message)
    close = re.search(r'Did you mean "(\w+)"', message)
    if unknown:
        hint = f", did you mean '{close[1]}'?" if close else ""
        return f"{unknown[1]!r} is not a config field{hint}"
    return f"{type(error).__name__}: {message}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command and exits: its own code, or that of the error, told in one sentence.

    A signal to end ends the process at once, unless `main` takes it over while it has something to
    save: Python's KeyboardInterrupt becomes an ImportError or a crash inside of JAX's native code.
    """
    output.keep_standard_streams()
    for number, exit_code in SIGNAL_EXIT_CODES.items():
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda *_, exit_code=exit_code: os._exit(exit_code))
    sentence = ""
    try:
        code = main(sys.argv) or 0
    except FlaxclsError as error:
        code, sentence = error.exit_code, f"flaxcls: {error}"
    except Exception as error:
        output.say(traceback.format_exc(), error=True)
        code = 1
        if (processes := sys.modules.get("flaxcls.runtime.processes")) and processes.count() > 1:
            what = f"{type(error).__name__}: {_one_line(error)}"
            sentence = f"flaxcls: process {processes.index()} has failed: {what}"
    finally:
        output.flush()
    if processes := sys.modules.get("flaxcls.runtime.processes"):
        processes.leave(code, sentence)  # does not return if it is one of several
    if sentence:
        output.say(sentence, error=True)
    sys.exit(code)
