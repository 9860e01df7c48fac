"""Averages the weights of a run's checkpoints, or of several runs, into a new run.

    python -m flaxcls.average --run=DIR --out=NEW                      the checkpoints that it kept
    python -m flaxcls.average --run=A --run=B --run=C --out=NEW        the last one of each run
    python -m flaxcls.average --run=A --run=B --run=C --out=NEW --greedy --split='train[90%:]'

NEW is a run like any other for evaluate, predict, export and config.init_from. BatchNorm's
statistics are estimated anew on the training split. The runs need the same network, classes and
first weights, such as those of config.init_from. With --greedy only what doesn't make it worse is
taken, by a split that was held out: neither trained on nor the test split. See docs/knowing.md.
"""

from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError
from flaxcls.runtime.output import printable, write_result

FLAGS = cli.common_flags("data_dir")
flags.DEFINE_multi_string("run", [], "The folder of a run; several times.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder of the new run.", flag_values=FLAGS)
flags.DEFINE_string(
    "checkpoint",
    None,
    "Which of each run: last, best, a step, several (800,1000) or all; of a single run all.",
    flag_values=FLAGS,
)
flags.DEFINE_bool("greedy", False, "Take only what does not make it worse.", flag_values=FLAGS)
flags.DEFINE_string("split", None, "The split held out for --greedy.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> None:
    cli.parse(FLAGS, argv, __doc__)
    cli.check_run(FLAGS.run)
    if FLAGS.out is None:
        raise ConfigError("--out=DIR is missing; it will be made")
    if FLAGS.split is not None and not FLAGS.greedy:
        raise ConfigError("--split is for --greedy")

    from flaxcls.inference.averaging import average_runs
    from flaxcls.runs.metric_log import describe
    from flaxcls.runtime import compilation_cache

    compilation_cache.enable()
    averaged = average_runs(
        [cli.folder("run", run) for run in FLAGS.run],
        cli.folder("out", FLAGS.out),
        **cli.arguments(FLAGS, "run", "out"),
    )
    write_result(
        f"the mean of {len(averaged.members)}: {', '.join(map(str, averaged.members))}\n"
        f"{printable(FLAGS.out)}, step {averaged.step}, {averaged.split}: "
        f"{describe(averaged.results['eval'])}"
    )


if __name__ == "__main__":
    cli.run(main)
