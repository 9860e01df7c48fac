"""Writes a page about a run: what was trained, how well, its mistakes, speed and config.

    python -m flaxcls.report --run=DIR [--out=FILE.html]
    python -m flaxcls.report --run=DIR --run=DIR2 [--out=FILE.html]

The file needs nothing besides itself. With several runs it compares them.
"""

from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.runtime.output import printable, write_result

FLAGS = cli.common_flags("data_dir")
flags.DEFINE_multi_string("run", None, "The run's folder; several are compared.", flag_values=FLAGS)
flags.DEFINE_string(
    "out",
    None,
    "The page; report.html in the run's folder if not given, comparison.html here for several.",
    flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> None:
    cli.parse(FLAGS, argv, __doc__)
    cli.check_run(FLAGS.run)
    if FLAGS.out:
        cli.check_folder("out", FLAGS.out, bucket=True)
    runs = [cli.folder("run", run) for run in FLAGS.run]

    from flaxcls.report.page import write_report
    from flaxcls.runtime import compilation_cache

    compilation_cache.enable()
    write_result(printable(write_report(runs, FLAGS.out, data_dir=FLAGS.data_dir)))


if __name__ == "__main__":
    cli.run(main)
