"""What the commands share: reading flags, saying errors in one sentence, exit codes."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from flaxcls.errors import ConfigError, FlaxclsError, did_you_mean


def config_flag(flag_values: flags.FlagValues) -> None:
    """Defines `--config=FILE` with overrides such as `--config.batch_size=256`."""
    config_flags.DEFINE_config_file(
        "config", None, "The recipe, such as configs/digits_cnn.py.", flag_values=flag_values
    )


def parse(flag_values: flags.FlagValues, argv: Sequence[str], usage: str) -> None:
    """Reads the command line into `flag_values`; ConfigError in one sentence if that fails.

    `--help` prints `usage` and the flags, and exits.
    """
    if "--help" in argv or "-h" in argv:
        print(usage.strip(), "\n\nFlags:", flag_values.get_help(), sep="")
        sys.exit(0)
    _check_config_file(argv)
    try:
        rest = flag_values(list(argv))[1:]
    except flags.Error as error:
        raise ConfigError(_one_line(error)) from error
    except (AttributeError, KeyError) as error:
        raise ConfigError(_unknown_field(flag_values, argv) or _one_line(error)) from error
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"the config or one of its overrides is wrong: {_one_line(error)}") from error
    if rest:
        raise ConfigError(f"{rest[0]!r} is not a flag; flags are written --name=value")


def _check_config_file(argv: Sequence[str]) -> None:
    for name in (argument.removeprefix("--config=") for argument in argv if "--config=" in argument):
        path = Path(name)
        if not path.is_file():
            others = [str(other) for other in path.parent.glob("*.py")]
            raise ConfigError(f"there is no config file {name}{did_you_mean(name, others)}")


def _unknown_field(flag_values: flags.FlagValues, argv: Sequence[str]) -> str | None:
    """The sentence about the first override, `--config.a.b=c`, of a field that does not exist."""
    recipe = next(argument for argument in argv if argument.startswith("--config="))
    fresh = flags.FlagValues()
    config_flag(fresh)
    fresh([argv[0], recipe])
    for argument in argv:
        if argument.startswith("--config."):
            section, path = fresh["config"].value, argument.removeprefix("--config.").split("=")[0]
            for name in path.split("."):
                if not isinstance(section, ConfigDict) or name not in section:
                    known = list(section) if isinstance(section, ConfigDict) else []
                    return f"config.{path} is not a config field{did_you_mean(name, known)}"
                section = section[name]
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Runs a command and exits: its own code, or that of the error, told in one sentence."""
    try:
        code = main(sys.argv)
    except FlaxclsError as error:
        print(f"flaxcls: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
