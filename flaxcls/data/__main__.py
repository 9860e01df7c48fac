"""Looks at data sets and makes them ready; each command says more with --help.

python -m flaxcls.data check    --source=NAME-or-PATH      what is in it, what would break a run
python -m flaxcls.data prepare  --source=... --out=DIR     writes it with smaller pictures
python -m flaxcls.data show     --config=FILE --out=PNG    what the network sees
"""

import importlib
from collections.abc import Sequence

from flaxcls import cli
from flaxcls.errors import ConfigError, did_you_mean
from flaxcls.runtime.output import say

# Modules with main(argv), imported when they are asked for.
COMMANDS = {
    "check": "flaxcls.data.commands.check",
    "prepare": "flaxcls.data.commands.prepare",
    "show": "flaxcls.data.commands.preview",
}


def main(argv: Sequence[str]) -> int | None:
    command = argv[1] if len(argv) > 1 else None
    if command in ("--help", "-h"):
        say(__doc__.strip())
        return 0
    if command not in COMMANDS:
        what = "a command is missing" if command is None else f"{command!r} is not a command"
        raise ConfigError(f"{what}{did_you_mean(command or '', COMMANDS)}")
    return importlib.import_module(COMMANDS[command]).main(argv[1:])


if __name__ == "__main__":
    cli.run(main)
