"""A folder of pictures: `DIR/train/CLASS/*` with `DIR/val/CLASS/*`, or `DIR/CLASS/*`.

In the cloud every folder of a class is listed by itself, with all that is below it, in threads: as
one list of all a million pictures would take minutes, a thousand after the other.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from flaxcls import remote
from flaxcls.data.files import (
    EXTENSIONS,
    NOT_READ,
    SPLITS,
    Files,
    FileSource,
    asked_splits,
    class_labels,
    class_name,
    divide,
    is_picture,
)
from flaxcls.data.source import Ignored
from flaxcls.data.storage import data_error
from flaxcls.errors import ConfigError, DataError
from flaxcls.remote import is_remote
from flaxcls.runtime.output import printable

_LAYOUT = "the layout should be DIR/train/CLASS/* with DIR/val/CLASS/*, or DIR/CLASS/*"
_THREADS = 32  # that wait for disks or the cloud, and don't compute
_IGNORED = ("__MACOSX", "@eaDir")  # what macOS's zip files and Synology's disks put beside pictures


def open_folder(
    split: str,
    path: str,
    *,
    held_out: float,
    split_seed: int,
    channels: int,
    max_bytes: int,
    class_names: Sequence[str] | None = None,
) -> FileSource:
    """Opens a split of a folder; see `flaxcls.data.open_folder`.

    Lists only the splits that are asked for, and reads no file. With `class_names`, those of a
    network, a split needs no training split beside it, and may lack some of the classes.

    Raises:
      ConfigError: the folder is not laid out as it should be; the sentence says what was found.
      DataError: a folder cannot be listed.
    """
    root = os.path.expanduser(path)
    to_train = class_names is None
    split_folders = _split_folders(root, needs_train=to_train)
    folders = split_folders or {"train": root}
    asked = asked_splits(split, folders) if split_folders else ["train"]
    listed = ("train", *asked) if to_train else asked
    classes = {part: _class_folders(folders[part]) for part in listed}
    class_names = class_labels(
        {folders[part]: {*names.values()} for part, names in classes.items()}, class_names
    )
    index = {name: number for number, name in enumerate(class_names)}
    jobs = [  # the folders of classes: the split, label and path of each
        (part, index[name], os.path.join(folders[part], folder))
        for part in asked
        for folder, name in sorted(classes[part].items())
    ]
    with ThreadPoolExecutor(_THREADS) as threads:
        if is_remote(root):
            found = list(threads.map(lambda job: _remote_pictures(job[-1], root), jobs))
        else:
            above = {_identity(folder) for folder in (root, *folders.values())}
            found = list(threads.map(lambda job: _pictures(job[-1], root, above), jobs))
    counts = [len(pictures.paths) for pictures in found]
    for (_, _, folder), count in zip(jobs, counts, strict=True):
        if to_train and not count:
            raise ConfigError(
                f"class folder {printable(folder)} has no images ({', '.join(EXTENSIONS)})"
            )
    files = Files(
        paths=[path for pictures in found for path in pictures.paths],
        sizes=np.concatenate([pictures.sizes for pictures in found]),
        labels=np.repeat(np.array([label for _, label, _ in jobs], np.int32), counts),
        times=np.concatenate([pictures.times for pictures in found]),
    )
    split_of = np.repeat([part for part, _, _ in jobs], counts) if split_folders else None
    return FileSource(
        name="folder",
        split=split,
        root=root,
        class_names=class_names,
        files=files,
        splits=divide(files, split_of, held_out=held_out, seed=split_seed),
        channels=channels,
        max_bytes=max_bytes,
        there=split_folders or ("train", "validation"),
        ignored=_ignored(root, [folders[part] for part in asked], found, "train" in asked),
    )


def contents(path: str, needs_train: bool = True) -> tuple[list[str], list[str]]:
    """The splits of a folder, and the names of all classes that any of them has, sorted.

    The splits need not fit together, as they must for `open_folder`. ConfigError where there is no
    such folder or it has no folders in it, DataError where one can't be listed.
    """
    root = os.path.expanduser(path)
    folders = _split_folders(root, needs_train)
    inside = [_list_folder(folder).folders for folder in folders.values()]
    names = {class_name(name) for names in inside or [_class_folders(root)] for name in names}
    return list(folders) or ["train", "validation"], sorted(names)


def _split_folders(root: str, needs_train: bool) -> dict[str, str]:
    """The folder of every split, by the split's name; nothing where `root` has those of classes."""
    if missing := _missing(root):
        raise ConfigError(f"config.data.path must be a folder of pictures, but {root} {missing}")
    names: dict[str, str] = {}
    subfolders = _list_folder(root).folders
    for folder in subfolders:
        split = SPLITS.get(folder.lower())
        if split in names:
            raise ConfigError(f"{root} has two folders for '{split}': {names[split]} and {folder}")
        if split is not None:
            names[split] = folder
    folders = {split: os.path.join(root, folder) for split, folder in names.items()}
    if len(folders) < len(subfolders):  # a class may be called "train": it has pictures in it
        return folders if "train" in folders and _list_folder(folders["train"]).folders else {}
    if folders and "train" not in folders and needs_train:
        raise ConfigError(f"{root} has {', '.join(names.values())} but no train: {_LAYOUT}")
    return folders


def _missing(root: str) -> str:
    """Why there is no folder at a path; empty where there is one."""
    try:
        if is_remote(root):
            if remote.entries(root):
                return ""
            remote.information(root)
        elif os.path.isdir(root):
            return ""
        else:
            os.stat(root)
        return "is a file"
    except OSError as error:  # or it is in a folder that may not be looked into
        if error.errno == errno.EIO:
            raise data_error(f"{printable(root)} cannot be listed", error) from error
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        no_bucket = missing and is_remote(root) and error.strerror != os.strerror(errno.ENOENT)
        if missing and not no_bucket:
            return "does not exist"
        return f"can't be reached: {error.strerror}"


def _class_folders(folder: str) -> dict[str, str]:
    """The class's name by the name of its folder."""
    subfolders, images, _ = _list_folder(folder)
    if not subfolders:
        found = f"images ({len(images)}) but no class folders" if images else "no class folders"
        raise ConfigError(f"{folder} has {found}: {_LAYOUT}")
    return {name: class_name(name) for name in subfolders}


class _Inside(NamedTuple):
    """Names of what is in a folder: folders (sorted), images and other files."""

    folders: list[str]
    images: list[str]
    others: list[str]


def _list_folder(folder: str) -> _Inside:
    inside = _Inside([], [], [])
    for entry, is_folder in visible_entries(folder):
        files = inside.images if is_picture(entry.name) else inside.others
        (inside.folders if is_folder else files).append(entry.name)
    inside.folders.sort()
    return inside


class _Pictures(NamedTuple):
    """The images of a class by path, with bytes and nanoseconds; and other files."""

    paths: list[str]
    sizes: np.ndarray
    times: np.ndarray
    others: list[str]


def _ignored(
    root: str, folders: Sequence[str], classes: Sequence[_Pictures], with_root: bool
) -> Ignored:
    """The files in the folders of classes that are no images, and all beside these folders.

    What is beside the folders of splits is reported for one split only.
    """
    names = [name for pictures in classes for name in pictures.others]
    misplaced = []
    for folder in sorted({*folders, root} if with_root else {*folders}):
        inside, here = _list_folder(folder), os.path.relpath(folder, root)
        for kind, found in ((misplaced, inside.images), (names, inside.others)):
            kind += [os.path.normpath(os.path.join(here, name)) for name in found]
    pictures = [name for name in names if is_picture(name, NOT_READ)]
    others = {*names} - {*pictures}
    return Ignored(*(tuple(sorted(some)) for some in (pictures, misplaced, others)))


def _pictures(folder: str, root: str, above: set[tuple[int, int]]) -> _Pictures:
    """The images in a class's folder and those below, by paths relative to `root`.

    Links are followed, except to a folder that was seen already or is one of those `above`.
    """
    seen, pending, found = set(above), [os.path.relpath(folder, root)], []
    others = []
    while pending:
        here = pending.pop()
        path = os.path.join(root, here)
        if (identity := _identity(path)) in seen:
            continue
        seen.add(identity)
        subfolders = []
        for entry, is_folder in visible_entries(path):
            if is_folder:
                subfolders.append(f"{here}/{entry.name}")
            elif is_picture(entry.name):
                found.append((f"{here}/{entry.name}", *_size_and_time(entry)))
            else:
                others.append(f"{here}/{entry.name}")
        pending += sorted(subfolders, reverse=True)  # of two links to a folder always the same one
    found.sort()
    paths, sizes, times = zip(*found, strict=True) if found else ((), (), ())
    return _Pictures([*paths], np.array(sizes, np.int64), np.array(times, np.int64), others)


def _remote_pictures(folder: str, root: str) -> _Pictures:
    """As `_pictures`, in the cloud, which has no links."""
    try:
        entries = remote.below(folder)
    except OSError as error:
        raise data_error(f"{printable(folder)} cannot be listed", error) from error
    names = [entry.path[len(root.rstrip("/")) + 1 :] for entry in entries]
    above = os.path.relpath(folder, root).count("/") + 1
    seen = [
        (name, entry.size, entry.time)
        for name, entry in zip(names, entries, strict=True)
        if not any(map(_is_hidden, name.split("/")[above:]))
    ]
    found = [file for file in seen if is_picture(file[0])]
    paths, sizes, times = zip(*found, strict=True) if found else ((), (), ())
    others = [name for name, _, _ in seen if not is_picture(name)]
    return _Pictures([*paths], np.array(sizes, np.int64), np.array(times, np.int64), others)


def visible_entries(folder: str) -> Iterator[tuple[os.DirEntry | remote.Entry, bool]]:
    """What is in a folder and isn't hidden, and whether each is a folder."""
    try:
        if is_remote(folder):
            for entry in remote.entries(folder):
                if not _is_hidden(entry.name):
                    yield entry, entry.is_folder
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if not _is_hidden(entry.name):
                    yield entry, _is_folder(entry)
    except OSError as error:
        raise data_error(f"{printable(folder)} cannot be listed", error) from error


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _IGNORED


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size_and_time(entry: os.DirEntry) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:  # a link to nowhere: reading it will say so
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be listed: {error.strerror}") from error
    return status.st_dev, status.st_ino
