"""Jobs of the launcher on a real SLURM; `python -m pytest -m slurm`, as root where it is installed.

What takes long by waiting alone, the time limit and the loss of a node, begins before all else.
"""

import json
import re
import time

import pytest
import slurm_cluster

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or ""),
]

# Steps that take their time by waiting for data, so that jobs can run side by side.
RECIPE = """
import json
import os
import time
from pathlib import Path

from flaxcls.config import default
from flaxcls.data.fake import Fake


class Slow(Fake):
    def __init__(self, split, *, seconds: float):
        super().__init__(split, image_shape=(8, 8, 1), num_classes=5, num_examples=96)
        self._seconds = seconds if split == "train" else 0.0

    def __getitem__(self, index):
        time.sleep(self._seconds)
        return super().__getitem__(index)


def get_config():
    if "TASKS" in os.environ:
        task = Path(os.environ["TASKS"], os.environ["SLURM_PROCID"])
        task.write_text(json.dumps(dict(os.environ)))
    config = default()
    config.batch_size = 8
    config.duration = "24 steps"
    config.log_every = "1 steps"
    config.eval.every = "12 steps"
    config.checkpoint.every = "6 steps"
    config.data.name = "slow:Slow"
    config.data.seconds = 0.0
    config.data.mean, config.data.std = (0.5,), (0.2,)
    config.input.mode = "stream"
    config.input.threads = 1
    config.input.read_ahead = 1
    config.model.name = "dense"
    config.model.widths = (16,)
    config.mesh.cpu_devices = 1
    return config
"""
CRASH = """
import os
import signal


def get_config():
    with open("starts", "a") as file:
        file.write("started\\n")
    os.kill(os.getpid(), signal.SIGKILL)
"""
STEPS = 24
RUN = ("--config=slow.py", "--noreport")
SLOW = (*RUN, "--config.data.seconds=0.1")  # an example
CPUS = ("--gpus=0", "--time=10")
DONE = ("COMPLETED", "0:0")


@pytest.fixture(scope="module")
def cluster():
    cluster = slurm_cluster.Cluster()
    try:
        cluster.start()
        (cluster.folder / "slow.py").write_text(RECIPE)
        (cluster.folder / "crash.py").write_text(CRASH)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def limited(cluster):
    """A job that comes to its time limit of a minute, and is told so 15 to 45 s after its start."""
    run = (*RUN, "--config.data.seconds=0.25", "--config.checkpoint.every=100 steps")
    return cluster.submit("limited", "--gpus=0", "--time=1", "--notice=15", run=run)


@pytest.fixture(scope="module")
def node_down(cluster):
    """A job on two nodes of three, of which one has gone down; and when that was."""
    job = cluster.submit("node_down", *CPUS, "--nodes=2", "--sbatch=--partition=frail", run=SLOW)
    job.wait_for_step(8)
    cluster.kill_node(slurm_cluster.NODES[5])
    return job, time.time()


@pytest.fixture(scope="module")
def lost(cluster):
    """A job that trains on, on a node that SLURM has lost."""
    run = (*RUN, "--config.data.seconds=0.4")  # longer than SLURM takes to find out
    options = ("--max_failures=20", "--sbatch=--partition=lost")
    job = cluster.submit("lost", *CPUS, *options, run=run)
    job.wait_for_step(1)
    cluster.lose_node(slurm_cluster.NODES[7])
    return job


@pytest.fixture(scope="module")
def crashing(cluster):
    """A job whose processes are killed at their start, each time."""
    return cluster.submit("crashing", *CPUS, "--max_failures=2", run=("--config=crash.py",))


@pytest.fixture(scope="module", autouse=True)
def undisturbed(cluster, limited, node_down, lost, crashing):
    """A job of two processes that nothing happens to, and that has ended."""
    job = cluster.submit("undisturbed", *CPUS, "--nodes=2", run=RUN)
    assert job.wait() == (*DONE, 0)
    return job


def rows(job):
    return (job.folder / "metrics.jsonl").read_bytes()


def trained(job):
    """The steps of a run, as it has logged them."""
    found = [json.loads(line) for line in rows(job).splitlines()]
    return [row["step"] for row in found if "train" in row]


def saved(job, began, what):
    """The step that a job says it has stopped and saved at, once it does."""
    line = job.wait_for_line("flaxcls: stopped after step ")
    print(f"RECOVERY SLURM, {what}: saved after {time.monotonic() - began:.1f} s")
    return int(re.search(r"step (\d+) of \d+ and saved", line)[1])


def resumed(job, step, began, what):
    """Waits until a job has trained one step more."""
    job.wait_for_line(f"resumed from step {step} of {STEPS}")
    job.wait_for_step(step + 1)
    print(f"RECOVERY SLURM, {what}: {time.monotonic() - began:.1f} s to the next row")


def tasks(cluster, job):
    """The environments of a job's tasks, by their number."""
    folder = cluster.folder / f"{job.name}-tasks"
    return {int(path.name): json.loads(path.read_text()) for path in folder.iterdir()}


def gpus(cluster, name):
    """Two GPUs a node; the tasks are noted."""
    folder = cluster.folder / f"{name}-tasks"
    folder.mkdir()
    return ("--time=10", "--gpus=2", f"--env=TASKS={folder}")


def test_two_nodes_with_one_task_each_on_their_cpus(undisturbed):
    assert trained(undisturbed) == list(range(1, STEPS + 1))
    assert "devices: 2 x cpu" in undisturbed.log()
    assert undisturbed.log().endswith("undisturbed: done\n")


def test_every_task_of_a_gpu_sees_all_of_its_node(cluster):
    job = cluster.submit("tasks", *gpus(cluster, "tasks"), run=RUN)
    assert job.wait() == (*DONE, 0)
    assert trained(job) == list(range(1, STEPS + 1)) and "devices: 2 x cpu" in job.log()
    found = tasks(cluster, job)
    assert {number: task["SLURM_LOCALID"] for number, task in found.items()} == {0: "0", 1: "1"}
    assert all(task["CUDA_VISIBLE_DEVICES"] == "0,1" for task in found.values())
    assert not any("JAX_LOCAL_DEVICE_IDS" in task for task in found.values())


def test_preempted_job_with_a_task_a_node_saves_and_ends_bitwise_the_same(cluster, undisturbed):
    options = (*gpus(cluster, "preempted"), "--nodes=2", "--one_task_a_node")
    job = cluster.submit("preempted", *options, "--sbatch=--partition=low", run=SLOW)
    job.wait_for_step(3)
    began = time.monotonic()
    cluster.preempt()
    resumed(job, saved(job, began, "preempted"), began, "preempted")
    assert job.wait() == (*DONE, 1)
    assert "DUE TO PREEMPTION" in job.log() and "exit code 42 after SLURM ended" in job.log()
    assert rows(job) == rows(undisturbed)
    found = tasks(cluster, job)
    assert {number: task["SLURM_NODEID"] for number, task in found.items()} == {0: "0", 1: "1"}
    assert all(task["JAX_LOCAL_DEVICE_IDS"] == "0,1" for task in found.values())


def test_job_with_a_grace_time_before_preemption_uses_it(cluster):
    job = cluster.submit("warned", *CPUS, "--sbatch=--partition=warned", run=SLOW)
    job.wait_for_step(3)
    began = time.monotonic()
    cluster.preempt()
    resumed(job, saved(job, began, "warned of preemption"), began, "warned of preemption")
    assert job.wait() == (*DONE, 1)
    assert "warned: preempted, saved; into the queue again" in job.log()
    assert trained(job) == list(range(1, STEPS + 1))


def test_job_whose_shell_alone_is_told_saves_and_is_queued_again(cluster):
    """As by --signal=B:TERM: srun, told SIGTERM, would kill the tasks."""
    job = cluster.submit("shell", *CPUS, run=SLOW)
    job.wait_for_step(3)
    began = time.monotonic()
    cluster.run("scancel", "--batch", "--signal=TERM", job.number)
    resumed(job, saved(job, began, "the shell told"), began, "the shell told")
    assert job.wait() == (*DONE, 1)
    assert trained(job) == list(range(1, STEPS + 1))


def test_second_job_on_the_run_is_refused_and_a_cancelled_one_saves_and_stays_cancelled(cluster):
    job = cluster.submit("cancelled", *CPUS, run=(*RUN, "--config.data.seconds=0.2"))
    job.wait_for_step(1)
    second = cluster.submit("second", *CPUS, "--nodes=2", run=RUN, workdir="cancelled")
    assert second.wait() == ("FAILED", "2:0", 0)
    assert "another job trains in cancelled: process " in second.log()
    began = time.monotonic()
    cluster.run("scancel", job.number)
    step = saved(job, began, "cancelled")
    state, code, restarts = job.wait()
    assert (state, restarts) == ("CANCELLED", 0), code
    assert "exit code 42 after SLURM ended the job" in job.log()
    assert (job.folder / "checkpoints" / str(step)).is_dir()


def test_crashing_job_is_given_up_after_its_restarts(cluster, crashing):
    assert crashing.wait() == ("FAILED", "137:0", 2)
    assert "exit code 137, given up after 2 restarts" in crashing.log()
    assert (cluster.folder / "starts").read_text() == "started\n" * 3


def test_mistake_ends_the_job_of_all_its_processes(cluster):
    job = cluster.submit("typo", *CPUS, "--nodes=2", run=(*RUN, "--config.modell.width=3"))
    assert job.wait() == ("FAILED", "2:0", 0)
    assert job.log().count("config.modell.width is not a config field, did you mean 'model'?") == 1
    assert "typo: exit code 2, to be looked at" in job.log()


def test_job_at_its_time_limit_saves_and_is_queued_again(limited):
    state, code, restarts = limited.wait()
    assert (state, code) == DONE
    # On a very busy machine one may not even have come to its first step.
    assert 1 <= limited.log().count("limited: preempted, saved; into the queue again") <= restarts
    assert trained(limited) == list(range(1, STEPS + 1))


def test_job_whose_node_goes_down_ends_bitwise_the_same_on_another(node_down, undisturbed):
    job, down = node_down
    assert job.wait() == (*DONE, 1)
    fields = job.fields()
    start = time.mktime(time.strptime(fields["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    print(f"RECOVERY SLURM, a node down: started again after {start - down:.0f} s")
    assert fields["NodeList"] == "127.0.0.[5,7]" and "DUE TO NODE FAILURE" in job.log()
    assert rows(job) == rows(undisturbed)


def test_job_whose_own_process_still_trains_on_a_lost_node_waits_for_it(lost):
    state, code, restarts = lost.wait()
    assert (state, code) == DONE and restarts >= 2
    assert "another job trains in lost: process " in lost.log()
    assert lost.log().count("lost: exit code 2; into the queue again") == restarts - 1
    assert trained(lost) == list(range(1, STEPS + 1))
