"""What can go wrong, each kind with the exit code that launchers rely on."""

import difflib
import signal
from collections.abc import Iterable

SIGNAL_EXIT_CODES = {  # of being asked to end: Ctrl-C, a scheduler, a connection that is closed
    getattr(signal, name): code
    for name, code in {"SIGINT": 130, "SIGTERM": 42, "SIGHUP": 42, "SIGUSR1": 42}.items()
    if hasattr(signal, name)  # Windows has the first two
}
HUNG_EXIT_CODE = 44  # of a process that the watchdog ends: nothing is raised


_SHOWN = 12  # names, of those that would do


class FlaxclsError(Exception):
    """An error whose message is one sentence for the user; no traceback is shown."""

    exit_code = 1


class ConfigError(FlaxclsError):
    """The config or the command line asks for something impossible."""

    exit_code = 2


class RunTakenError(FlaxclsError):
    """The run's folder belongs to another job: it trains there, or has taken this one's place.

    The exit code is that of a mistake, with which launchers don't start the command again: it would
    be refused for as long as the other job trains, and be one too many afterwards. That other job
    has a launcher of its own.
    """

    exit_code = 2


class Interrupted(FlaxclsError):
    """A signal asked the run to end, and it has saved itself; `exit_code` says which."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class DivergedError(FlaxclsError):
    """Updates, results or the state are not finite or far too large."""

    exit_code = 43


class DataError(FlaxclsError):
    """The data is missing, broken or not what it says it is."""

    exit_code = 45


class UnreachableError(DataError):
    """What holds the data does not answer, or to nobody: restarting the run may help."""

    exit_code = FlaxclsError.exit_code


class CheckpointError(FlaxclsError):
    """A checkpoint could not be written or read."""


class WorkersError(FlaxclsError):
    """Processes that decode images keep dying; restarting the run may help."""


class OutputError(FlaxclsError):
    """The result of a command can't be written: its reader has gone, or the disk is full."""

    exit_code = 46


class ParityError(FlaxclsError):
    """What was exported does not say of pictures what the run says."""


class ProcessesError(FlaxclsError):
    """One of several processes has ended, so that the others can't continue."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the closest known one, or some of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f", did you mean '{close[0]}'?"
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"; known: {', '.join(known[:_SHOWN])}{more}"


def one_line(error: BaseException) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error.args[0] if error.args else error).split())
