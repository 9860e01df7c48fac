"""Several processes that train as one: how they find each other, agree, fail and stop together.

Every process runs the same command. Each reads its rows of every batch and writes its shards of
every checkpoint; all else that is written or said is process 0's.

The texts that they exchange go through the key-value store of JAX's coordination service, which
needs no devices: so they can agree, and fail with the same code, before there are any.
"""

import itertools
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the store, and the number of processes before their devices
from jax.experimental import multihost_utils

from flaxcls.errors import (
    SIGNAL_EXIT_CODES,
    ConfigError,
    DivergedError,
    ProcessesError,
    one_line,
)
from flaxcls.runtime import cluster, output

_GRACE = 10  # seconds that a process that fails waits for the others to end as well
_OWN_END = 2  # and that the others have to end by themselves, who may have found the same
_PATIENCE = 120  # seconds that one that ends as all do waits for the others
_FOREVER = 10**9  # milliseconds; a process that dies meanwhile is noticed by its heartbeat
# What all processes come to at the same step, and end with by themselves.
_COMMON_CODES = (0, DivergedError.exit_code, *SIGNAL_EXIT_CODES.values())


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: int = 60,
    patience: int = 300,
) -> None:
    """Makes this process one of several, as given or as the cluster says; else it stays alone.

    Must come before the first use of a device. A process alone needs none of this: it opens no
    port, and a notice of preemption is its SIGTERM.

    Args:
      coordinator_address: host and port on which process 0 listens, such as "10.0.0.1:1234".
      num_processes, process_id: how many there are, and which one this is, from 0.
      heartbeat: seconds after which a process that gives no sign of life is taken for dead; the
        others then end.
      patience: seconds to wait for the other processes; then ProcessesError.
    """
    given = (coordinator_address, num_processes, process_id)
    if None in given and given != (None, None, None):
        raise ConfigError(
            "--coordinator_address, --num_processes and --process_id must be given together"
        )
    if given != (None, None, None):
        host, _, port = coordinator_address.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ConfigError(
                f"--coordinator_address must be HOST:PORT, got {coordinator_address!r}"
            )
        if not 0 <= process_id < num_processes:
            raise ConfigError(
                f"--process_id must be at least 0 and below --num_processes = {num_processes}, "
                f"got {process_id}"
            )
    elif not cluster.is_joined_by_cluster():
        return
    _Joining(given, heartbeat).wait(patience)
    threading.Thread(target=_end_with_others, name="flaxcls-failures", daemon=True).start()


class _Joining:
    """`jax.distributed.initialize` in a thread, as it can neither be interrupted nor fail.

    JAX waits in native code, in which Python hears no signal, and aborts the process when its own
    time is up.
    """

    def __init__(self, given: tuple[str | None, int | None, int | None], heartbeat: int):
        self._given, self._heartbeat = given, heartbeat
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="flaxcls-join", daemon=True)

    def wait(self, patience: int) -> None:
        global _join_timed_out
        self._thread.start()
        self._thread.join(patience)
        if self._thread.is_alive():
            _join_timed_out = True
            state = distributed.global_state
            raise ProcessesError(
                f"after {patience} s not all processes have found each other: process "
                f"{state.process_id} of {state.num_processes} waited for "
                + (
                    f"others to come to {state.coordinator_address}"
                    if state.process_id == 0
                    else f"process 0 at {state.coordinator_address} and for all others: is that "
                    "address right and reachable?"
                )
            )
        if isinstance(self._error, ValueError):  # a cluster's variables, but no cluster
            if self._given != (None, None, None):
                raise ConfigError(f"the processes can't be joined: {self._error}") from self._error
        elif self._error:
            raise ProcessesError(
                f"the processes can't be joined at {distributed.global_state.coordinator_address}: "
                f"{one_line(self._error)}"
            ) from self._error

    def _run(self) -> None:
        try:
            jax.distributed.initialize(
                *self._given,
                initialization_timeout=2**30,
                heartbeat_timeout_seconds=self._heartbeat,
                shutdown_timeout_seconds=self._heartbeat,
            )
        except Exception as error:
            self._error = error


_join_timed_out = False  # a thread that can't be ended


def count() -> int:
    """How many processes there are; may be asked before the first use of a device."""
    return distributed.global_state.num_processes or 1


def index() -> int:
    """Which of them this is, from 0; may be asked before the first use of a device."""
    return distributed.global_state.process_id or 0


def is_first() -> bool:
    """Whether this is process 0, which writes and speaks for all."""
    return index() == 0


def say(text: str) -> None:
    """Prints, in process 0."""
    if is_first():
        output.say(text)


def agree(value: int) -> int:
    """Process 0's value, in all processes; all must call it."""
    if count() == 1:
        return value
    with jax.transfer_guard("allow"):
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


_rounds = itertools.count()


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; all must call it, in the same order of calls."""
    if count() == 1:
        return [text]
    store, number = distributed.global_state.client, next(_rounds)
    store.key_value_set(f"flaxcls/gather/{number}/{index()}", text)
    texts = [
        store.blocking_key_value_get(f"flaxcls/gather/{number}/{process}", _FOREVER)
        for process in range(count())
    ]
    if number:  # all are in this round, so the one before is not needed
        store.key_value_delete(f"flaxcls/gather/{number - 1}/{index()}")
    return texts


def post(key: str, text: str) -> None:
    """Leaves a text for the others to find in `posted`; JaxRuntimeError if one is there already.

    This and what follows may be called in any thread.
    """
    distributed.global_state.client.key_value_set(f"{key}/{index()}", text)


def posted(key: str, seconds: float) -> list[str]:
    """The texts that all processes post, in their order; JaxRuntimeError after some seconds."""
    store, end = distributed.global_state.client, time.monotonic() + seconds
    return [
        store.blocking_key_value_get(
            f"{key}/{process}", max(1, int(1000 * (end - time.monotonic())))
        )
        for process in range(count())
    ]


def withdraw(key: str) -> None:
    """Takes back what this process has posted, if anything."""
    distributed.global_state.client.key_value_delete(f"{key}/{index()}")


def wait_at_barrier(key: str, seconds: float) -> None:
    """Returns when all processes are here; JaxRuntimeError after some seconds."""
    distributed.global_state.client.wait_at_barrier(key, int(1000 * seconds))


def from_first(value: Any) -> Any:
    """Process 0's value (JSON), in all processes; all must call it."""
    return json.loads(gather(json.dumps(value) if is_first() else "")[0])


@contextmanager
def first_before_others() -> Iterator[None]:
    """Around what the first process shall do alone: the others wait, and then do it too."""
    if not is_first():
        gather("")
    yield
    if is_first():
        gather("")


def check_device_counts() -> None:
    """ConfigError unless every process has the same number of devices."""
    counts = np.bincount([device.process_index for device in jax.devices()])
    if len(set(counts)) > 1:
        odd = int(np.flatnonzero(counts != counts[0])[0])
        raise ConfigError(
            f"process {odd} has {counts[odd]} devices, process 0 has {counts[0]}: all must have "
            "the same number"
        )


def check_same(metadata: Mapping[str, Any]) -> None:
    """ConfigError unless the metadata (JSON) of all processes are equal; names what differs."""
    everyone = [json.loads(text) for text in gather(json.dumps(metadata))]
    for number, others in enumerate(everyone):
        for name in sorted(everyone[0].keys() | others.keys()):
            first, other = everyone[0].get(name), others.get(name)
            if first != other:
                raise ConfigError(
                    f"the processes differ in {name}: process 0 has {first!r}, process {number} "
                    f"{other!r}"
                )


def check_shared(path: Path) -> None:
    """ConfigError unless a file that process 0 has written is there for all."""
    gather("")
    if not path.exists():
        raise ConfigError(
            f"process {index()} does not see {path}, which process 0 has written: the "
            "run's folder must be shared by all"
        )


# How absl::Status, as which all of JAX's transports report errors, begins.
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ?")


@contextmanager
def explain_lost_peer() -> Iterator[None]:
    """Around collective work: says in one sentence that another process is gone.

    What JAX raises then is any error of the transport; if it notices by the heartbeat alone, it
    aborts this process by itself.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        is_transport = isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error))
        if count() == 1 or not is_transport:
            raise
        raise ProcessesError(
            f"process {index()} can't continue without the others, one of which has probably "
            f"ended; the same command resumes from the last checkpoint ({one_line(error)[:200]})"
        ) from error


# Failing with one exit code. A process that fails publishes its code and its sentence; a thread of
# each other one, which waits for that, ends it with the same code wherever it is: it may be in a
# collective that never comes back. Process 0 says the sentence for all and, as it holds the store,
# ends last.

_FAILURE, _SAID = "flaxcls/failure", "flaxcls/said"
_ending = threading.Lock()  # of this process; is never released


def leave(code: int, sentence: str = "") -> None:
    """Ends this process, if it is one of several, with an exit code; if alone, does nothing.

    If it fails, all others end with the same code, and process 0 says the `sentence`. What all come
    to at the same step (done, diverged, asked to end) each process ends with by itself.
    """
    if _join_timed_out:
        output.say(sentence, error=True)
        os._exit(code)
    if not jax.distributed.is_initialized():
        return
    _ending.acquire()  # or the thread is at it: it does not come back
    if code in _COMMON_CODES:
        if sentence and is_first():
            output.say(sentence, error=True)
        farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        farewell.start()
        farewell.join(_PATIENCE)
        _exit(code)
    store = distributed.global_state.client
    with suppress(jax.errors.JaxRuntimeError):  # another one has failed before, with the same code
        store.key_value_set(_FAILURE, json.dumps({"code": code, "sentence": sentence}))
    _end_with_failure()


def _end_with_others() -> None:
    """Waits for the failure of another process, and ends this one with its code."""
    try:
        distributed.global_state.client.blocking_key_value_get(_FAILURE, _FOREVER)
    except Exception:  # the coordinator has gone, which ends this process elsewhere
        return
    end = time.monotonic() + _OWN_END
    while time.monotonic() < end:
        if _ending.locked():
            return
        time.sleep(0.05)
    _ending.acquire()
    _end_with_failure()


def _end_with_failure() -> None:
    """Ends this process with the code of the failure, which process 0 says."""
    store = distributed.global_state.client
    failure = json.loads(store.blocking_key_value_get(_FAILURE, 1000 * _GRACE))
    said = False
    with suppress(jax.errors.JaxRuntimeError):
        if is_first():
            output.say(failure["sentence"], error=True)
            store.key_value_set(_SAID, "", allow_overwrite=True)
        else:
            store.blocking_key_value_get(_SAID, 1000 * _GRACE)
        said = True
        store.key_value_set(f"{_SAID}/{index()}", "")
        if is_first():
            for process in range(count()):
                store.blocking_key_value_get(f"{_SAID}/{process}", 1000 * _GRACE)
            time.sleep(0.5)  # JAX aborts a process that is still there when the store goes
    if not said:
        output.say(failure["sentence"], error=True)
    _exit(failure["code"])


def _exit(code: int) -> None:
    """Without Python's own end, which native threads that still wait would turn into a crash."""
    output.flush()
    os._exit(code)
