"""Finds the pictures of a folder that are most like others, to the eye of a saved run.

    python -m flaxcls.search --run=DIR --index=FOLDER FILES-or-FOLDERS... [--out=grid.png]

compares the inputs of the network's last layer, by their cosine similarity. Standard output has a
line for each of the --neighbors of every picture that is asked for: its file, the rank from 1, the
similarity and the neighbor's file, separated by tabs. A picture of FOLDER is no neighbor of itself.
--out draws them, each picture with its neighbors beside it.

What the network makes of FOLDER's pictures is kept in DIR/search, and computed again for pictures
that are new or have changed, and for another checkpoint. Pictures that can't be read are named on
standard error and skipped; the exit code is 45 then.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError, DataError
from flaxcls.runtime.output import printable, say, write_result

FLAGS = cli.common_flags("run", "checkpoint", "ema")
flags.DEFINE_string("index", None, "The folder to search, with all below it.", flag_values=FLAGS)
flags.DEFINE_integer("neighbors", 8, "How many for each.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("out", None, "A file for the picture, such as grid.png.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 64, "Images per batch.", lower_bound=1, flag_values=FLAGS)


def main(argv: Sequence[str]) -> None:
    arguments = cli.parse(FLAGS, argv, __doc__, others=True)
    cli.check_run(FLAGS.run)
    if FLAGS.index is None:
        raise ConfigError("--index=FOLDER is missing; it is the folder to search")
    if not os.path.isdir(FLAGS.index):
        raise ConfigError(f"--index={printable(FLAGS.index)} is not a folder")
    cli.check_pictures(arguments)
    if FLAGS.out:
        cli.check_png("out", FLAGS.out)

    from flaxcls.insight.search import draw, search
    from flaxcls.runtime import compilation_cache  # JAX, which takes seconds: not for --help

    compilation_cache.enable()
    unreadable = []

    def report(error: DataError) -> None:
        unreadable.append(error)
        say(f"flaxcls: {printable(str(error))}", error=True)

    predictor, found = search(
        cli.folder("run", FLAGS.run),
        FLAGS.index,
        indexed=cli.find_pictures([FLAGS.index]),
        asked=cli.find_pictures(arguments),
        report=report,
        **cli.arguments(FLAGS, "run", "index", "out"),
    )
    drawn = []
    for file, neighbors in found:
        for rank, neighbor in enumerate(neighbors, start=1):
            columns = printable(file), str(rank), f"{neighbor.similarity:.4f}"
            write_result("\t".join((*columns, printable(neighbor.file))))
        drawn.append((file, neighbors))
    if FLAGS.out and drawn:
        draw(predictor, drawn, Path(FLAGS.out))
    if unreadable:
        raise DataError(f"{len(unreadable):,} files could not be read; they are named above")


if __name__ == "__main__":
    cli.run(main)
