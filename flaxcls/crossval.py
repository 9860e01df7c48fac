"""Cross-validates a recipe: k runs, each evaluated on the part that it was not trained on.

    python -m flaxcls.crossval --config=configs/NAME.py [--folds=5] [--workdir=DIR]
        [--groups=FILE.csv] [--config.batch_size=256 ...]

The same command with the same --workdir resumes: folds that have finished are left as they are.
DIR/fold_0 and so on are runs like any other; DIR/predictions.csv has what is said of each example.
"""

from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.config.recipes import load_recipe
from flaxcls.errors import ConfigError
from flaxcls.runs import run_code
from flaxcls.runtime.output import printable, write_result

FLAGS = cli.common_flags("config")
flags.DEFINE_string(
    "workdir", None, "The study's folder; runs/crossval-NAME-<date-time>.", flag_values=FLAGS
)
flags.DEFINE_integer("folds", 5, "How many there are.", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_string(
    "groups",
    None,
    "CSV with columns file,group or index,group: pictures of one group, such as a patient's, come "
    "to the same fold.",
    flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> None:
    overrides, argv = cli.split_overrides(argv)
    cli.parse(FLAGS, argv, __doc__)
    if not FLAGS.config:
        raise ConfigError("--config=FILE is missing, such as --config=configs/digits_cnn.py")
    workdir = cli.folder("workdir", FLAGS.workdir) if FLAGS.workdir else None
    if workdir:
        run_code.fall_back(workdir / "fold_0")
    if FLAGS.groups:
        overrides.append(f"data.fold_groups={FLAGS.groups}")
    recipe = load_recipe(FLAGS.config, overrides)

    from flaxcls.runs import goodput
    from flaxcls.runtime import compilation_cache
    from flaxcls.studies import crossval

    compilation_cache.enable()
    workdir = workdir or crossval.new_folder(FLAGS.config)
    config = crossval.complete(recipe, workdir)
    results = crossval.cross_validate(config, workdir, FLAGS.folds, age=goodput.process_age())
    write_result(f"{crossval.describe(results)}\nThe study is in {printable(workdir)}")


if __name__ == "__main__":
    cli.run(main)
