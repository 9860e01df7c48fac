"""Prints the exact metrics of a saved run.

    python -m flaxcls.evaluate --run=DIR [--split=test] [--checkpoint=last|best|STEP] [--knn=20]
        [--tta=NAME]

needs the run's folder and the data, nothing else.
"""

from collections.abc import Sequence
from functools import partial

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError
from flaxcls.runtime.output import printable, write_result

FLAGS = flags.FlagValues()
flags.DEFINE_string("run", None, "The run's folder.", flag_values=FLAGS)
flags.DEFINE_string("split", None, "The split; the run's own if not given.", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "Which one: last, best or a step.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "Where the data is, if it has moved.", flag_values=FLAGS)
flags.DEFINE_integer(
    "knn",
    None,
    "Classify by so many nearest neighbors in the training split instead of by the head.",
    flag_values=FLAGS,
)


flags.DEFINE_string(
    "tta",
    None,
    "Test-time augmentation, such as flip, or none; the run's own if not given.",
    flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> None:
    cli.parse(FLAGS, argv, __doc__)
    if FLAGS.run is None:
        raise ConfigError("--run=DIR is missing; it is the folder that training made")
    if FLAGS.knn is not None and FLAGS.tta is not None:
        raise ConfigError("--tta averages logits, of which --knn has none: give one of the two")

    from flaxcls.inference.evaluator import evaluate_run
    from flaxcls.inference.neighbors import knn_run
    from flaxcls.runs.metric_log import describe
    from flaxcls.runtime import compilation_cache

    compilation_cache.enable()
    if FLAGS.knn is None:
        evaluate = partial(evaluate_run, tta=FLAGS.tta)
    else:
        evaluate = partial(knn_run, neighbors=FLAGS.knn)
    step, split, results = evaluate(
        cli.local_folder("run", FLAGS.run),
        split=FLAGS.split,
        checkpoint=FLAGS.checkpoint,
        data_dir=FLAGS.data_dir,
    )
    for name, row in results.items():
        weights = "" if name == "eval" else f", {name}"
        weights += f", {FLAGS.knn} nearest neighbors" if FLAGS.knn is not None else ""
        write_result(f"{printable(FLAGS.run)}, step {step}, {split}{weights}: {describe(row)}")


if __name__ == "__main__":
    cli.run(main)
