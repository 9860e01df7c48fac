"""config.log_to: the services that metrics are sent to."""

import importlib.util
from typing import Any

from flaxcls.config import options
from flaxcls.errors import ConfigError, did_you_mean

SERVICES = ("wandb", "mlflow")  # by the names of their packages; see runs/tracker_process.py


def names(log_to: Any) -> tuple[str, ...]:
    """The services in `config.log_to`; ConfigError if it is no name of one or several of them."""
    chosen = (log_to,) if isinstance(log_to, str) else () if log_to is None else log_to
    if not options.fits(chosen, tuple[str, ...]):
        raise ConfigError(f"config.log_to must be None or a tuple of names, got {log_to!r}")
    for name in chosen:
        if name not in SERVICES:
            raise ConfigError(f"config.log_to has {name!r}{did_you_mean(name, SERVICES)}")
    return tuple(dict.fromkeys(chosen))


def check_installed(log_to: Any) -> None:
    """Raises ConfigError if the package of a service in `config.log_to` is missing."""
    for name in names(log_to):
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # W&B makes a folder with this name, too
            raise ConfigError(
                f"config.log_to has {name!r}, whose package is not installed: "
                f"pip install 'flaxcls[{name}]'"
            )
