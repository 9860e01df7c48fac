"""Two jobs on one run's folder, as real processes: who trains, and who is told what."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A job on what looks like another machine, to both, as fast as tests need.
ELSEWHERE = """
import sys
from flaxcls import cli, main
from flaxcls.runs import lease
from flaxcls.runtime import machine

machine.identity = lambda: "another"
lease.SILENT_SECONDS = 1.0
cli.run(main.main)
"""
STEPS = 2000
ARGUMENTS = (
    "--config=digits_mlp",
    f"--config.duration={STEPS} steps",
    "--config.log_every=50 steps",
    "--config.eval.every=500 steps",
    "--config.checkpoint.every=200 steps",
    "--config.batch_size=16",
    "--config.model.widths=(16,)",
    "--config.mesh.cpu_devices=1",
    "--noreport",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run that had it for itself."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    command = [sys.executable, "-m", "flaxcls.main", *ARGUMENTS, f"--workdir={folder}"]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture
def suspended(tmp_path, start_main, run_folder, wait_until):
    """A run, its arguments and its process, which has saved something and can't end meanwhile."""
    run = run_folder(tmp_path / "run")
    arguments = [*ARGUMENTS, f"--workdir={run.folder}"]
    process = start_main(*arguments)
    assert wait_until(process, lambda: run.steps() and run.log())
    process.send_signal(signal.SIGSTOP)
    return run, arguments, process


def contents(folder):
    """All files of a run with what tells whether they were written.

    Not those of a checkpoint under way, which is in the background, and never committed; and not
    the lease, which its holder renews.
    """
    files = [p for p in folder.rglob("*") if p.is_file() and "checkpoint-tmp" not in str(p)]
    files = [path for path in files if path.name != "lease.json"]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@pytest.mark.slow
def test_second_job_is_refused_whatever_its_processes_and_changes_nothing(
    suspended, alone, run_main, run_two, run_folder, saved_arrays, assert_same_arrays
):
    run, arguments, first = suspended
    before = contents(run.folder)
    second = run_main(*arguments)
    print(f"RECOVERY a second job: refused after {second.seconds:.1f} s")
    sentence = f"another job trains in {run.folder}: process {first.pid} on "
    assert second.returncode == 2 and "Traceback" not in second.stderr, second.stderr
    assert second.stderr.startswith(f"flaxcls: {sentence}")
    assert re.search(r", since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(it is suspended: ", second.stderr)
    (code, _, said), (other_code, _, other_said) = run_two(arguments, arguments)
    assert (code, other_code) == (2, 2) and sentence in said, said + other_said
    assert not other_said.replace("[Gloo]", ""), other_said  # process 0 speaks for both
    assert contents(run.folder) == before
    first.send_signal(signal.SIGCONT)
    _, stderr = first.communicate(timeout=120)
    assert first.returncode == 0, stderr
    assert run.log() == run_folder(alone).log()
    assert_same_arrays(saved_arrays(run.folder, STEPS), saved_arrays(alone, STEPS))
    assert not list(run.folder.glob("lease*"))


@pytest.mark.slow
def test_suspended_job_whose_run_was_taken_over_wakes_up_and_writes_nothing(
    suspended, alone, start_python, run_folder, wait_until, saved_arrays, assert_same_arrays
):
    run, arguments, first = suspended
    began = time.perf_counter()
    second = start_python("-c", ELSEWHERE, *arguments)
    lease = run.folder / "lease.json"
    assert wait_until(second, lambda: json.loads(lease.read_text())["pid"] == second.pid)
    before = run.log()
    assert wait_until(second, lambda: run.log() not in (before, b""))
    print(f"RECOVERY another host: its next row after {time.perf_counter() - began:.1f} s")
    second.send_signal(signal.SIGSTOP)  # what is written from here on is by the first one
    before = contents(run.folder)
    began = time.perf_counter()
    first.send_signal(signal.SIGCONT)
    stdout, stderr = first.communicate(timeout=60)
    print(f"RECOVERY woken up: ended after {time.perf_counter() - began:.1f} s")
    assert first.returncode == 2 and "Traceback" not in stdout + stderr, stderr
    assert f"the run was taken over: it is now that of process {second.pid} on" in stderr
    assert len(stderr.splitlines()) == 1
    assert contents(run.folder) == before
    second.send_signal(signal.SIGCONT)
    stdout, stderr = second.communicate(timeout=120)
    assert second.returncode == 0, stderr
    assert f"belongs to process {first.pid} on" in stdout and "this job takes the run" in stdout
    assert run.log() == run_folder(alone).log()
    assert_same_arrays(saved_arrays(run.folder, STEPS), saved_arrays(alone, STEPS))
