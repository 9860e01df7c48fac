"""Trains on a SLURM cluster, on one or several nodes with GPUs; with --gpus=0 on their CPUs.

    python -m launch.slurm --nodes=2 --time=24:00:00 [--sbatch=--partition=gpu] [--dry_run] \\
        -- --config=configs/NAME.py --workdir=DIR

submits a job that is put into the queue again until the run is complete. `--dry_run` prints the
script that would be submitted. To be typed in the checkout, which is on a shared file system; so is
DIR, or it is in a bucket, gs://... or s3://..., that all nodes may read and write.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launch import flags, training

BODY = Path(__file__).with_name("slurm.sh")


def script(options: argparse.Namespace, arguments: Sequence[str]) -> str:
    """The batch script."""
    # Neither --gpus-per-task nor --gpu-bind: every task must see all GPUs of its node, since JAX
    # takes that with the number SLURM_LOCALID. Without GPUs a node has one task.
    tasks = 1 if options.one_task_a_node else max(options.gpus, 1)
    cpus = options.cpus * max(options.gpus, 1) // tasks
    directives = [
        f"--job-name={options.name}",
        f"--output={options.name}-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={tasks}",
        *([f"--gpus-per-node={options.gpus}"] if options.gpus else []),
        f"--cpus-per-task={cpus}",
        f"--time={options.time}",
        f"--signal=TERM@{options.notice}",
        *options.sbatch,
    ]
    settings = flags.H100 if options.gpus else ()
    settings += flags.DETERMINISTIC_GPU if options.gpus and options.deterministic else ()
    environment = flags.environment(settings, options.env)
    if options.one_task_a_node and options.gpus:  # otherwise JAX takes one GPU a task
        environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(options.gpus)))
    # Since SLURM 22.05 srun does not take it from sbatch by itself.
    environment["SRUN_CPUS_PER_TASK"] = str(cpus)
    command = training.command(options.python, arguments)
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {directive}" for directive in directives),
        "",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        f"command=({shlex.join(command)})",
        f"name={shlex.quote(options.name)}",
        f"stop='{'|'.join(map(str, training.STOP))}' # exit codes after which a restart is no use",
        f"max_failures={options.max_failures}",
        "",
        BODY.read_text(),
    ]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.slurm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--name", default="flaxcls", help="of the job and of its log, NAME-JOBID.log")
    add("--nodes", type=_at_least(1), default=1)
    add("--gpus", type=_at_least(0), default=8, help="a node; 0: it trains on the CPUs")
    add("--cpus", type=_at_least(1), default=12, help="a GPU, or a node without: they decode")
    add("--time", default="24:00:00", help="the limit, after which the job is queued again")
    add("--notice", type=int, default=120, help="seconds before the limit at which SIGTERM comes")
    add("--one_task_a_node", action="store_true", help="instead of one a GPU")
    add("--deterministic", action="store_true", help="bitwise repeatable, perhaps slower")
    add("--max_failures", type=int, default=3, help="restarts after crashes and hangs")
    add("--python", default="python", help="the interpreter, on the nodes")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="further ones of sbatch")
    add("--dry_run", action="store_true", help="only print the script")
    training.add_env(parser)
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text}")
        return int(text)

    return number


def main(argv: Sequence[str]) -> int:
    options, arguments = training.split(_parser(), argv, absolute=False)
    text = script(options, arguments)
    if options.dry_run:
        print(text, end="")
        return 0
    return subprocess.run(["sbatch"], input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
