"""Several processes that train as one: how they find each other, agree, and stop together.

Every process runs the same command. Each reads its rows of every batch and writes its shards of
every checkpoint; all else that is written or said is process 0's.
"""

import importlib.util
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the number of processes is public only with their devices
from jax.experimental import multihost_utils

from flaxcls import output
from flaxcls.errors import SIGNAL_EXIT_CODES, ConfigError, ProcessesError

# What a cluster sets in the processes that it starts, and JAX finds its neighbours by: `srun`, Open
# MPI's `mpirun`, TPUs on GKE. TPU virtual machines are told by JAX itself, where libtpu is there.
_CLUSTERS = ("SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri", "TPU_WORKER_HOSTNAMES")
_GRACE = 10  # seconds that a process that fails waits for the others, who may have failed too
_PATIENCE = 120  # and one that ends as all do


def join(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: int = 60,
) -> None:
    """Makes this process one of several, as told or as the cluster says; else it stays alone.

    Must come before the first use of a device. A process alone needs none of this: it opens no
    port, and a notice of preemption is its SIGTERM.

    Args:
      coordinator_address: host and port on which process 0 listens, such as "10.0.0.1:1234".
      num_processes, process_id: how many there are, and which one this is, from 0.
      heartbeat: seconds after which a process that gives no sign of life is taken for dead; the
        others then end.
    """
    told = (coordinator_address, num_processes, process_id)
    if None in told and told != (None, None, None):
        raise ConfigError(
            "--coordinator_address, --num_processes and --process_id must be given together"
        )
    if told != (None, None, None):
        if ":" not in coordinator_address:
            raise ConfigError(
                f"--coordinator_address must be HOST:PORT, got {coordinator_address!r}"
            )
        if not 0 <= process_id < num_processes:
            raise ConfigError(
                f"--process_id must be at least 0 and below --num_processes = {num_processes}, "
                f"got {process_id}"
            )
    elif not _in_cluster():
        return
    try:
        jax.distributed.initialize(
            *told, heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=heartbeat
        )
    except ValueError as error:  # a cluster's variables, but no cluster
        if told != (None, None, None):
            raise ConfigError(f"the processes could not be joined: {error}") from error


def _in_cluster() -> bool:
    # One task has the node for itself, all of its GPUs; JAX would take one GPU a task.
    if os.environ.get("SLURM_NTASKS") == "1" or os.environ.get("OMPI_COMM_WORLD_SIZE") == "1":
        return False
    if any(name in os.environ for name in _CLUSTERS):
        return True
    return importlib.util.find_spec("libtpu") is not None


def told_count() -> int:
    """How many processes have joined; may be asked before the first use of a device."""
    return distributed.global_state.num_processes or 1


def count() -> int:
    """How many processes there are."""
    return jax.process_count()


def is_first() -> bool:
    """Whether this is process 0, which writes and speaks for all."""
    return jax.process_index() == 0


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


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; all must call it."""
    if count() == 1:
        return [text]
    content = np.frombuffer(text.encode(), np.uint8)
    with jax.transfer_guard("allow"):
        lengths = multihost_utils.process_allgather(np.int32(content.size))
        padded = np.zeros(lengths.max(), np.uint8)
        padded[: content.size] = content
        rows = multihost_utils.process_allgather(padded)
    return [
        bytes(row[:length]).decode()
        for row, length in zip(rows.astype(np.uint8), lengths, strict=True)
    ]


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
    numbers = np.bincount([device.process_index for device in jax.devices()])
    if len(set(numbers)) > 1:
        odd = int(np.flatnonzero(numbers != numbers[0])[0])
        raise ConfigError(
            f"process {odd} has {numbers[odd]} devices, process 0 has {numbers[0]}: all must have "
            "the same number"
        )


def check_same(facts: Mapping[str, Any]) -> None:
    """ConfigError unless these facts (JSON) are the same in all processes; names what differs."""
    everyone = [json.loads(text) for text in gather(json.dumps(facts))]
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
            f"process {jax.process_index()} does not see {path}, which process 0 has written: the "
            "run's folder must be shared by all"
        )


class StopRequest:
    """While it is entered, SIGINT and SIGTERM ask the run to end after a step.

    A second Ctrl-C acts at once; SIGTERM, which schedulers may send again, does not. Of several
    processes any may be told: JAX's preemption service, which SIGTERM wakes, finds the step at
    which all can stop.
    """

    _received: int | None = None
    _asked = 0  # how often; in step with the other processes
    _stops = False

    def __enter__(self) -> "StopRequest":
        self._alone = count() == 1
        numbers = SIGNAL_EXIT_CODES if self._alone else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self._received = number
        if number == signal.SIGINT:
            self.__exit__()
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self) -> int | None:
        """The signal, if the run is to end after this step; to be asked after every step."""
        if self._alone:
            return self._received
        self._asked += 1
        if multihost_utils.reached_preemption_sync_point(self._asked):
            self._stops = True
        return signal.SIGTERM if self._stops else None

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def together() -> Iterator[None]:
    """Around what the processes do together: says in a sentence that one of them is gone.

    What JAX raises then is any error of the transport; if it notices by the heartbeat alone, it
    aborts this process by itself.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if count() == 1:
            raise
        raise ProcessesError(
            f"process {jax.process_index()} can't go on with the others, one of which has probably "
            f"ended; the same command goes on from the last checkpoint ({str(error).strip()[:200]})"
        ) from error


def leave(code: int) -> None:
    """Ends this process, if it is one of several, with an exit code; does nothing if it is alone.

    It waits for the others, so that process 0, through which all talk, does not end before them. If
    they don't end too, because only this one has failed, it goes without them.
    """
    if not jax.distributed.is_initialized():
        return
    farewell = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    farewell.start()
    all_end = code in (0, *SIGNAL_EXIT_CODES.values())
    farewell.join(_PATIENCE if all_end else _GRACE)
    os._exit(code)
