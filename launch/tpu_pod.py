"""Trains on a Cloud TPU pod slice, which is made for it and may be taken away at any time.

    python -m launch.tpu_pod COMMAND NAME --zone=ZONE --type=v5litepod-16 [--spot] [--dry_run] \\
        [-- --config=configs/NAME.py --workdir=gs://BUCKET/NAME]

create    asks for the slice (a queued resource)
setup     puts the code of a git commit and the pinned packages on all its hosts
run       starts training on all hosts; it keeps running when the connection ends
follow    shows the log of the first host
status    says the state of the slice and of training
delete    gives the slice back
babysit   all of that: makes the slice, starts training, and when the slice is taken away or
          training is preempted or crashes, does it again, until the run is complete

The run is in a bucket, which the hosts' service account may read and write; the exception is a file
system that they share and `--prepare` mounts. `--dry_run` prints the commands that would run. To be
typed in a git checkout; gcloud is logged in.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from launch import flags, training
from launch.babysitter import Decision, Limits, Tries, combine, decide, failed

# Accelerator types by their prefix: the generation, and the image of the hosts.
# https://cloud.google.com/tpu/docs/runtimes
GENERATIONS = {
    "v5litepod": ("v5e", "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", "v2-alpha-tpuv5"),
    "v6e": ("v6e", "v2-alpha-tpuv6e"),
}
HOST = "bash ~/flaxcls/launch/tpu_host.sh"  # what is done on the hosts
STATE = "flaxcls-state:"


class Pod:
    """The slice `options.name`: its methods are commands of gcloud, and run them."""

    def __init__(self, options: argparse.Namespace, arguments: Sequence[str]):
        self._options = options
        self._arguments = arguments
        self._generation, self._runtime = GENERATIONS[options.type.rsplit("-", 1)[0]]

    def create(self) -> None:
        options = self._options
        self._call(
            *self._queued("create"),
            f"--node-id={options.name}",
            f"--accelerator-type={options.type}",
            f"--runtime-version={options.runtime or self._runtime}",
            *(["--spot"] if options.spot else []),
            *([f"--service-account={account}"] if (account := options.service_account) else []),
        )

    def delete(self) -> None:
        self._call(*self._queued("delete"), "--force", "--quiet")

    def setup(self) -> None:
        """Raises CalledProcessError where a host can't be reached, or a package not installed."""
        options = self._options
        source = options.repository
        if not source:
            source = f"{options.name}.bundle"
            self._call("mkdir", "-p", "build")
            self._call("git", "bundle", "create", f"build/{source}", "HEAD")
            self._call(*self._vm("scp", f"build/{source}", f"{options.name}:"), "--worker=all")
        steps = [
            *options.prepare,
            "rm -rf ~/flaxcls",
            f"git clone --quiet {shlex.quote(source)} ~/flaxcls",
            f"git -C ~/flaxcls checkout --quiet --detach {options.commit}",
            f"{HOST} setup",
        ]
        self._ssh(" && ".join(steps))

    def run(self) -> None:
        environment = flags.environment(flags.TPU[self._generation], self._options.env)
        variables = [f"{name}={value}" for name, value in environment.items()]
        python, *words = training.command("~/flaxcls-venv/bin/python", self._arguments)
        # The host's shell is to replace the tilde: it stays unquoted.
        self._ssh(f"{HOST} run env {shlex.join(variables)} {python} {shlex.join(words)}")

    def follow(self) -> None:
        self._call(
            *self._vm("ssh", self._options.name),
            "--worker=0",
            "--command=tail -n 100 -F ~/flaxcls-run/log",
        )

    def state(self) -> str | None:
        """The state of the queued resource, such as "ACTIVE".

        None if there is none, "UNKNOWN" if gcloud can't say, for want of a network or of a login.
        """
        words = *self._queued("describe"), "--format=value(state.state)"
        result = self._output(*words)
        if result.returncode == 0:
            return result.stdout.strip() or None
        if "NOT_FOUND" in result.stderr or "not found" in result.stderr:
            return None
        print(result.stderr.strip(), file=sys.stderr)
        return "UNKNOWN"

    def training(self) -> str | int:
        """What training does: "unreachable", "absent", "running", or the exit code of all hosts."""
        words = *self._vm("ssh", self._options.name), "--worker=all"
        result = self._output(*words, f"--command={HOST} state || echo {STATE} absent")
        lines = result.stdout.splitlines()
        told = [line.split()[1] for line in lines if line.startswith(STATE)]
        return combine(told) if result.returncode == 0 and told else "unreachable"

    def status(self) -> None:
        if self._options.dry_run:
            self.state()
            self.training()
            return
        state = self.state()
        doing = self.training() if state == "ACTIVE" else "absent"
        doing = training.describe(doing) if isinstance(doing, int) else doing
        print(f"slice {self._options.name}: {state or 'there is none'}; training: {doing}")

    def _queued(self, verb: str) -> list[str]:
        where = ["gcloud", "compute", "tpus", "queued-resources", verb, self._options.name]
        return [*where, *self._place()]

    def _vm(self, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "tpu-vm", verb, *words, *self._place()]

    def _place(self) -> list[str]:
        project = [f"--project={self._options.project}"] if self._options.project else []
        return [f"--zone={self._options.zone}", *project]

    def _ssh(self, command: str) -> None:
        self._call(*self._vm("ssh", self._options.name), "--worker=all", f"--command={command}")

    def _call(self, *words: str) -> None:
        if self._options.dry_run:
            print(shlex.join(words))
        else:
            subprocess.run(words, check=True)

    def _output(self, *words: str) -> subprocess.CompletedProcess[str]:
        if self._options.dry_run:
            print(shlex.join(words))
            return subprocess.CompletedProcess(words, 0, "", "")
        return subprocess.run(words, capture_output=True, text=True)


def babysit(pod: Pod, limits: Limits, interval: float) -> int:
    """Makes the slice and trains on it until the run is complete; returns an exit code.

    Looks every `interval` seconds. Started again it continues with what there is; only its counts
    restart.
    """
    actions = {
        "wait": (),
        "create": (pod.create,),
        "delete": (pod.delete,),
        "start": (pod.setup, pod.run),
        "rerun": (pod.run,),
        "stop": (),
    }
    tries = Tries()
    while True:
        state = pod.state()
        decision = decide(state, pod.training() if state == "ACTIVE" else "", tries, limits)
        _announce(decision, interval)
        try:
            for action in actions[decision.action]:
                action()
        except subprocess.CalledProcessError as error:
            reason = f"{shlex.join(error.cmd)} ended with exit code {error.returncode}"
            decision = failed("wait", reason, decision.tries, limits)
            _announce(decision, interval)
        if decision.action == "stop":
            return decision.code
        tries = decision.tries
        time.sleep(interval)


def _announce(decision: Decision, interval: float) -> None:
    """Says what is to be done, and waits as long as it should be put off."""
    print(f"{time.strftime('%F %T')} {decision.action}: {decision.reason}", flush=True)
    time.sleep(interval * decision.delay)


def rehearse(pod: Pod) -> None:
    """Prints what `babysit` runs when all goes well, and when the slice is taken away."""
    print("# until the slice is ACTIVE")
    pod.state()
    print("# if there is none")
    pod.create()
    print("# when it is ACTIVE and nothing runs")
    pod.setup()
    pod.run()
    print("# to see how training does; after exit codes 42, 44 and crashes it is run again")
    pod.training()
    print("# when the slice was taken away; then again from the top")
    pod.delete()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch.tpu_pod",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", choices=(*COMMANDS, "babysit"))
    add("name", help="of the slice")
    add("--zone", required=True)
    add("--type", type=_type, default="v5litepod-16", help="v5litepod-N, v5p-N or v6e-N")
    add("--project")
    add("--spot", action="store_true", help="cheaper, and may be taken away")
    add("--service_account", help="of the hosts; otherwise Compute Engine's default one")
    add("--runtime", help="the hosts' image, if not the usual one of the type")
    add("--commit", default="HEAD", help="of the code")
    add("--repository", help="to clone from; otherwise the commit is uploaded from here")
    prepare = "typed on all hosts before the set-up, such as the mount of a shared file system"
    add("--prepare", action="append", default=[], metavar="COMMAND", help=prepare)
    add("--max_failures", type=int, default=Limits.failures, help="crashes, for babysit")
    add("--max_preemptions", type=int, default=Limits.preemptions, help="for babysit")
    add("--interval", type=float, default=60, help="seconds between two looks of babysit")
    add("--dry_run", action="store_true", help="only print the commands")
    training.add_env(parser)
    return parser


def _type(text: str) -> str:
    if text.rsplit("-", 1)[0] not in GENERATIONS or not text.rsplit("-", 1)[-1].isdigit():
        raise argparse.ArgumentTypeError(f"must be v5litepod-N, v5p-N or v6e-N, got {text!r}")
    return text


COMMANDS = {
    "create": Pod.create,
    "setup": Pod.setup,
    "run": Pod.run,
    "follow": Pod.follow,
    "status": Pod.status,
    "delete": Pod.delete,
}


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    if argv[:1] in (["run"], ["babysit"]):
        options, arguments = training.split(parser, argv, absolute=True)
    else:
        options, arguments = parser.parse_args(argv), []
    if (
        options.command == "babysit"
        and not options.prepare
        and not training.is_in_bucket(options.workdir)
    ):
        parser.error(
            f"--workdir={options.workdir} is on disks that go with the slice: give gs://BUCKET/... "
            "or s3://BUCKET/..., or mount a file system that all hosts share with --prepare"
        )
    if options.commit == "HEAD":
        head = ["git", "rev-parse", "HEAD"]
        options.commit = subprocess.run(head, check=True, capture_output=True, text=True).stdout
        options.commit = options.commit.strip()
    pod = Pod(options, arguments)
    if options.command == "babysit" and options.dry_run:
        rehearse(pod)
        return 0
    if options.command == "babysit":
        limits = Limits(options.max_failures, options.max_preemptions)
        return babysit(pod, limits, options.interval)
    try:
        COMMANDS[options.command](pod)
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
