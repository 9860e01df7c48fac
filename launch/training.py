"""What all launchers know of a training process: its command line and its exit codes."""

import argparse
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

DONE = 0
PREEMPTED = 42  # saved; to be started again, as often as it takes
STOP = {  # starting it again would only end in the same way
    2: "the config or the command line is wrong, or another job has the run",
    43: "the training diverged",
    45: "the data are broken",
    130: "somebody pressed Ctrl-C",
}
# All other codes, 44 (hung) among them, are crashes: started again, but not for ever.


def describe(code: int) -> str:
    """An exit code in words, for messages."""
    known = {DONE: "done", PREEMPTED: "preempted, saved", 44: "a step hung", **STOP}
    return f"exit code {code}: {known.get(code, 'crashed')}"


def split(
    parser: argparse.ArgumentParser, argv: Sequence[str], *, absolute: bool
) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options with `workdir`, and the arguments of `flaxcls.main` after `--`.

    A run that is started again resumes only in its folder, so --workdir has to be said: in a bucket
    or on a file system, and there `absolute` where the processes' current folder is not a shared
    one. What is wrong ends the launcher with a sentence and code 2.
    """
    own, dashes, arguments = list(argv), [], []
    if "--" in argv:
        at = own.index("--")
        own, dashes, arguments = own[:at], own[at:], own[at + 1 :]
    options = parser.parse_args(own)
    values = dict(text.split("=", 1) for text in arguments if "=" in text)
    if not dashes:
        parser.error("the arguments of flaxcls.main must follow --, as in -- --config=FILE ...")
    for name in ("--config", "--workdir"):
        if not values.get(name):
            parser.error(f"{name}=... is missing after --")
    options.workdir = workdir = values["--workdir"]
    is_path = "://" not in workdir and (not absolute or PurePosixPath(workdir).is_absolute())
    if not is_path and not is_in_bucket(workdir):
        a_path = "an absolute path" if absolute else "a path"
        parser.error(
            f"--workdir must be gs://BUCKET/... or s3://BUCKET/..., or {a_path} of a file system "
            f"that all hosts share, got {workdir!r}"
        )
    return options, arguments


def is_in_bucket(workdir: str) -> bool:
    return re.match("(gs|s3)://[^/]", workdir) is not None


def command(python: str, arguments: Sequence[str]) -> list[str]:
    """The command that trains."""
    return [python, "-m", "flaxcls.main", *arguments]


def add_env(parser: argparse.ArgumentParser) -> None:
    """The option --env, which may be given several times."""
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", type=_assignment,
        help="an environment variable of the training process, such as TFDS_DATA_DIR=...",
    )  # fmt: skip


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value
