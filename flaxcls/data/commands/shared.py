"""What the commands on data share: which data is meant, and by how many threads it is read."""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from flaxcls.config.recipes import load_recipe
from flaxcls.data import SOURCES
from flaxcls.data.files import is_picture
from flaxcls.errors import ConfigError

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def define_flags() -> flags.FlagValues:
    """The flags that say which data, and by how many threads they are read."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "A recipe, for its config.data.", flag_values=values)
    flags.DEFINE_string(
        "source", None, "A data set's name, a folder, a .csv or .jsonl file.", flag_values=values
    )
    flags.DEFINE_integer(
        "threads", None, "Decoding threads; one per core.", lower_bound=1, flag_values=values
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
    path = Path(source).expanduser()
    if source in SOURCES:
        return [f"data.name={source}"]
    if path.suffix.lower() in (".csv", ".jsonl"):
        return ["data.name=list", f"data.path={source}"]
    is_path = os.sep in source
    if path.is_file() or (is_path and path.suffix.lower() in _ARCHIVES):
        raise ConfigError(f"--source={source} {_what_file(path)}")
    if path.is_dir() and any(path.glob("*idx3-ubyte*")):
        return ["data.name=idx", f"data.path={source}"]
    if path.is_dir():
        levels = ("", "*/", "*/*/")  # of a version, a data set, and one with configs
        if not any(True for level in levels for _ in path.glob(f"{level}dataset_info.json")):
            return ["data.name=folder", f"data.path={source}"]
        if is_path:
            raise ConfigError(
                f"{source} is a data set of TFDS: give its name as --source, and the folder that "
                "holds it as --config.data.dir"
            )
    elif is_path and source[0] in "./~":
        raise ConfigError(f"there is no folder {source}")
    return [f"data.name={source}"]


def _what_file(path: Path) -> str:
    """Why a file that is not a list is no source, and what would be."""
    if not path.exists():
        return "does not exist"
    suffix = path.suffix.lower()
    if "idx3-ubyte" in path.name or "idx1-ubyte" in path.name:
        return "is one of the files of a data set: give their folder"
    if suffix in _ARCHIVES:
        return "is an archive: unpack it, and give the folder that comes out of it"
    if suffix == ".py":
        return f"is a recipe: give it as --config={path}"
    if is_picture(path.name):
        return "is a picture: give the folder whose folders are the classes"
    return "is a file, but no list of pictures, whose name ends in .csv or .jsonl"
