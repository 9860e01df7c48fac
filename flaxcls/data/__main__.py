"""Inspects and prepares data sets; each command says more with --help.

python -m flaxcls.data check    --source=NAME-or-PATH      what is in it, what would break a run
python -m flaxcls.data prepare  --source=... --out=DIR     writes it with smaller pictures
python -m flaxcls.data preview  --config=FILE --out=PNG    what the network sees
"""

from collections.abc import Sequence

from flaxcls import cli
from flaxcls.runtime.output import say


def main(argv: Sequence[str]) -> int | None:
    if len(argv) > 1 and argv[1] in ("--help", "-h"):
        say(__doc__.strip())
        return 0
    return cli.dispatch(argv, "data ")


if __name__ == "__main__":
    cli.run(main)
