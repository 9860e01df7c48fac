"""A folder of pictures: `DIR/train/CLASS/*` with `DIR/val/CLASS/*`, or `DIR/CLASS/*`."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flaxcls.data.files import (
    EXTENSIONS,
    SPLITS,
    Files,
    FileSource,
    asked_splits,
    class_labels,
    class_name,
    divide,
    is_picture,
)
from flaxcls.errors import ConfigError, DataError
from flaxcls.output import printable

_LAYOUT = "the layout should be DIR/train/CLASS/* with DIR/val/CLASS/*, or DIR/CLASS/*"
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
    looked_at = ("train", *asked) if to_train else asked
    classes = {part: _class_folders(folders[part]) for part in looked_at}
    class_names = class_labels(
        {folders[part]: {*names.values()} for part, names in classes.items()}, class_names
    )
    index = {name: number for number, name in enumerate(class_names)}
    jobs = [  # the folders of classes: the split, label and path of each
        (part, index[name], os.path.join(folders[part], folder))
        for part in asked
        for folder, name in sorted(classes[part].items())
    ]
    above = {_identity(folder) for folder in (root, *folders.values())}
    with ThreadPoolExecutor(16) as threads:  # waiting for disks, not computing
        found = list(threads.map(lambda job: _pictures(job[-1], root, above), jobs))
    counts = [len(paths) for paths, _ in found]
    for (_, _, folder), count in zip(jobs, counts, strict=True):
        if to_train and not count:
            raise ConfigError(
                f"class folder {printable(folder)} has no images ({', '.join(EXTENSIONS)})"
            )
    files = Files(
        paths=[path for paths, _ in found for path in paths],
        sizes=np.concatenate([sizes for _, sizes in found]),
        labels=np.repeat(np.array([label for _, label, _ in jobs], np.int32), counts),
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
    )


def _split_folders(root: str, needs_train: bool) -> dict[str, str]:
    """The folder of every split, by the split's name; nothing where `root` has those of classes."""
    if not os.path.isdir(root):
        found = "is a file" if os.path.exists(root) else "does not exist"
        raise ConfigError(f"config.data.path must be a folder of pictures, but {root} {found}")
    names: dict[str, str] = {}
    subfolders, _ = _look_into(root)
    for folder in subfolders:
        split = SPLITS.get(folder.lower())
        if split in names:
            raise ConfigError(f"{root} has two folders for '{split}': {names[split]} and {folder}")
        if split is not None:
            names[split] = folder
    folders = {split: os.path.join(root, folder) for split, folder in names.items()}
    if len(folders) < len(subfolders):  # a class may be called "train": it has pictures in it
        return folders if "train" in folders and _look_into(folders["train"])[0] else {}
    if folders and "train" not in folders and needs_train:
        raise ConfigError(f"{root} has {', '.join(names.values())} but no train: {_LAYOUT}")
    return folders


def _class_folders(folder: str) -> dict[str, str]:
    """The class's name by the name of its folder."""
    subfolders, images = _look_into(folder)
    if not subfolders:
        found = f"images ({images}) but no class folders" if images else "no class folders"
        raise ConfigError(f"{folder} has {found}: {_LAYOUT}")
    return {name: class_name(name) for name in subfolders}


def _look_into(folder: str) -> tuple[list[str], int]:
    """The names of the folders in a folder, sorted, and the number of images."""
    subfolders, images = [], 0
    for entry, is_folder in visible_entries(folder):
        if is_folder:
            subfolders.append(entry.name)
        else:
            images += is_picture(entry.name)
    return sorted(subfolders), images


def _pictures(folder: str, root: str, above: set[tuple[int, int]]) -> tuple[list[str], np.ndarray]:
    """The images in a class's folder and those below: paths relative to `root`, sizes in bytes.

    Links are followed, except to a folder that was seen already or is one of those `above`.
    """
    seen, pending, found = set(above), [os.path.relpath(folder, root)], []
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
                found.append((f"{here}/{entry.name}", _size(entry)))
        pending += sorted(subfolders, reverse=True)  # of two links to a folder always the same one
    found.sort()
    return [path for path, _ in found], np.array([size for _, size in found], np.int64)


def visible_entries(folder: str) -> Iterator[tuple[os.DirEntry, bool]]:
    """What is in a folder and isn't hidden, and whether each is a folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name not in _IGNORED:
                    yield entry, _is_folder(entry)
    except OSError as error:
        raise DataError(f"{printable(folder)} cannot be listed: {error.strerror}") from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nowhere: reading it will say so
        return -1


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
