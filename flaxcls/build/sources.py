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
from flaxcls.data.long_tail import long_tailed
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
    """The data that a split such as `train[:90%]` names.

    With `class_names`, the classes of a network by label, a folder or a list needs no more than
    some of them. Of the split to train on it is what config.data.long_tail leaves.
    """
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


def _long_tail(config: ConfigDict, split: str, found: Source) -> Source:
    imbalance = config.data.long_tail
    is_whole = imbalance is None or split != config.data.train_split
    return found if is_whole else long_tailed(found, imbalance)


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
    given = check_source(config)
    if num_examples:
        shape = (None, None, given.get("channels", 3))
        return Described(config.data.name, split, shape, num_classes, num_examples)
    if opener(config.data.name) is open_tfds:
        found = describe_tfds(config.data.name, split, data_dir=config.data.dir)
        return _long_tail(config, split, found)
    return source(config, split)
