"""Trains image classifiers, and everything around it; each command says more with --help.

    python -m flaxcls COMMAND [--flag=value ...]

`flaxcls COMMAND` is the same. Commands:
"""

from collections.abc import Sequence

from flaxcls import cli
from flaxcls.runtime.output import write_result


def main(argv: Sequence[str]) -> int | None:
    if len(argv) > 1 and argv[1] not in ("--help", "-h"):
        return cli.dispatch(argv)
    width = max(map(len, cli.COMMANDS))
    lines = (f"  {name:{width}}  {cli.summary(name)}" for name in cli.COMMANDS)
    write_result("\n".join([__doc__.strip(), *lines]))
    return 0


def run() -> None:
    """The console script `flaxcls`."""
    cli.run(main)


if __name__ == "__main__":
    run()
