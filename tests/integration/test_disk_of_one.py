"""One of two processes can't write any more, for reasons of its own: the other one is told."""

import re
import resource
import shlex
import subprocess
import sys
import time

import pytest

TWO = (  # each has a part of every checkpoint to write
    "--config.duration=20000 steps",
    "--config.log_every=20 steps",
    "--config.model.widths=(256,)",
    "--config.checkpoint.every=100 steps",
    "--config.mesh.cpu_devices=1",
    "--config.mesh.fsdp=2",
)

FULL = 2**15  # bytes: less than a part of a checkpoint, more than the output of the test


def set_file_size_limit(process, size):
    """RLIMIT_FSIZE stands for a full disk: what is written beyond it fails."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def seconds_until(output, sentence, timeout=120):
    began = time.perf_counter()
    while not re.search(sentence, output.read_text()):
        assert time.perf_counter() - began < timeout, output.read_text()
        time.sleep(0.005)
    return time.perf_counter() - began


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(0, marks=pytest.mark.torture),  # the same sentences, the other way round
    ],
)
def test_full_disk_of_one_is_noticed_by_the_other_and_both_keep_training(
    tmp_path, recipe, start_two, run_folder, wait_until, which
):
    run, output = run_folder(tmp_path / "run"), tmp_path / "output"
    arguments = [f"--config={recipe}", *TWO, f"--workdir={run.folder}"]
    with output.open("w") as stdout:
        processes = start_two(arguments, arguments, stdout=stdout)
    full = rf"checkpoint of step \d+ not saved: process {which}: File too large"

    assert wait_until(processes[0], lambda: max(run.steps(), default=0) >= 100)
    set_file_size_limit(processes[which], FULL)
    seconds = seconds_until(output, f"{full}; training continues")
    print(f"RECOVERY the disk of one of two is full: said by the other after {seconds:.1f} s")
    assert seconds < 30  # a save alone may take ten minutes
    kept = max(run.steps())
    set_file_size_limit(processes[which], resource.RLIM_INFINITY)
    assert wait_until(processes[0], lambda: max(run.steps()) > kept)  # in step with each other

    set_file_size_limit(processes[which], FULL)
    processes[1].terminate()
    ends = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], ends
    assert re.search(f"flaxcls: {full}\n", ends[0])
    assert "Traceback" not in "".join(ends) + output.read_text()


@pytest.mark.torture
def test_disk_of_one_that_becomes_read_only_ends_both_where_the_config_says_so(
    tmp_path, recipe, start_two, run_folder
):
    run = run_folder(tmp_path / "run")
    run.folder.mkdir()
    # Process 1 sees the folder in a namespace of its own, where it is mounted read-only.
    folder = shlex.quote(str(run.folder))
    mount = f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *process_id=1*) exec unshare -m sh -c '
        f"""'{mount} && exec "$0" "$@"' {sys.executable} "$@";; esac\n"""
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    arguments = [f"--config={recipe}", *TWO, f"--workdir={run.folder}"]
    began = time.perf_counter()
    processes = start_two(*[[*arguments, "--config.checkpoint.on_error=stop"]] * 2, python=python)
    ends = [process.communicate(timeout=120)[1] for process in processes]
    print(
        f"RECOVERY read-only for one of two: ended {time.perf_counter() - began:.1f} s after start"
    )
    assert [process.returncode for process in processes] == [1, 1], ends
    assert re.search(
        r"flaxcls: checkpoint of step 6 not saved: process 1: Read-only file system\n", ends[0]
    )
