"""Digests of the files of a folder, with which damage is found before the files are used.

manifest.json names every file below its folder with its size in bytes and its SHA-256, which
finds what a file system does not detect: a flipped bit, a file that is cut off, missing or foreign.
"""

import hashlib
import json
import os
import stat
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from flaxcls.errors import CheckpointError
from flaxcls.files import write_json

NAME = "manifest.json"


class Damaged(CheckpointError):
    """A folder is not what was written; the sentence names the file and what is wrong with it."""


def write(folder: Path, exclude: Collection[str] = ()) -> int:
    """Writes manifest.json, atomically, and returns the bytes of the files it lists.

    The files are flushed to the disk, so that where there is a manifest the files are complete.

    Args:
      folder: has files, at any depth, and no symbolic links (else Damaged).
      exclude: files, by their path in `folder`, that are still going to change.
    """
    sizes = _sizes(folder)
    files = {}
    for name in sorted(sizes.keys() - set(exclude) - {NAME, f"{NAME}.tmp"}):
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
            files[name] = {"size": sizes[name], "sha256": _digest(file)}
    write_json(folder / NAME, {"files": files}, fsync=True)
    return sum(entry["size"] for entry in files.values())


def verify(folder: Path, exclude: Collection[str] = ()) -> bool:
    """True if all files are as manifest.json has them, False if there is none; raises Damaged.

    A symbolic link, and a folder without files, are damage with a manifest or without.
    `exclude` may be there, whatever they hold.
    """
    sizes = _sizes(folder)
    if NAME not in sizes:
        return False
    listed = _read(folder / NAME)
    for name in listed:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise Damaged(f"{NAME} lists {name}, which is outside of the folder")
        if name not in sizes:
            raise Damaged(f"{name} is missing")
    for name in sorted(sizes.keys() - set(exclude) - {NAME}):
        if name not in listed:
            raise Damaged(f"{name} is not in {NAME}")
        size, digest = listed[name]
        if sizes[name] != size:
            raise Damaged(f"{name} has {sizes[name]} bytes instead of {size}")
        try:
            with (folder / name).open("rb") as file:
                same = _digest(file) == digest
        except OSError as error:
            raise Damaged(f"{name} can't be read: {error.strerror}") from error
        if not same:
            raise Damaged(f"{name} is not what was written: its digest differs")
    return True


def _digest(file: BinaryIO) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # in chunks, without the GIL


def _read(path: Path) -> dict[str, tuple[int, str]]:
    """name -> (size, digest)."""
    try:
        files = json.loads(path.read_bytes())["files"]
        return {name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{NAME} is not a readable manifest") from error
    except OSError as error:
        raise Damaged(f"{NAME} can't be read: {error.strerror}") from error


def _sizes(folder: Path) -> dict[str, int]:
    """The size of every file below a folder, by its path in it with slashes."""

    def fail(error: OSError) -> None:
        raise Damaged(f"{error.filename} can't be read: {error.strerror}") from error

    if folder.is_symlink():
        raise Damaged(f"{folder} is a symbolic link")
    sizes = {}
    for parent, folders, files in os.walk(folder, onerror=fail):
        for path in (Path(parent, name) for name in folders + files):
            name = path.relative_to(folder).as_posix()
            try:
                status = path.lstat()
            except OSError as error:  # it was there a moment ago
                raise Damaged(f"{name} can't be read: {error.strerror}") from error
            if stat.S_ISREG(status.st_mode):
                sizes[name] = status.st_size
            elif stat.S_ISLNK(status.st_mode):
                raise Damaged(f"{name} is a symbolic link")
            elif not stat.S_ISDIR(status.st_mode):
                raise Damaged(f"{name} is no regular file")
    if not sizes:
        raise Damaged("the folder is empty")
    return sizes
