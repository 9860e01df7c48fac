"""A SLURM cluster on this machine: Debian's `slurm-wlm` and `munge`, started as root.

Nothing of the system's own is read or changed: configuration, keys and state are in one temporary
folder. Its nodes are named by addresses of this machine, which need no entry in /etc/hosts, and
claim more cores than there are, so that jobs run side by side.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent.parent
# As `sinfo` shows them: the nodes of each case are its own, so that none disturbs another one.
NODES = [f"127.0.0.{number}" for number in range(1, 10)]
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# The second is the time for which a job waits that was put into the queue again; 120 by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=main Nodes={names[0]},{names[1]} Default=YES
PartitionName=low Nodes={names[2]},{names[3]} PriorityTier=1
PartitionName=high Nodes={names[2]},{names[3]} PriorityTier=2
PartitionName=warned Nodes={names[2]},{names[3]} PriorityTier=1 GraceTime=60
PartitionName=frail Nodes={names[4]},{names[5]},{names[6]}
PartitionName=lost Nodes={names[7]},{names[8]}
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
PATIENCE = 240  # seconds for anything, beside other tests on a busy machine


def missing() -> str | None:
    """Why there can be no cluster, or None."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"SLURM is not installed: no {', '.join(absent)}"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


class Cluster:
    """Its daemons, and the folder in which jobs are submitted and run."""

    def __init__(self):
        # Not pytest's own: the socket's path must be short, and only root may come to the key.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: dict[str, subprocess.Popen] = {}
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
        }

    def start(self) -> None:
        """Writes its configuration and starts it; returns when all nodes are idle."""
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        host, ports = socket.gethostname().split(".")[0], _free_ports(1 + len(NODES))
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 Gres=gpu:2"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        text = CONFIG.format(
            host=host, ports=ports, folder=self.folder, nodes="\n".join(nodes), names=NODES
        )
        (self.folder / "slurm.conf").write_text(text)
        # Devices that are everywhere stand for the GPUs: SLURM only counts and names them.
        devices = [f"NodeName={name} Name=gpu File=/dev/null,/dev/zero" for name in NODES]
        (self.folder / "gres.conf").write_text("\n".join(devices) + "\n")
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed",
        )  # fmt: skip
        wait_for((self.folder / "munge.socket").exists, "munged")
        self._start("slurmctld", "-D")
        for name in NODES:
            self.start_node(name)
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"], "idle nodes")

    def start_node(self, name: str) -> None:
        self._start("slurmd", "-D", "-N", name)

    def lose_node(self, name: str) -> None:
        """Kills a node's daemon alone: what runs there runs on, and SLURM knows nothing of it."""
        self._daemons[f"slurmd {name}"].kill()

    def kill_node(self, name: str) -> None:
        """Kills all that runs on a node, as when it loses its power."""
        self.lose_node(name)
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.environ().get("SLURMD_NODENAME") == name:
                    _kill(process)

    def stop(self) -> None:
        """Ends all of it, and every process that it has started."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                _kill(process)
        for daemon in self._daemons.values():
            daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: str) -> str:
        """What one of SLURM's programs prints."""
        result = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, cwd=self.folder
        )
        return result.stdout if result.returncode == 0 else ""

    def submit(self, name: str, *options: str, run: tuple[str, ...], workdir: str = "") -> "Job":
        """Submits a training by the launcher; `run` are the arguments of flaxcls.main."""
        command = [sys.executable, "-m", "launch.slurm", f"--name={name}", "--cpus=1"]
        command += [f"--python={sys.executable}", *options, "--", *run]
        said = self.run(*command, f"--workdir={workdir or name}")
        return Job(self, re.fullmatch(r"Submitted batch job (\d+)\n", said)[1], name)

    def preempt(self) -> None:
        """Submits a job of higher priority that wants the nodes of `low` and `warned` alone."""
        words = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
        self.run("sbatch", *words, "--wrap=true")

    def _start(self, *command: str) -> None:
        name = " ".join(word for word in command if not word.startswith("-"))
        with (self.folder / "daemons.log").open("a") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log
            )

    def _processes(self) -> list[psutil.Process]:
        """All that the cluster's daemons and jobs have started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found.append(process)
        return found


class Job:
    """A job of the launcher, which trains in the folder of its name."""

    def __init__(self, cluster: Cluster, number: str, name: str):
        self.number, self.name = number, name
        self._cluster = cluster
        self.folder = cluster.folder / name

    def log(self) -> str:
        path = self._cluster.folder / f"{self.name}-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def fields(self) -> dict[str, str]:
        """Its fields, as `scontrol show job` has them: JobState, ExitCode, Restarts, ..."""
        text = self._cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_step(self, step: int) -> None:
        """Waits until it has trained so many steps."""
        self.wait_for_line(f"step {step}/")

    def wait_for_line(self, text: str) -> str:
        """Waits for a line that begins so in its log."""
        said = re.compile(f"^{re.escape(text)}.*", re.MULTILINE)
        wait_for(lambda: said.search(self.log()), f"'{text}' of {self.name}", self.log)
        return said.search(self.log())[0]

    def wait(self) -> tuple[str, str, int]:
        """Waits for its end: JobState, ExitCode (code:signal) and how often it was queued again."""
        running = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "CONFIGURING")
        wait_for(
            lambda: self.fields().get("JobState", "PENDING") not in running,
            f"the end of {self.name}",
            self.log,
        )
        fields = self.fields()
        return fields["JobState"], fields["ExitCode"], int(fields["Restarts"])


def wait_for(condition, what: str, log=lambda: "") -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited for {what} in vain:\n{log()}"
        time.sleep(0.3)


def _kill(process: psutil.Process) -> None:
    """Kills a task, after the daemon that would report its end, whose environment can't be read."""
    parent = process.parent()
    if parent and parent.name() == "slurmstepd":
        parent.kill()
    process.kill()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
