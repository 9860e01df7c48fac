"""What the commands share: reading flags and recipes, reporting errors, exit codes."""

import errno
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from flaxcls.buckets import AnyPath, as_path
from flaxcls.config.recipes import docstring, load_recipe
from flaxcls.errors import (
    SIGNAL_EXIT_CODES,
    ConfigError,
    DataError,
    FlaxclsError,
    did_you_mean,
    one_line,
)
from flaxcls.remote import is_remote
from flaxcls.runtime import output
from flaxcls.runtime.huge_pages import restart_with_huge_pages

# What comes after `python -m flaxcls`: modules with main(argv), imported when they are asked for.
COMMANDS = {
    "train": "flaxcls.main",
    "evaluate": "flaxcls.evaluate",
    "calibrate": "flaxcls.calibrate",
    "predict": "flaxcls.predict",
    "explain": "flaxcls.explain",
    "search": "flaxcls.search",
    "export": "flaxcls.export",
    "report": "flaxcls.report.__main__",
    "attack": "flaxcls.attack",
    "average": "flaxcls.average",
    "crossval": "flaxcls.crossval",
    "sweep": "flaxcls.sweep",
    "audit": "flaxcls.audit",
    "data": "flaxcls.data.__main__",
    "data check": "flaxcls.data.commands.check",
    "data prepare": "flaxcls.data.commands.prepare",
    "data preview": "flaxcls.data.commands.preview",
    "bench": "flaxcls.bench",
    "plan": "flaxcls.plan",
}

flags.disclaim_key_flags()  # what is defined here --help lists among those of the command itself

# Flags that are the same in several commands: how each is defined, its default, what it is.
COMMON: dict[str, tuple[Any, ...]] = {
    "config": (flags.DEFINE_string, None, "The recipe, such as configs/digits_cnn.py."),
    "run": (flags.DEFINE_string, None, "The run's folder."),
    "split": (flags.DEFINE_string, None, "The split; the run's own if not given."),
    "checkpoint": (flags.DEFINE_string, "last", "Which one: last, best or a step."),
    "ema": (flags.DEFINE_bool, None, "Averaged parameters, or not; the better ones."),
    "data_dir": (flags.DEFINE_string, None, "Where the data is, if it has moved."),
    "source": (flags.DEFINE_string, None, "Other data: a name or a path."),
    "classes": (flags.DEFINE_string, None, "A CSV: what --source calls classes."),
    "tta": (
        *(flags.DEFINE_string, None),
        "Test-time augmentation, such as flip, or none; the run's own if not given.",
    ),
    "average": (
        *(flags.DEFINE_enum, "probabilities", ("probabilities", "logits")),
        "What of several runs is averaged.",
    ),
}


def common_flags(*names: str) -> flags.FlagValues:
    """The flags of a command, those of COMMON so far; it defines its own besides."""
    flag_values = flags.FlagValues()
    for name in names:
        define, *arguments = COMMON[name]
        define(name, *arguments, flag_values=flag_values)
    return flag_values


def arguments(flag_values: flags.FlagValues, *others: str) -> dict[str, Any]:
    """The values of all flags but some: what the library's function takes by the same names."""
    return {name: flag_values[name].value for name in flag_values if name not in others}


def dispatch(argv: Sequence[str], group: str = "") -> int | None:
    """Runs the command argv[1] of a group, such as "data "; ConfigError if there is none."""
    known = {
        name.removeprefix(group): COMMANDS[name] for name in COMMANDS if name.startswith(group)
    }
    command = argv[1] if len(argv) > 1 else None
    if command not in known:
        what = "a command is missing" if command is None else f"{command!r} is not a command"
        raise ConfigError(f"{what}{did_you_mean(command or '', known)}")
    return importlib.import_module(known[command]).main(argv[1:])


def summary(command: str) -> str:
    """The first line that a command says of itself; it is not imported for that."""
    _, *parts = COMMANDS[command].split(".")
    return docstring(Path(__file__).parent.joinpath(*parts).with_suffix(".py")).partition("\n")[0]


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
        raise ConfigError(one_line(error)) from error
    if rest and not others:
        raise ConfigError(f"{rest[0]!r} is not a flag; flags are written --name=value")
    return rest


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides, "batch_size=256" of `--config.batch_size=256`, and the other arguments."""
    prefix = "--config."
    overrides = [text.removeprefix(prefix) for text in argv if text.startswith(prefix)]
    return overrides, [text for text in argv if not text.startswith(prefix)]


def load_config(recipe: str | None, overrides: Sequence[str]) -> ConfigDict:
    """The config of a recipe, complete; ConfigError for whatever is wrong with it."""
    from flaxcls.build.adapt import adapt  # JAX, which takes a second

    loaded = load_recipe(recipe, overrides)
    if said := adapt(loaded):
        output.say(said)
    return loaded.config


def folder(flag: str, text: str) -> AnyPath:
    """The folder that a flag names, here or in a bucket, which is asked whether it answers.

    Raises ConfigError as `as_path` does and where the bucket answers others only, and FlaxclsError
    where it does not answer, which may pass.
    """
    path = as_path(text, f"--{flag}=")
    if is_remote(path):
        try:
            path.exists()
        except OSError as error:
            kind = ConfigError if error.errno == errno.EACCES else FlaxclsError
            raise kind(f"--{flag}={text} can't be reached: {error.strerror}") from error
    return path


def check_folder(flag: str, path: str | Path, *, bucket: bool = False) -> None:
    """ConfigError unless the folder that a flag's file shall be in is there; or a `bucket` may."""
    if is_remote(path):
        if not bucket:
            raise ConfigError(f"--{flag}={path} must be on this machine, not in a bucket")
        as_path(path, f"--{flag}=")
    elif not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--{flag}={output.printable(path)} is in a folder that does not exist")


def check_png(flag: str, path: str | Path) -> None:
    """ConfigError unless a flag names a PNG in a folder that is there."""
    check_folder(flag, path)
    if not str(path).lower().endswith(".png"):
        raise ConfigError(f"--{flag}={output.printable(path)} must end in .png")


def check_run(runs: str | Sequence[str] | None) -> None:
    """ConfigError if --run, which may be given several times, is missing."""
    if runs is None or runs == []:
        raise ConfigError("--run=DIR is missing; it is the folder that training made")


def check_pictures(paths: Sequence[str]) -> None:
    """ConfigError unless pictures are named behind the flags, one of which is there."""
    if not paths:
        raise ConfigError("no pictures are given: name files, or folders that hold them")
    if not any("://" in path or os.path.exists(path) for path in paths):
        raise ConfigError(f"there is no file {paths[0]}")


def find_pictures(paths: Iterable[str]) -> Iterator[str]:
    """The files among the paths, and all pictures in and below the folders, sorted."""
    for path in paths:
        if "://" in path:
            yield from _remote_pictures(path)
        elif os.path.isdir(path):
            yield from _pictures_below(path, ())
        else:
            yield path


def all_pictures(paths: Iterable[str]) -> list[str]:
    """What `find_pictures` finds; ConfigError if that is nothing."""
    paths = list(paths)
    if not (found := list(find_pictures(paths))):
        raise ConfigError(f"there are no pictures in {', '.join(paths)}")
    return found


def _pictures_below(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    from flaxcls.data.files import is_picture
    from flaxcls.data.folder import visible_entries

    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a link to where it is itself
        return
    try:
        entries = [(entry.path, is_folder) for entry, is_folder in visible_entries(folder)]
    except DataError:
        yield folder  # reading it will say why
        return
    for path, is_folder in sorted(entries, key=lambda entry: entry[0] + "/" * entry[1]):
        if is_folder:
            yield from _pictures_below(path, (*above, identity))
        elif is_picture(path):
            yield path


def _remote_pictures(path: str) -> list[str]:
    """The pictures in and below a folder in the cloud, sorted; `path` itself if it is no folder."""
    from flaxcls import remote
    from flaxcls.data.files import is_picture

    if is_picture(path):
        return [path]
    try:
        found = [entry.path for entry in remote.below(path)]
    except OSError:
        return [path]  # reading it will say why
    hidden = len(path.rstrip("/"))
    return [each for each in found if is_picture(each) and "/." not in each[hidden:]]


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command and exits: its own code, or that of the error, reported in one sentence.

    A signal to end ends the process at once, unless `main` takes it over while it has something to
    save: Python's KeyboardInterrupt becomes an ImportError or a crash inside of JAX's native code.
    """
    if not {"--help", "-h"}.intersection(sys.argv):
        restart_with_huge_pages()
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
            what = f"{type(error).__name__}: {one_line(error)}"
            sentence = f"flaxcls: process {processes.index()} has failed: {what}"
    finally:
        output.flush()
    if processes := sys.modules.get("flaxcls.runtime.processes"):
        processes.leave(code, sentence)  # does not return if it is one of several
    if sentence:
        output.say(sentence, error=True)
    sys.exit(code)
