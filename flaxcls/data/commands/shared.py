"""What the commands on data share: which data is meant, and by how many threads it is read."""

from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from flaxcls.config.recipes import load_recipe
from flaxcls.data.naming import name_and_path
from flaxcls.errors import ConfigError

flags.disclaim_key_flags()  # --help lists them among those of the command itself


def define_flags() -> flags.FlagValues:
    """The flags that say which data, and by how many threads they are read."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "A recipe, for its config.data.", flag_values=values)
    flags.DEFINE_string(
        "source", None, "A data set's name, a folder, a .csv or .jsonl file.", flag_values=values
    )
    flags.DEFINE_integer(
        "threads",
        None,
        "Decoding threads; one per core, 8 in the cloud.",
        lower_bound=1,
        flag_values=values,
    )
    return values


def read_config(values: flags.FlagValues, overrides: Sequence[str]) -> ConfigDict:
    """The recipe or the default config with what --source says and then the overrides.

    What a recipe leaves to its data and to the devices stays open: only data are meant here, and
    these may be what is wrong.
    """
    names_data = any(override.startswith("data.name=") for override in overrides)
    if not (values.config or values.source or names_data):
        raise ConfigError("--source=NAME-or-PATH is missing (or --config=FILE)")
    data = [] if values.source is None else source_overrides(values.source)
    return load_recipe(values.config, [*data, *overrides]).config


def source_overrides(source: str) -> list[str]:
    """What --source=... stands for: a folder or a list of pictures, or the name of a data set."""
    return [f"data.{option}={text}" for option, text in name_and_path(source).items()]
