"""Several processes on this machine that train as one."""

import re
import shutil
import signal
import socket
import time

import psutil
import pytest

# Two steps a second would do; it only has to last long enough to be interrupted.
LONG = (
    "--config.duration=300 steps",
    "--config.log_every=5 steps",
    "--config.eval.every=100 steps",
    "--config.checkpoint.every=20 steps",
)
HEARTBEAT = 10  # seconds, where a process is killed; elsewhere long enough for a busy machine


@pytest.fixture
def start_processes(start_main):
    """Starts N processes by launch/local.py."""

    def start(*arguments, count=2, heartbeat=60):
        own = ("-n", count, f"--heartbeat_timeout={heartbeat}", "--")
        return start_main(*own, *arguments, module="launch.local")

    return start


@pytest.fixture
def run_processes(start_processes):
    """Runs N processes to their end: their code and what they said."""

    def run(*arguments, count=2):
        process = start_processes(*arguments, count=count)
        stdout, stderr = process.communicate(timeout=240)
        return process.returncode, stdout, stderr

    return run


def signal_one(processes, number, mark):
    """Sends a signal to the process whose command line holds a mark, a child of launch/local.py."""
    (child,) = [
        child for child in psutil.Process(processes.pid).children() if mark in child.cmdline()
    ]
    child.send_signal(number)


def assert_close(first, second):
    """The same rows with the same counts, and all numbers equal to float tolerance."""
    assert [row[:2] for row in first] == [row[:2] for row in second]
    for (step, group, one), (_, _, other) in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=1e-5), (step, group)
        assert one.get("count") == other.get("count")
        assert one.get("accuracy") == other.get("accuracy"), (step, group)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("stream", marks=pytest.mark.slow),
        pytest.param("resident", marks=pytest.mark.torture),  # as the next test, in short
    ],
)
def test_two_processes_of_two_devices_equal_one_of_four(
    tmp_path, everything, run_main, run_processes, run_folder, mode
):
    arguments = [
        f"--config={everything}",
        "--config.duration=10 steps",
        "--config.checkpoint.every=10 steps",
        f"--config.input.mode={mode}",
    ]
    code, stdout, stderr = run_processes(*arguments, f"--workdir={tmp_path / 'two'}")
    assert code == 0, stderr
    assert stdout.count("Finished after 10 steps") == 1  # only process 0 speaks
    assert "devices: 4 x cpu" in stdout
    one = run_main(*arguments, f"--workdir={tmp_path / 'one'}", "--config.mesh.cpu_devices=4")
    assert one.returncode == 0, one.stderr
    two, one = run_folder(tmp_path / "two"), run_folder(tmp_path / "one")
    assert_close(two.rows(), one.rows())
    assert {row[2]["count"] for row in two.rows() if row[1] == "eval"} == {77}
    names = sorted(path.name for path in one.folder.iterdir())
    assert sorted(path.name for path in two.folder.iterdir()) == names


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both_at_one_step_and_they_go_on(
    tmp_path, recipe, run_main, start_processes, run_processes, run_folder, wait_until, stopped_step
):
    arguments = [f"--config={recipe}", *LONG, "--config.mesh.cpu_devices=1"]
    code, _, stderr = run_processes(*arguments, f"--workdir={tmp_path / 'whole'}")
    assert code == 0, stderr
    stopped = run_folder(tmp_path / "stopped")
    processes = start_processes(*arguments, f"--workdir={stopped.folder}")
    assert wait_until(processes, stopped.log)
    began = time.perf_counter()
    signal_one(processes, signal.SIGTERM, "--process_id=1")
    _, stderr = processes.communicate(timeout=60)
    print(f"RECOVERY SIGTERM to one of two: saved after {time.perf_counter() - began:.1f} s")
    assert processes.returncode == 42, stderr
    assert "Traceback" not in stderr
    sentences = re.findall(r"stopped after step (\d+) of 300 and saved", stderr)
    assert len(sentences) == 2 and len(set(sentences)) == 1
    assert max(stopped.steps()) == int(sentences[0]) < 300

    shutil.copytree(stopped.folder, tmp_path / "elsewhere")
    code, _, stderr = run_processes(*arguments, f"--workdir={stopped.folder}")
    assert code == 0, stderr
    assert stopped.log() == run_folder(tmp_path / "whole").log()  # bitwise

    elsewhere = run_folder(tmp_path / "elsewhere")
    alone = run_main(f"--config={recipe}", *LONG, f"--workdir={elsewhere.folder}")
    assert alone.returncode == 0, alone.stderr
    assert "devices: 2 x cpu" in alone.stdout
    assert_close(elsewhere.rows(), stopped.rows())


@pytest.mark.slow
def test_sigkill_of_one_ends_the_other_and_leaves_the_last_good_checkpoint(
    tmp_path, recipe, start_processes, run_folder, wait_until, run_main
):
    run = run_folder(tmp_path / "run")
    arguments = [f"--config={recipe}", *LONG, f"--workdir={run.folder}"]
    processes = start_processes(*arguments, "--config.mesh.cpu_devices=1", heartbeat=HEARTBEAT)
    assert wait_until(processes, run.steps)
    began = time.perf_counter()
    signal_one(processes, signal.SIGKILL, "--process_id=1")
    _, stderr = processes.communicate(timeout=HEARTBEAT + 60)
    seconds = time.perf_counter() - began
    print(f"RECOVERY SIGKILL of one of two: the other ended after {seconds:.1f} s")
    assert processes.returncode not in (0, 42)
    assert seconds < HEARTBEAT + 19, stderr  # launch/local.py itself kills after 20 s more
    assert run.steps()
    result = run_main(f"--run={run.folder}", module="flaxcls.evaluate")
    assert result.returncode == 0, result.stderr


def start_by_hand(start_main, port, number, *arguments):
    return start_main(
        *arguments,
        f"--coordinator_address=127.0.0.1:{port}",
        "--num_processes=2",
        f"--process_id={number}",
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("seed=1", "the processes differ in config.seed: process 0 has 0, process 1 1"),
        ("mesh.cpu_devices=1", "process 1 has 1 devices, process 0 has 2"),
        (
            "data.train_split=train[1:97]",
            "the processes differ in config.data.train_split: process 0 has 'train[:96]'",
        ),
    ],
)
def test_processes_that_differ_say_in_what_and_end(tmp_path, recipe, start_main, other, message):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
    first = start_by_hand(start_main, port, 0, *arguments)
    second = start_by_hand(start_main, port, 1, *arguments, f"--config.{other}")
    for process in (first, second):
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        assert message in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_processes=2"], "must be given together"),
        (["--num_processes=2", "--process_id=2", "--coordinator_address=a:1"], "--process_id must"),
        (["--num_processes=2", "--process_id=1", "--coordinator_address=a"], "HOST:PORT"),
    ],
)
def test_incomplete_description_of_processes_is_one_sentence(recipe, run_main, flags, message):
    result = run_main(f"--config={recipe}", *flags)
    assert result.returncode == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1
