"""Trains an image classifier.

    python -m flaxcls.main --config=configs/NAME.py [--workdir=DIR] [--config.batch_size=256 ...]

The same command with the same --workdir resumes the run. Fields and their defaults are in
flaxcls/config/tree.py; recipes are in configs/.
"""

import shlex
from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.config.recipes import load_recipe
from flaxcls.errors import ConfigError
from flaxcls.runs import run_code
from flaxcls.runtime import cluster
from flaxcls.runtime.output import printable

FLAGS = cli.common_flags("config")
flags.DEFINE_string(
    "workdir", None, "The run's folder; runs/NAME-<date-time> if not given.", flag_values=FLAGS
)
flags.DEFINE_string(
    "list",
    None,
    "Prints what there is of models, crops, augmentations, optimizers, schedules, losses, data or "
    "recipes, with options, defaults and ranges.",
    flag_values=FLAGS,
)
flags.DEFINE_bool(
    "report", True, "Writes report.html into the folder when the run has ended.", flag_values=FLAGS
)
flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT where process 0 listens, for several processes that no cluster introduces.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("num_processes", None, "How many processes there are.", flag_values=FLAGS)
flags.DEFINE_integer("process_id", None, "Which one this is, from 0.", flag_values=FLAGS)
flags.DEFINE_integer(
    "join_timeout",
    300,
    "Seconds to wait for the other processes at the start.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "heartbeat_timeout",
    60,
    "Seconds after which a silent process is taken for dead and the others end.",
    lower_bound=5,
    flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> int:
    overrides, argv = cli.split_overrides(argv)
    cli.parse(FLAGS, argv, __doc__)
    if FLAGS.list is not None:
        from flaxcls.build import listing  # JAX

        listing.write(FLAGS.list)
        return 0
    if not FLAGS.config:
        raise ConfigError("--config=FILE is missing, such as --config=configs/digits_cnn.py")

    problem = None
    try:
        workdir = cli.folder("workdir", FLAGS.workdir) if FLAGS.workdir else None
        if workdir:
            run_code.fall_back(workdir)
        recipe = load_recipe(FLAGS.config, overrides)
    except ConfigError as error:
        if FLAGS.num_processes is None and not cluster.is_joined_by_cluster():
            raise
        problem = error  # of this process alone, perhaps: the others have to learn of it

    # JAX takes seconds: not for --help
    from flaxcls.runs import goodput, metric_log, run_folder
    from flaxcls.runtime import compilation_cache, processes
    from flaxcls.training import train
    from flaxcls.training.recipe import completed

    processes.join(
        FLAGS.coordinator_address,
        FLAGS.num_processes,
        FLAGS.process_id,
        heartbeat=FLAGS.heartbeat_timeout,
        patience=FLAGS.join_timeout,
    )
    if problem:
        raise problem
    compilation_cache.enable()
    with processes.explain_lost_peer():
        config = completed(recipe, workdir)
        workdir = workdir or run_folder.new_folder(FLAGS.config)
        summary = train.train_config(config, workdir, goodput.process_age())
    run_flag = shlex.quote(f"--run={workdir}")
    processes.say(
        f"Finished after {summary['step']:,} steps and {summary['seconds']:.0f} s: "
        f"{metric_log.describe_end(summary)}\n{goodput.describe(summary['goodput'])}\n"
        f"The run is in {printable(workdir)}. Next:\n"
        f"  evaluate:  python -m flaxcls.evaluate {run_flag}\n"
        f"  predict:   python -m flaxcls.predict {run_flag} FILES\n"
        f"  resume:    the same command with {shlex.quote(f'--workdir={workdir}')} (this run is "
        "complete)"
    )
    if FLAGS.report and processes.is_first():
        from flaxcls.report.page import report_at_the_end

        processes.say(report_at_the_end(workdir))
    return 0


if __name__ == "__main__":
    cli.run(main)
