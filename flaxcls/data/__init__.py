"""Where the examples come from: the only folder that imports TFDS and the image decoders.

`open_source` is the way in; what a kind of data needs is imported when it is opened.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from flaxcls.config.options import Range, accepted, look_up
from flaxcls.config.user_code import is_path
from flaxcls.data.source import Source, check_own_source, some_names
from flaxcls.data.storage import MAX_BYTES
from flaxcls.errors import ConfigError


def open_source(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    max_bytes: int = MAX_BYTES,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> Source:
    """Opens a split of a data set of SOURCES or, under any other name, of TFDS.

    Args:
      name: a name in SOURCES, a user's own as "package.module:Name", or one of TFDS such as
        "cifar10", "cifar10:3.0.2", "ds/config".
      split: TFDS's slicing: "train", "train[:90%]", "train[100:-50]", "train+test", ...
      data_dir: where TFDS keeps its data (else $TFDS_DATA_DIR, else ~/tensorflow_datasets).
      max_bytes: of a picture's file; a larger one is refused unread.
      class_names: the classes that a network knows, by label. A folder or a list then numbers its
        classes so, and need not have all of them; other data must have the very same.
        (A user's own source is given `data_dir`, `max_bytes` and `class_names` if it takes them.)
      **options: keyword arguments of `opener(name)`; TFDS takes none.

    Raises:
      ConfigError: unknown name or split, an empty slice, a data set without images and classes, or
        with a class that is none of `class_names`.
      DataError: the prepared files are missing or broken.
    """
    common = {"data_dir": data_dir, "max_bytes": max_bytes, "class_names": class_names}
    open_split = opener(name)
    if open_split is open_tfds:
        source = open_tfds(name, split, data_dir=data_dir, **options)
    else:
        taken = accepted(open_split)
        common = {key: value for key, value in common.items() if key in taken}
        source = open_split(split, **common, **options)
    if is_path(name):
        check_own_source(name, source)
    if class_names is not None and source.class_names != tuple(class_names):
        raise ConfigError(other_classes(source, class_names))
    return source


def opener(name: str) -> Callable[..., Source]:
    """What opens a split of the data of that name, and whose signature says their options."""
    own = is_path(name)
    return look_up("config.data.name", name, SOURCES) if own else SOURCES.get(name, open_tfds)


def other_classes(source: Source, class_names: Sequence[str]) -> str:
    """A sentence about a source whose classes are not these, in this order."""
    ours, theirs = source.class_names, class_names
    unknown = [name for name in ours if name not in {*theirs}]
    missing = [name for name in theirs if name not in {*ours}]
    differences = [f"it has {some_names(unknown)} besides"] if unknown else []
    differences += [f"it lacks {some_names(missing)}"] if missing else []
    return (
        f"the {len(ours):,} classes of {source.name} are not the {len(theirs):,} that the "
        f"network knows: {', '.join(differences) or 'their order is another'}"
    )


def open_digits(split: str) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8x1: "train" (1,437) and "test" (360)."""
    from flaxcls.data.embedded import Digits

    return Digits(split)


def open_fake(
    split: str,
    *,
    image_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    num_examples: int = 1024,
) -> Source:
    """Made-up images that can be learned: "train", and "validation", "test" a quarter as large."""
    from flaxcls.data.fake import Fake

    return Fake(split, image_shape=image_shape, num_classes=num_classes, num_examples=num_examples)


def open_folder(
    split: str,
    *,
    path: str = "",
    held_out: Annotated[float, Range(above=0, below=1)] = 0.1,
    split_seed: Annotated[int, Range(0)] = 0,
    channels: Literal[1, 3] = 3,
    max_bytes: int = MAX_BYTES,
    class_names: Sequence[str] | None = None,
) -> Source:
    """A folder of pictures: `path`/train/CLASS/* with `path`/val/CLASS/*, or `path`/CLASS/*.

    The held-out folder may be called val, valid, validation or test; if there is only one, each of
    these names means it. Where `path` itself holds the classes, a share `held_out` of each of them,
    chosen by `split_seed`, is "validation" (by any of the names), and the rest is "train".

    Classes are numbered in the order of their names, and may have folders in their folders; hidden
    files and those that don't end as an image's are ignored. Examples come in a shuffled order, the
    same one for the same `split_seed`, so that a slice such as "train[:10%]" has all classes.
    """
    from flaxcls.data.folder import open_folder as open_files

    return open_files(
        split,
        _given(path, "the folder of pictures"),
        held_out=held_out,
        split_seed=split_seed,
        channels=channels,
        max_bytes=max_bytes,
        class_names=class_names,
    )


def open_list(
    split: str,
    *,
    path: str = "",
    held_out: Annotated[float, Range(above=0, below=1)] = 0.1,
    split_seed: Annotated[int, Range(0)] = 0,
    channels: Literal[1, 3] = 3,
    max_bytes: int = MAX_BYTES,
    class_names: Sequence[str] | None = None,
) -> Source:
    """A list of pictures, `path`.csv or `path`.jsonl: path and label of each, and perhaps split.

    CSV has its columns in this order, or names them in its first row, separated by commas,
    semicolons or tabs; "filename", "image", "class", "category" and the like will do. A picture's
    path is relative to the list's folder, or absolute. Labels are names or, where all are integers,
    the numbers of the classes, from 0. A split is train, val, valid, validation or test; without
    this column `held_out` and `split_seed` divide the list as they do a folder.
    """
    from flaxcls.data.listed import open_list as open_files

    return open_files(
        split,
        _given(path, "the .csv or .jsonl file"),
        held_out=held_out,
        split_seed=split_seed,
        channels=channels,
        max_bytes=max_bytes,
        class_names=class_names,
    )


def open_idx(split: str, *, path: str = "") -> Source:
    """MNIST's four files, or those of Fashion-MNIST, in the folder `path`: "train" and "test"."""
    from flaxcls.data.idx import Idx

    return Idx(split, _given(path, "the folder of train-images-idx3-ubyte and the others"))


def contents(name: str, path: str, needs_train: bool = True) -> tuple[list[str], list[str]]:
    """The splits that a folder or a list of FILES has, and all classes of any; see `open_source`.

    Unlike there, the splits need not have the same classes, nor the classes pictures. A folder of
    splits `needs_train` unless it is only used.
    """
    path = _given(path, "the folder or the list of pictures")
    if name == "folder":
        from flaxcls.data.folder import contents as contents_of_folder

        return contents_of_folder(path, needs_train)
    from flaxcls.data.listed import contents as contents_of_list

    return contents_of_list(path)


def _given(path: str, what: str) -> str:
    if not path:
        raise ConfigError(f"config.data.path is missing: {what}")
    return path


def open_tfds(name: str, split: str, *, data_dir: str | Path | None = None) -> Source:
    """A data set of TFDS, read without TensorFlow; prepared first where it isn't yet."""
    from flaxcls.data.tfds import open_prepared

    return open_prepared(name, split, data_dir, others=SOURCES)


def describe_tfds(name: str, split: str, *, data_dir: str | Path | None = None) -> Source:
    """A data set of TFDS if it is prepared, else what is known of it; nothing is prepared.

    ConfigError for one that is neither prepared nor known here.
    """
    from flaxcls.data.described import describe
    from flaxcls.data.tfds import is_prepared

    if is_prepared(name, data_dir):
        return open_tfds(name, split, data_dir=data_dir)
    return describe(name, split)


def check_tfds_name(name: str, data_dir: str | Path | None = None) -> None:
    """ConfigError unless TFDS knows a data set of this name, or it is prepared in the folder."""
    from flaxcls.data.tfds import check_known

    check_known(name, data_dir, others=SOURCES)


SOURCES: dict[str, Callable[..., Source]] = {
    "digits": open_digits,
    "fake": open_fake,
    "folder": open_folder,
    "list": open_list,
    "idx": open_idx,
}
FILES = ("folder", "list")  # of these, whose pictures are files of their own
