"""From config.data to the examples."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from flaxcls.build import accepted
from flaxcls.config import options
from flaxcls.config.fields import options_of
from flaxcls.data import (
    FILES,
    check_tfds_name,
    contents,
    describe_tfds,
    open_source,
    open_tfds,
    opener,
)
from flaxcls.data.described import Described
from flaxcls.data.folds import Fold, open_fold, parse_fold, whole_split
from flaxcls.data.long_tail import long_tailed, profile
from flaxcls.data.naming import name_and_path
from flaxcls.data.source import Source
from flaxcls.errors import ConfigError


def check_source(config: ConfigDict) -> dict[str, Any]:
    """The options of the data, if they are right; the data are not opened."""
    section = accepted.SECTIONS["data"]
    given = options_of(config.data, *section.own)
    if (
        given and opener(config.data.name) is open_tfds
    ):  # else the sentence would be about an option
        check_tfds_name(config.data.name, config.data.dir)
    options.check("config.data", config.data.name, given, section.options(config.data.name))
    return given


def source(config: ConfigDict, split: str, class_names: Sequence[str] | None = None) -> Source:
    """The data that a split such as `train[:90%]`, or `train, fold 3 of 5`, names.

    With `class_names`, the classes of a network by label, a folder or a list needs no more than
    some of them. Of the split to train on, folds and all, it is what config.data.long_tail leaves.
    """
    if fold := parse_fold(split):
        return _part(config, source(config, fold.split, class_names), fold)
    given = check_source(config)
    found = open_source(
        config.data.name,
        split,
        data_dir=config.data.dir,
        max_bytes=config.input.max_bytes,
        class_names=class_names,
        **given,
    )
    return _long_tail(config, split, found)


def _long_tail(config: ConfigDict, split: str, whole: Source) -> Source:
    """What config.data.long_tail leaves of the split that is trained on, or that has its folds.

    Where the data are not on this machine, their classes are taken to be of one size.
    """
    imbalance = config.data.long_tail
    if imbalance is None or split != whole_split(config.data.train_split):
        return whole
    if whole.is_readable:
        return long_tailed(whole, imbalance)
    classes = len(whole.class_names)
    left = sum(profile(len(whole) // classes, imbalance, classes))
    return Described(whole.name, split, whole.image_shape, classes, left)


def open_other(config: ConfigDict, name_or_path: str, split: str | None, channels: int) -> Source:
    """A split of other data than the run's, with their own classes, for a network of `channels`.

    Args:
      config: of the run; its folder of TFDS and its limits are taken.
      name_or_path: as `name_and_path` reads it.
      split: None: all pictures of a folder or a list; of other data, which may be those that were
        trained on, the split of the name that the run was evaluated on.

    ConfigError where the pictures have other channels than the network takes.
    """
    named = name_and_path(name_or_path)
    name, path = named["name"], named.get("path", "")
    if name in FILES:
        _, class_names = contents(name, path, needs_train=False)
        return open_source(
            name,
            split or "all",
            path=path,
            channels=channels,
            max_bytes=config.input.max_bytes,
            class_names=class_names,
        )
    options: dict[str, Any] = {"path": path} if path else {}
    found = open_source(name, split or config.data.eval_split, data_dir=config.data.dir, **options)
    if found.image_shape[2] != channels:
        raise ConfigError(
            f"the pictures of {name} have {found.image_shape[2]} channels, and the network takes "
            f"{channels}"
        )
    return found


def source_or_description(
    config: ConfigDict, split: str, *, num_examples: int | None = None, num_classes: int = 0
) -> Source:
    """As `source` where the data are on this machine, else what is known of them; nothing is read.

    With `num_examples` the data are taken to be pictures of any size, so many in every split.
    """
    if fold := parse_fold(split):
        facts = {"num_examples": num_examples, "num_classes": num_classes}
        return _part(config, source_or_description(config, fold.split, **facts), fold)
    given = check_source(config)
    if num_examples:
        shape = (None, None, given.get("channels", 3))
        return Described(config.data.name, split, shape, num_classes, num_examples)
    if opener(config.data.name) is open_tfds:
        found = describe_tfds(config.data.name, split, data_dir=config.data.dir)
        return _long_tail(config, split, found)
    return source(config, split)


def _part(config: ConfigDict, whole: Source, fold: Fold) -> Source:
    return open_fold(whole, fold, seed=config.data.fold_seed or 0, groups=config.data.fold_groups)
