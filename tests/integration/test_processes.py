"""Several processes on this machine that train as one."""

import re
import shutil
import signal
import socket
import time

import psutil
import pytest

from flaxcls.errors import SIGNAL_EXIT_CODES

# Two steps a second would do; it only has to last long enough to be interrupted.
LONG = (
    "--config.duration=300 steps",
    "--config.log_every=5 steps",
    "--config.eval.every=100 steps",
    "--config.checkpoint.every=20 steps",
)
HEARTBEAT = 10  # seconds, where a process is killed; elsewhere long enough for a busy machine


def signal_one(processes, number, mark):
    """Sends a signal to the process whose command line holds a mark, a child of launch/local.py."""
    (child,) = [
        child for child in psutil.Process(processes.pid).children() if mark in child.cmdline()
    ]
    child.send_signal(number)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("stream", marks=pytest.mark.slow),
        pytest.param("resident", marks=pytest.mark.torture),  # as the next test, in short
    ],
)
def test_two_processes_of_two_devices_equal_one_of_four(
    tmp_path, everything, run_main, run_processes, run_folder, assert_close, mode
):
    arguments = [
        f"--config={everything}",
        "--config.duration=10 steps",
        "--config.checkpoint.every=10 steps",
        f"--config.input.mode={mode}",
        f"--config.steps_per_dispatch={3 if mode == 'resident' else 1}",
        "--config.model.batch_norm_group=4",  # of a device, in each part of the batch
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
def test_first_of_two_processes_traces(tmp_path, recipe, run_processes):
    code, stdout, stderr = run_processes(
        f"--config={recipe}",
        f"--workdir={tmp_path / 'run'}",
        "--config.mesh.cpu_devices=1",
        "--config.profile.start=3 steps",
        "--config.profile.stop=5 steps",
    )
    assert code == 0, stderr
    assert stdout.count("traced 2 steps, from 4 to 5") == 1
    assert len([*tmp_path.glob("run/profile/plugins/profile/*/*.xplane.pb")]) == 1


@pytest.mark.slow
def test_sigterm_to_one_of_two_stops_both_at_one_step_and_they_go_on(
    tmp_path,
    recipe,
    run_main,
    start_processes,
    run_processes,
    run_folder,
    wait_until,
    assert_close,
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
    assert len(sentences) == 1  # for both
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


def assert_fail_alike(results, code, message):
    """Both exit codes are `code`, and the message is said once, by process 0, without more."""
    assert [result[0] for result in results] == [code, code], results
    (_, _, first), (_, _, second) = results
    assert message in first
    assert not second.replace("[Gloo]", ""), second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((), ("--config.seed=1",), "differ in config.seed: process 0 has 0, process 1 1"),
        ((), ("--config.mesh.cpu_devices=1",), "process 1 has 1 devices, process 0 has 2"),
        (
            (),
            ("--config.data.train_split=train[1:97]",),
            "the processes differ in config.data.train_split: process 0 has 'train[:96]'",
        ),
        (
            ("--config.data.train_split=nosuch",),
            ("--config.data.train_split=nosuch",),
            "unknown split 'nosuch'",
        ),
        ((), ("--config.bath_size=3",), "did you mean 'batch_size'?"),
        (("--config.bath_size=3",), (), "did you mean 'batch_size'?"),
    ],
)
def test_mistake_of_any_process_ends_all_with_one_sentence(
    tmp_path, recipe, run_two, first, second, message
):
    arguments = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
    results = run_two([*arguments, *first], [*arguments, *second])
    assert_fail_alike(results, 2, message)


SMALL = (  # a folder's recipe in seconds
    "--config.duration=3 steps",
    "--config.model.name=dense",
    "--config.model.widths=(8,)",
    "--config.batch_size=8",
    "--config.image_size=16",
    "--config.schedule.warmup=None",
)


@pytest.mark.slow
def test_broken_picture_that_one_process_meets_ends_both_with_45(tmp_path, pictures, run_two):
    broken = pictures / "cat" / "11.png"
    broken.write_bytes(b"no picture")
    arguments = [
        "--config=configs/folder.py",
        f"--config.data.path={pictures}",
        f"--workdir={tmp_path / 'run'}",
        "--config.input.mode=stream",
        "--config.input.max_broken=0",
        *SMALL,
        "--config.duration=9 epochs",
        "--config.data.mean=(0.5, 0.5, 0.5)",
        "--config.data.std=(0.2, 0.2, 0.2)",
    ]
    (first, out, errors), (second, _, other_errors) = run_two(arguments, arguments)
    assert (first, second) == (45, 45), errors + other_errors
    assert "step" in out and "1 of 22 training images can't be read" in errors
    assert "Traceback" not in errors + other_errors


@pytest.mark.slow
def test_recipe_that_adapts_to_its_pictures_trains_in_two_processes(tmp_path, pictures, run_two):
    arguments = [
        "--config=configs/folder.py",
        f"--config.data.path={pictures}",
        f"--workdir={tmp_path / 'run'}",
        *SMALL,
    ]
    results = run_two(arguments, arguments)
    assert [code for code, _, _ in results] == [0, 0], results
    assert results[0][1].count("pictures of 2 classes") == 1
    assert "Finished after 3 steps" in results[0][1]
    assert "pictures" not in results[1][1]


CRASH = """
from flaxcls.runtime import processes
from flaxcls.training import session
log = session.Session._log_metrics


def crashing(self, *arguments):
    if processes.index() == 1:
        raise ZeroDivisionError("on purpose")
    return log(self, *arguments)


session.Session._log_metrics = crashing
"""


@pytest.mark.slow
def test_crash_of_one_process_ends_the_other_at_once(tmp_path, recipe, run_two):
    recipe.write_text(recipe.read_text() + CRASH)
    arguments = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}", *LONG]
    began = time.perf_counter()
    (first, _, errors), (second, _, other_errors) = run_two(arguments, arguments)
    assert (first, second) == (1, 1), errors + other_errors
    assert "flaxcls: process 1 has failed: ZeroDivisionError: on purpose" in errors
    assert "Traceback" not in errors and "Traceback" in other_errors
    assert time.perf_counter() - began < 60  # the heartbeat's time: nobody waited for that


@pytest.fixture
def unreachable():
    """Arguments of process 1 of two whose process 0 is not there."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return (f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2", "--process_id=1")


def test_coordinator_that_is_not_there_is_reported_with_its_address(recipe, run_main, unreachable):
    result = run_main(f"--config={recipe}", *unreachable, "--join_timeout=1")
    assert result.returncode == 1
    assert "process 1 of 2 waited for process 0 at 127.0.0.1:" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_processes_wait_for_each_other_ends_at_once(
    recipe, start_main, unreachable, number
):
    process = start_main(f"--config={recipe}", *unreachable)
    waiting = psutil.Process(process.pid)
    end = time.monotonic() + 60
    while waiting.num_threads() < 4 or waiting.cpu_percent(0.3) > 5:  # it waits in JAX
        assert process.poll() is None and time.monotonic() < end
    began = time.perf_counter()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == SIGNAL_EXIT_CODES[number] and not stderr
    assert time.perf_counter() - began < 2


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
