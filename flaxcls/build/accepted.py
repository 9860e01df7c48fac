"""What the things that a config names take: the options of each, read off its signature."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from flaxcls import models
from flaxcls.config.fields import options_of
from flaxcls.config.options import accepted, look_up
from flaxcls.config.tree import get
from flaxcls.config.user_code import is_path
from flaxcls.core import adversarial, losses, optim, schedules
from flaxcls.data import SOURCES, opener
from flaxcls.data.transform import TRANSFORMS
from flaxcls.errors import ConfigError, did_you_mean

Parameters = Mapping[str, inspect.Parameter]


class Section(NamedTuple):
    """A section of the config that names a thing.

    Attributes:
      names: all things that flaxcls has for it, by name.
      options: what the thing of a name takes, by keyword; ConfigError for an unknown name.
      own: fields of the section that are not the thing's.
    """

    names: Mapping[str, Callable]
    options: Callable[[str], Parameters]
    own: frozenset[str]


def _from(table: Mapping, where: str, builder: Callable | None, hidden: str) -> Callable:
    """Options of the entry of a table and of the function that builds it, but for the hidden."""

    def find(name: str) -> Parameters:
        entry = look_up(f"config.{where}.name", name, table)
        common = accepted(builder, hidden.split()) if builder else {}
        return {**accepted(entry, hidden.split()), **common}

    return find


def _source_options(name: str) -> Parameters:
    return accepted(opener(name), ("name", "split", "data_dir", "class_names", "max_bytes"))


# What the program gives to the builders by keyword, not the config's section.
_LOSS = "name"
_OPTIMIZER = "name schedule shortened params frozen layers mesh"
_SCHEDULE = "name learning_rate total_steps to_steps"
_CROP = _from(TRANSFORMS, "crop", None, "")
SECTIONS = {
    "data": Section(
        SOURCES,
        _source_options,
        frozenset(
            ("dir", "train_split", "eval_split", "fold_seed", "fold_groups", "long_tail")
            + ("mean", "std")
        ),
    ),
    "crop": Section(TRANSFORMS, _CROP, frozenset()),
    "model": Section(models.MODELS, models.options, frozenset(("dtype", "batch_norm_group"))),
    "loss": Section(
        losses.LOSSES,
        _from(losses.LOSSES, "loss", losses.build, _LOSS),
        frozenset(("effective_number_beta",)),
    ),
    "optimizer": Section(
        optim.RULES,
        _from(optim.RULES, "optimizer", optim.build, _OPTIMIZER),
        frozenset(("learning_rate", "learning_rate_batch")),
    ),
    "schedule": Section(
        schedules.SCHEDULES,
        _from(schedules.SCHEDULES, "schedule", schedules.build, _SCHEDULE),
        frozenset(),
    ),
    "adversarial": Section(
        adversarial.METHODS, _from(adversarial.METHODS, "adversarial", None, ""), frozenset()
    ),
    "eval.crop": Section(TRANSFORMS, _CROP, frozenset()),
}


def options_given(config: ConfigDict, where: str) -> dict[str, Any]:
    """What a section of the config says to the thing that it names, as keyword arguments."""
    return options_of(get(config, where), *SECTIONS[where].own)


class UnusedOption(ConfigError):
    """An option that the thing named does not take; `field` is such as "model.width"."""

    def __init__(self, field: str, sentence: str):
        super().__init__(f"config.{field} {sentence}")
        self.field = field


def check(config: ConfigDict) -> None:
    """ConfigError for an unknown name, and for an option that the thing named does not take.

    What is left open, a name of None, is not looked at.
    """
    for where, section in SECTIONS.items():
        name = get(config, f"{where}.name")
        # Whether TFDS has a data set is found when it is opened, before its options are looked at.
        is_known = name in SOURCES or is_path(name)
        if name is None or (where == "data" and not is_known):
            continue
        known = section.options(name)
        for option in options_given(config, where):
            if option not in known:
                suggestion = did_you_mean(option, {*known, *section.own})
                raise UnusedOption(f"{where}.{option}", f"is not used by {name}{suggestion}")


def drop_unused(config: ConfigDict, given: Iterable[str]) -> Iterator[str]:
    """Deletes the options that a recipe has for another thing than the one that the user named.

    Where the user has named, say, another optimizer, options of the recipe's that it doesn't take
    go; those that the user has `given` too, such as "optimizer.momentum", stay and will be
    refused. Yields a sentence about each section.
    """
    for where, section in SECTIONS.items():
        name = get(config, f"{where}.name")
        if f"{where}.name" not in given or name is None or where == "data":
            continue
        known, fields = section.options(name), get(config, where)
        unused = [
            option
            for option in options_given(config, where)
            if option not in known and f"{where}.{option}" not in given
        ]
        for option in unused:
            del fields[option]
        if unused:
            yield (
                f"config.{where}.name = {name!r} takes no {', '.join(unused)}: what the recipe has "
                "there is dropped"
            )
