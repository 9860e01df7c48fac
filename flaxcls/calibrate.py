"""Fits what a saved run's answers are worth, and has predict and export use it.

    python -m flaxcls.calibrate --run=DIR [--coverage=0.9] [--per_class] [--risk=0.05]

fits, to data that was not trained on (the split that the run was evaluated on, or --split or
--source), and stores in the run's folder as calibration.json

  a temperature  that makes the probabilities as large as the network is right
  thresholds     of the probabilities: the classes above are a set that holds the right one for
                 --coverage of the pictures; --per_class: of the pictures of each class
  a confidence   below which the answer is "none of these", so that no more than --risk of the
                 answers that are given are wrong

A quarter of the examples is for the temperature, a half for the thresholds and the confidence, and
what is printed is measured on the last quarter. It holds for pictures like these. Another
checkpoint needs another calibration: until then predict says so and gives what the network gives.
"""

from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.runtime.output import printable, write_result

FLAGS = cli.common_flags(
    "run", "split", "checkpoint", "ema", "tta", "data_dir", "source", "classes"
)
flags.DEFINE_float("coverage", 0.9, "How often sets hold the right class.", flag_values=FLAGS)
flags.DEFINE_bool("per_class", False, "Whether for each class.", flag_values=FLAGS)
flags.DEFINE_float(
    "risk",
    None,
    "Share of wrong answers, at most; 0.05 if there are examples enough to promise that.",
    flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> None:
    cli.parse(FLAGS, argv, __doc__)
    cli.check_run(FLAGS.run)

    from flaxcls.insight.calibrate import calibrate_run, describe
    from flaxcls.runtime import compilation_cache

    compilation_cache.enable()
    found = calibrate_run(cli.folder("run", FLAGS.run), **cli.arguments(FLAGS, "run"))
    checkpoint = found.calibration.checkpoint.describe()
    write_result(
        f"{printable(FLAGS.run)}, {checkpoint}, by {describe(found)}\n"
        f"{printable(FLAGS.run)}/calibration.json is written; predict and export use it"
    )


if __name__ == "__main__":
    cli.run(main)
