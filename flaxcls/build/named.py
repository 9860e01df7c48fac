"""What the things that a config names take: networks, optimizers, schedules, losses and crops."""

from collections.abc import Callable, Collection, Iterator

from ml_collections import ConfigDict

from flaxcls import models
from flaxcls.build import inputs
from flaxcls.config import default, options
from flaxcls.core import losses, optim, schedules


def drop_unused(config: ConfigDict, given: Collection[str]) -> Iterator[str]:
    """Unsets the options that a recipe has for another thing than the one that the user named.

    Where the user has named, say, another optimizer, options of the recipe's that it doesn't take
    are None again; those that the user has `given` too, such as "optimizer.momentum", stay and will
    be refused. Yields a sentence about each section.
    """
    for section, accepted in _ACCEPTED.items():
        if f"{section}.name" not in given or config[section].name is None:
            continue
        known, own = accepted(config[section].name), default()[section]
        unused = [
            field
            for field, value in config[section].items()
            if field not in ("name", *known)
            and own[field] is None
            and value is not None
            and f"{section}.{field}" not in given
        ]
        for field in unused:
            config[section][field] = None
        if unused:
            yield (
                f"config.{section}.name = {config[section].name!r} takes no "
                f"{', '.join(unused)}: what the recipe has there is dropped"
            )


def _optimizer_options(name: str) -> Collection[str]:
    rule = options.look_up("config.optimizer.name", name, optim.RULES)
    return {*options.accepted(rule), *options.accepted(optim.build), "learning_rate_batch"}


def _schedule_options(name: str) -> Collection[str]:
    schedule = options.look_up("config.schedule.name", name, schedules.SCHEDULES)
    return {*options.accepted(schedule), *options.accepted(schedules.build)}


def _loss_options(name: str) -> Collection[str]:
    function = options.look_up("config.loss.name", name, losses.LOSSES)
    return {*options.accepted(function), *options.accepted(losses.build)}


def _crop_options(name: str) -> Collection[str]:
    return options.accepted(options.look_up("config.crop.name", name, inputs.TRANSFORMS))


# What a named thing takes, by the section that names it.
_ACCEPTED: dict[str, Callable[[str], Collection[str]]] = {
    "model": models.options,
    "optimizer": _optimizer_options,
    "schedule": _schedule_options,
    "loss": _loss_options,
    "crop": _crop_options,
}


def check_names(config: ConfigDict) -> None:
    """ConfigError for a name that is not known; what is left open, None, is not looked at."""
    for section, accepted in _ACCEPTED.items():
        if config[section].name is not None:
            accepted(config[section].name)
