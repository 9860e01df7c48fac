"""What several processes agree on, without starting them; tests/integration starts them."""

import errno
import itertools
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from flaxcls.config import fields
from flaxcls.errors import SIGNAL_EXIT_CODES, CheckpointError, ConfigError, ProcessesError
from flaxcls.runs import run_folder, save_barrier
from flaxcls.runs.save_barrier import SaveBarrier
from flaxcls.runtime import cluster, processes, sharding, stop_request


def others_say(monkeypatch, metadata):
    """The second of two processes says `metadata`."""
    monkeypatch.setattr(processes, "gather", lambda text: [text, json.dumps(metadata)])


def test_what_differs_is_named_with_both_values(monkeypatch, tiny_config):
    metadata = {"fingerprint": "a", "mean": [0.5], "class_names": ["cat", "dog"]}
    identity = run_folder.identity({"config": fields.plain(tiny_config()), **metadata}, "b")
    others_say(monkeypatch, identity)
    processes.check_same(identity)
    for name, other in (
        ("config.optimizer.momentum", 0.5),
        ("the code of flaxcls", "0" * 16),
        ("the fingerprint of the training data", "c"),
        ("the fingerprint of the evaluation data", "c"),
        ("class_names", ["cat"]),
        ("mean", [0.4]),
    ):
        others_say(monkeypatch, {**identity, name: other})
        with pytest.raises(ConfigError) as raised:
            processes.check_same(identity)
        assert f"differ in {name}: process 0 has {identity[name]!r}" in str(raised.value)
        assert f"process 1 {other!r}" in str(raised.value)
    others_say(monkeypatch, {**identity, "config.new": 1})
    with pytest.raises(ConfigError, match="differ in config.new: process 0 has None, process 1 1"):
        processes.check_same(identity)


def test_where_the_data_lies_and_who_decodes_may_differ(tiny_config):
    metadata = {"fingerprint": "a"}
    one = run_folder.identity({"config": fields.plain(tiny_config()), **metadata}, "b")
    other = tiny_config(data__dir="/elsewhere", input__threads=3, input__read_ahead=9)
    assert run_folder.identity({"config": fields.plain(other), **metadata}, "b") == one


def test_other_number_of_devices_is_named(monkeypatch):
    devices = [SimpleNamespace(process_index=index) for index in (0, 0, 1, 1, 2)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    with pytest.raises(ConfigError, match="process 2 has 1 devices, process 0 has 2"):
        processes.check_device_counts()
    monkeypatch.setattr(jax, "devices", lambda: devices[:4])
    processes.check_device_counts()


def test_folder_that_is_not_shared_is_reported(tmp_path):
    with pytest.raises(ConfigError, match="must be shared by all"):
        processes.check_shared(tmp_path / "config.json")
    (tmp_path / "config.json").touch()
    processes.check_shared(tmp_path / "config.json")


def test_alone_everything_is_one_s_own(capsys):
    assert processes.count() == 1 and processes.is_first() and processes.agree(7) == 7
    assert processes.gather("text") == ["text"]
    with processes.first_before_others():
        processes.say("hello")
    assert capsys.readouterr().out == "hello\n"
    processes.leave(3)  # leaves nothing: there is nobody to leave


def test_first_signal_is_noted_and_only_a_second_ctrl_c_acts_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where they were ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with stop_request.StopRequest() as asked:
        assert asked() is None
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert asked() == signal.SIGTERM
        for number in (signal.SIGHUP, signal.SIGUSR1):
            signal.raise_signal(number)
            assert asked() == number and SIGNAL_EXIT_CODES[number] == 42
        signal.raise_signal(signal.SIGINT)
        assert asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGHUP, None), (signal.SIGINT, signal.SIGINT)]
)
def test_hangup_that_nohup_ignores_stays_ignored_but_ctrl_c_does_not(number, expected):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_request.StopRequest() as asked:
            signal.raise_signal(number)
            assert asked() == expected
    finally:
        signal.signal(number, before)


def test_step_to_stop_at_stays_known_when_a_rollback_comes_between(monkeypatch):
    reached = []

    def sync_point(number):
        reached.append(number)
        return number == 3

    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "reached_preemption_sync_point", sync_point)
    with stop_request.StopRequest() as asked:
        assert [asked() for _ in range(5)] == [None, None] + [signal.SIGTERM] * 3
    assert reached == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("Gloo AllGather failed: Connection reset by peer"),
        ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"),
    ],
)
def test_error_of_the_transport_is_a_sentence_about_the_other_processes(monkeypatch, error):
    with pytest.raises(type(error)), processes.explain_lost_peer():
        raise error
    monkeypatch.setattr(processes, "count", lambda: 2)
    message = "one of which has probably ended"
    with pytest.raises(ProcessesError, match=message), processes.explain_lost_peer():
        raise error
    with pytest.raises(ValueError, match="own"), processes.explain_lost_peer():
        raise ValueError("one's own")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, False),  # a batch script, not `srun`
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "8"}, True),
        ({"SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"}, False),  # all of the node's GPUs
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://a:1", "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a notebook's pod
    ],
)
def test_clusters_are_detected_by_what_they_set(monkeypatch, environment, expected):
    for name in ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    assert cluster.is_joined_by_cluster() is expected


def test_rows_of_all_processes_are_the_batch():
    mesh = sharding.make_mesh(2)
    np.testing.assert_array_equal(sharding.local_rows(mesh, 24), np.arange(24))


@pytest.mark.parametrize(
    ("batch_size", "count", "expected"),
    [(128, 1, 8), (128, 2, 4), (6, 2, 3), (10, 2, 1), (7, 1, 7), (128, 64, 1)],
)
def test_cpu_devices_of_all_processes_divide_the_batch(monkeypatch, batch_size, count, expected):
    monkeypatch.setattr(sharding.os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert sharding.cpu_devices(batch_size, count) == expected


class Store:
    """JAX's key-value store, for processes that take turns in this one."""

    def __init__(self):
        self.content, self.met = {}, []

    def key_value_set(self, key, value):
        if key in self.content:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.content[key] = value

    def blocking_key_value_get(self, key, milliseconds):
        if key not in self.content:
            raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED after {milliseconds}")
        return self.content[key]

    def key_value_delete(self, key):
        self.content.pop(key, None)

    def wait_at_barrier(self, key, milliseconds):
        self.met.append(key)


def test_save_that_fails_in_one_process_fails_in_all_with_its_reason(monkeypatch):
    store, barriers = Store(), [SaveBarrier(), SaveBarrier()]

    def in_background(*arguments):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(meet, *arguments).result()

    def meet(number, key, error=None):
        state = SimpleNamespace(client=store, process_id=number, num_processes=2)
        monkeypatch.setattr(processes.distributed, "global_state", state)
        if key is None:
            barriers[number].begin()
        elif error is None:
            barriers[number](key=key, timeout_ms=5000)
        else:
            try:
                raise error
            except OSError:
                barriers[number](key=key, timeout_ms=5000)

    def begin():
        for number in (1, 0):
            save_barrier._saves = itertools.count(begin.count)
            meet(number, None)
            meet(number, "set_value_start", OSError("that is being handled, as in a second try"))
        store.met.clear()
        begin.count += 1

    begin.count = 1

    written, committed, end = "async_write_complete.7", "async_commit_complete.7", "set_value_start"
    begin()
    store.content["flaxcls/save/1/async_write_complete/1"] = ""  # process 1 has written its part
    in_background(0, written)
    with pytest.raises(jax.errors.JaxRuntimeError, match="DEADLINE_EXCEEDED after (5000|49..)$"):
        in_background(0, committed)

    begin()  # process 1 can't write
    in_background(1, end, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(CheckpointError, match="^process 1: No space left on device$"):
        in_background(0, written)
    assert barriers[0].failure == barriers[1].failure and store.met == [end]

    begin()  # process 0 can't complete the checkpoint, which process 1 waits for
    store.content["flaxcls/save/3/async_write_complete/0"] = ""
    in_background(1, written)
    in_background(0, end, OSError(errno.EIO, os.strerror(errno.EIO)))
    with pytest.raises(CheckpointError, match="^process 0: Input/output error$"):
        in_background(1, committed)

    begin()  # and the next one is a new one
    assert not store.content and not barriers[0].failure
