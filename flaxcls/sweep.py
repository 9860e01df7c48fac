"""Trains a recipe with many values of its fields, and makes one table of the results.

    python -m flaxcls.sweep --config=configs/NAME.py --grid optimizer.learning_rate=0.1,0.3
        [--grid model.name=resnet18,resnet34 ...] [--workdir=DIR] [--jobs=N] [--config.x=y ...]

    python -m flaxcls.sweep --config=configs/NAME.py --optuna=20
        --search optimizer.learning_rate=1e-3..1e-1:log [--search model.name=... ...]

tries all combinations, or so many that Optuna chooses, ending early those that others are better
than. Each trial is a run in DIR. The same command with the same --workdir resumes; a trial that
fails does not end the others. The exit code is 0 if none has failed, 42 if one wants to be
restarted, else what all of those that failed ended with, or 1 where they differ.
"""

from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError
from flaxcls.runtime.output import printable, write_result

FLAGS = cli.common_flags("config")
flags.DEFINE_multi_string(
    "grid", [], "FIELD=VALUE,VALUE,...; once for each field.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "optuna", None, "How many trials Optuna chooses, in all.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "search",
    [],
    "Where Optuna looks: FIELD=LOW..HIGH, FIELD=LOW..HIGH:log or FIELD=VALUE,VALUE,...",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "workdir", None, "The sweep's folder; runs/sweep-NAME-<date-time>.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "jobs",
    1,
    "Trials at a time; each gets its share of the GPUs.",
    lower_bound=1,
    flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> int:
    overrides, argv = cli.split_overrides(argv)
    cli.parse(FLAGS, argv, __doc__)
    if not FLAGS.config:
        raise ConfigError("--config=FILE is missing, such as --config=configs/digits_cnn.py")
    if FLAGS.optuna is None and not FLAGS.grid:
        raise ConfigError(
            "--grid FIELD=VALUE,VALUE is missing, such as --grid optimizer.learning_rate=0.1,0.3"
        )
    if bool(FLAGS.optuna) != bool(FLAGS.search) or (FLAGS.optuna and FLAGS.grid):
        raise ConfigError("--optuna=COUNT and --search FIELD=LOW..HIGH go together, without --grid")

    from flaxcls.report.page import report_at_the_end
    from flaxcls.studies import sweep
    from flaxcls.studies.optuna_search import sweep_optuna

    workdir = (
        cli.folder("workdir", FLAGS.workdir) if FLAGS.workdir else sweep.new_folder(FLAGS.config)
    )
    common = {"overrides": overrides, "jobs": FLAGS.jobs}
    if FLAGS.optuna:
        results = sweep_optuna(FLAGS.config, FLAGS.search, workdir, FLAGS.optuna, **common)
    else:
        results = sweep.sweep_grid(FLAGS.config, FLAGS.grid, workdir, **common)
    sweep.show(results)
    write_result(f"The sweep is in {printable(workdir)}")
    runs = [workdir / row["name"] for row in results["trials"] if row["status"] == "finished"]
    if len(runs) > 1:
        write_result(report_at_the_end(runs, workdir / "report.html"))
    return sweep.exit_code(results)


if __name__ == "__main__":
    cli.run(main)
