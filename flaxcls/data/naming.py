"""Which data are meant by what somebody types: a folder, a list, or the name of a data set."""

import errno
import os
from pathlib import Path

from flaxcls import remote
from flaxcls.data import SOURCES
from flaxcls.data.files import is_picture
from flaxcls.data.storage import data_error
from flaxcls.errors import ConfigError
from flaxcls.remote import is_remote

_OF_TFDS = (
    "is a data set of TFDS: give its name as --source, and the folder that holds it as "
    "--config.data.dir"
)
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def name_and_path(source: str) -> dict[str, str]:
    """What `--source=...` stands for: {"name", "path"} of `config.data`, the path only of files.

    It is a folder or a list of pictures, or the name of a data set. ConfigError for a path at which
    there is neither.
    """
    path = Path(source).expanduser()
    if source in SOURCES:
        return {"name": source}
    if path.suffix.lower() in (".csv", ".jsonl"):
        return {"name": "list", "path": source}
    if is_remote(source):
        return {"name": _kind_in_the_cloud(source, path), "path": source}
    is_path = os.sep in source
    if path.is_file() or (is_path and path.suffix.lower() in _ARCHIVES):
        raise ConfigError(f"--source={source} {_what_file(path)}")
    if path.is_dir() and any(path.glob("*idx3-ubyte*")):
        return {"name": "idx", "path": source}
    if path.is_dir():
        levels = ("", "*/", "*/*/")  # of a version, a data set, and one with configs
        if not any(True for level in levels for _ in path.glob(f"{level}dataset_info.json")):
            return {"name": "folder", "path": source}
        if is_path:
            raise ConfigError(f"{source} {_OF_TFDS}")
    elif is_path and source[0] in "./~":
        raise ConfigError(f"there is no folder {source}")
    return {"name": source}


def _kind_in_the_cloud(source: str, path: Path) -> str:
    """ "folder" or "idx", by a request or two; ConfigError for what is neither."""
    if path.suffix.lower() in _ARCHIVES:
        raise ConfigError(f"--source={source} {_what_file(path, exists=True)}")
    try:
        inside = below = remote.entries(source)
        for _ in range(3):  # where there is a data set, the first of its folders leads to it
            if any(entry.name == "dataset_info.json" for entry in below):
                raise ConfigError(f"{source} {_OF_TFDS}")
            folder = next((entry.path for entry in below if entry.is_folder), None)
            below = remote.entries(folder) if folder else []
    except OSError as error:
        if error.errno == errno.EIO:
            raise data_error(f"{source} can't be reached", error) from error
        raise ConfigError(f"{source} can't be reached: {error.strerror}") from error
    return "idx" if any("idx3-ubyte" in entry.name for entry in inside) else "folder"


def _what_file(path: Path, exists: bool | None = None) -> str:
    """Why a file that is not a list is no source, and what would be."""
    if not (path.exists() if exists is None else exists):
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
