"""A trace of what the devices and the host do, as JAX's profiler writes it for XProf and Perfetto.

In the folder, plugins/profile/<date-time>/ gets HOST.xplane.pb, which XProf (the profiler of
TensorBoard) shows, and perfetto_trace.json.gz for https://ui.perfetto.dev.
"""

import collections
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

# Where an operator's time on a device is; on TPUs lines of steps and of whole programs lie beside.
_TPU_LINE, _GPU_LINES = "XLA Ops", "Stream"

_Key = tuple[str, str]  # program and operator
_Call = tuple[float, float, _Key]  # from and until when, in nanoseconds


class Operator(NamedTuple):
    """What a trace has of one operator of XLA.

    Attributes:
      program: the compiled program that it is of, such as "jit_update"; "" where that is not known.
      name: such as "fusion.12".
      calls: on all devices of this process.
      seconds: of them all, without those of the operators that it calls.
    """

    program: str
    name: str
    calls: int
    seconds: float


def start(folder: Path) -> None:
    """Starts tracing this process and its devices; RuntimeError if a trace is under way."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of Python's: it would slow a small step
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)


def stop() -> None:
    """Ends the trace and writes it in some seconds; OSError or RuntimeError if that fails."""
    try:
        jax.profiler.stop_trace()
    except ValueError as error:  # JAX has not found what it was about to write
        raise RuntimeError(f"there is no trace of it: {error}") from error


def newest(folder: Path) -> Path | None:
    """The file for XProf of the trace that was written last; None where there is none."""
    files = folder.glob("plugins/profile/*/*.xplane.pb")
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def operators(path: Path) -> list[Operator]:
    """The operators in a file *.xplane.pb, that with the most seconds first."""
    calls, seconds = collections.Counter[_Key](), collections.defaultdict[_Key, float](float)
    with warnings.catch_warnings():
        # Python 3.13 deprecates how JAX makes the types of ProfileData. Where warnings are errors,
        # as with `python -W error`, JAX ends the process for it.
        warnings.simplefilter("ignore", DeprecationWarning)
        for line in _lines_of_operators(ProfileData.from_file(str(path))):
            for key, spent in _own_seconds(line):
                calls[key] += 1
                seconds[key] += spent
    found = [Operator(*key, calls[key], spent) for key, spent in seconds.items()]
    return sorted(found, key=lambda operator: -operator.seconds)


def origins(compiled: str) -> dict[tuple[str, str], str]:
    """Which operation of JAX each operator comes from, by program and name, as HLO's text has it.

    A fusion of several has the one that XLA names it after, or else that of its result.
    """
    program = re.match(r"HloModule ([\w.\-]+)", compiled)
    found, results, computation = {}, {}, ""
    for line in compiled.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(", line):
            computation = header[1]
        elif operator := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            own, called = (
                re.search(p, line) for p in (r'op_name="([^"]+)"', r"calls=%?([\w.\-]+)")
            )
            origin = own[1] if own else results.get(called[1]) if called else None
            if origin:
                found[program[1] if program else "", operator[1]] = origin
                results[computation] = origin  # the last one is the root's, or nearest to it
    return found


def _lines_of_operators(trace: Any) -> Iterator[list[_Call]]:
    """The calls of operators, a list for all that ran one after the other."""
    planes = list(trace.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or planes:
        lines = list(plane.lines)
        on_tpu = [line for line in lines if line.name == _TPU_LINE]
        for line in on_tpu or lines:
            if on_tpu or (line.name.startswith(_GPU_LINES) if devices else True):
                yield list(_calls(line.events, everything=bool(devices)))


def _calls(events: Iterable[Any], everything: bool) -> Iterator[_Call]:
    for event in events:
        stats = dict(event.stats)
        operator = stats.get("hlo_op")
        if operator or everything:  # on a CPU other work of the threads lies between
            key = (str(stats.get("hlo_module", "")), str(operator or event.name))
            yield event.start_ns, event.start_ns + event.duration_ns, key


def _own_seconds(line: Sequence[_Call]) -> Iterator[tuple[_Key, float]]:
    """The seconds of every call, without those of calls that lie inside of it."""
    open_calls: list[list[Any]] = []  # [end, key, seconds], the innermost last

    def closed_by(time: float) -> Iterator[tuple[_Key, float]]:
        while open_calls and open_calls[-1][0] <= time:
            _, key, seconds = open_calls.pop()
            yield key, max(seconds, 0.0)

    for begin, end, key in sorted(line, key=lambda call: (call[0], -call[1])):
        yield from closed_by(begin)
        if open_calls:
            open_calls[-1][2] -= (min(end, open_calls[-1][0]) - begin) / 1e9
        open_calls.append([end, key, (end - begin) / 1e9])
    yield from closed_by(float("inf"))
