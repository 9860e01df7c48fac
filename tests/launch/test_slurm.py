"""The batch script, run by bash with small programs in place of SLURM's own."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SRUN = """#!/bin/bash
echo "$@" >>srun.log
if [ -n "$SAVES" ]; then
  trap 'echo told >>srun.log; sleep 0.3; echo saved >>srun.log; exit 42' TERM
  echo $$ >srun.pid
  echo ready >>srun.log
  while true; do sleep 0.05; done
fi
exit "$CODE"
"""


@pytest.fixture
def job(launch, executable, tmp_path, monkeypatch):
    """Starts the batch script as SLURM does, in an empty folder, and returns its process."""
    executable("srun", SRUN)
    executable("scontrol", '#!/bin/sh\necho "$@" >>scontrol.log\n')
    executable("scancel", '#!/bin/sh\necho "$@" >>scancel.log\nkill -TERM "$(cat srun.pid)"\n')
    executable("squeue", '#!/bin/sh\necho "$STATE"\n')
    run = ["--max_failures=2", "--dry_run", "--", "--config=c.py", "--workdir=w", "--config.a=b c"]
    (tmp_path / "job").write_text(launch("slurm", *run).stdout)
    monkeypatch.chdir(tmp_path)

    def start(**variables):
        environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", **variables}
        return subprocess.Popen(["bash", "job"], env=environment, stderr=subprocess.PIPE, text=True)

    return start


def requeued():
    path = Path("scontrol.log")
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "code, again",
    [(0, False), (42, True), (44, True), (1, True), (137, True)]
    + [(stop, False) for stop in (2, 43, 45, 130)],
)
def test_exit_code_decides_whether_the_job_is_queued_again(code, again, job):
    process = job(CODE=str(code))
    process.communicate(timeout=30)
    assert process.returncode == code
    assert requeued() == (["requeue 7"] if again else [])
    arguments = "python -m flaxcls.main --config=c.py --workdir=w --config.a=b c"
    assert Path("srun.log").read_text().rstrip().endswith(arguments)


def test_job_that_has_trained_before_and_is_refused_is_queued_again_no_more_than_allowed(job):
    """Its own process may still train, on a node that SLURM has lost."""
    for _ in range(3):
        process = job(CODE="2", SLURM_RESTART_COUNT="1")
        process.communicate(timeout=30)
        assert process.returncode == 2
    assert requeued() == ["requeue 7"] * 2


def test_crashes_are_queued_again_no_more_than_allowed_and_preemptions_always(job):
    for code in (1, 44, 1, 42, 42):
        job(CODE=str(code)).communicate(timeout=30)
    assert len(requeued()) == 2 + 2
    _, said = job(CODE="44").communicate(timeout=30)
    assert "given up after 2 restarts" in said and len(requeued()) == 4


@pytest.mark.parametrize("state, again", [("COMPLETING", []), ("RUNNING", ["requeue 7"])])
def test_sigterm_is_forwarded_waited_for_and_an_ending_job_left_to_slurm(state, again, job):
    process = job(SAVES="yes", STATE=state)
    wait_until_ready()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 42
    assert Path("scancel.log").read_text() == "--signal=TERM 7.0\n"
    assert Path("srun.log").read_text().endswith("saved\n")
    assert requeued() == again


def test_step_told_by_slurm_alone_is_queued_again(job):
    process = job(SAVES="yes")
    wait_until_ready()
    os.kill(int(Path("srun.pid").read_text()), signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 42 and requeued() == ["requeue 7"]


def wait_until_ready():
    for _ in range(600):
        if Path("srun.log").exists() and "ready" in Path("srun.log").read_text():
            return
        time.sleep(0.05)
    raise TimeoutError


def test_task_a_node_sees_all_gpus(launch):
    run = ["--one_task_a_node", "--gpus=4", "--cpus=6", "--dry_run", "--"]
    text = launch("slurm", *run, "--config=c", "--workdir=w").stdout
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2,3\n" in text
    assert "--ntasks-per-node=1\n" in text and "--cpus-per-task=24\n" in text


def test_script_is_handed_to_sbatch(launch, executable, tmp_path):
    executable("sbatch", f"#!/bin/sh\ncat >'{tmp_path}/submitted'\n")
    run = ["--", "--config=c", "--workdir=w"]
    assert launch("slurm", *run).returncode == 0
    assert (tmp_path / "submitted").read_text() == launch("slurm", "--dry_run", *run).stdout


def test_nodes_without_gpus_have_one_task_on_their_cpus(launch):
    run = ["--dry_run", "--gpus=0", "--cpus=16", "--nodes=2", "--", "--config=c.py", "--workdir=w"]
    text = launch("slurm", *run).stdout
    assert "--ntasks-per-node=1" in text and "--cpus-per-task=16" in text and "--nodes=2" in text
    assert "gpu" not in text.lower() and "XLA" not in text and "JAX_" not in text


@pytest.mark.parametrize("option", ["--gpus=-1", "--gpus=a", "--nodes=0", "--cpus=0"])
def test_impossible_numbers_are_one_sentence(launch, option):
    result = launch("slurm", option, "--dry_run", "--", "--config=c.py", "--workdir=w")
    assert result.returncode == 2 and "must be a whole number from" in result.stderr
