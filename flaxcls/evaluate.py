"""Prints the exact metrics of a saved run.

    python -m flaxcls.evaluate --run=DIR [--split=test] [--checkpoint=last|best|STEP] [--knn=20]
        [--tta=NAME]
    python -m flaxcls.evaluate --run=DIR --detailed [--out=FOLDER]
    python -m flaxcls.evaluate --run=DIR --source=NAME-or-PATH [--classes=FILE.csv]
    python -m flaxcls.evaluate --run=A --run=B [--average=probabilities|logits]

needs the run's folder and the data, nothing else.

--detailed adds precision, recall and F1 of the classes, what the probabilities are worth and a
temperature for them, intervals and the most confident mistakes; --out=FOLDER makes a folder with
all of that, every prediction and the confusion matrix.

--source is other data: a folder, a .csv or .jsonl file or the name of a data set. Classes go by
their names, whatever their order, and may be fewer; --classes=FILE.csv has rows name,class for
those that the network calls otherwise, and an empty class leaves one's pictures out.

Several --run are an ensemble, whose answers are averaged, and the first two are compared.
"""

from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.runtime.output import printable, write_result

FLAGS = cli.common_flags("split", "checkpoint", "data_dir", "source", "classes", "average", "tta")
flags.DEFINE_multi_string("run", None, "The run's folder; several.", flag_values=FLAGS)
flags.DEFINE_bool("detailed", False, "Whether to say more than a line.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "A folder to make, for everything.", flag_values=FLAGS)
flags.DEFINE_bool(
    "ema", None, "Averaged parameters in the details, or not; the better ones.", flag_values=FLAGS
)
flags.DEFINE_string(
    "fit_split",
    None,
    "What the temperature is fitted on; one half of what is evaluated, measured on the other.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "knn",
    None,
    "Classify by so many nearest neighbors in the training split instead of by the head.",
    flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> None:
    cli.parse(FLAGS, argv, __doc__)
    cli.check_run(FLAGS.run)
    if FLAGS.out:
        cli.check_folder("out", FLAGS.out, bucket=True)

    from flaxcls.insight.evaluation import evaluate_runs
    from flaxcls.insight.tables import print_comparison, print_detailed
    from flaxcls.runs.metric_log import describe
    from flaxcls.runtime import compilation_cache

    compilation_cache.enable()
    runs = [cli.folder("run", run) for run in FLAGS.run]
    out = cli.folder("out", FLAGS.out) if FLAGS.out else None
    found = evaluate_runs(runs, out=out, **cli.arguments(FLAGS, "run", "out"))
    source = f"{printable(FLAGS.source)}, " if FLAGS.source else ""
    for name, row in found.results.items():
        of = f"{printable(FLAGS.run[0])}, step {found.step}, {source}{found.split}"
        of += "" if name == "eval" else f", {name}"
        of += f", {FLAGS.knn} nearest neighbors" if FLAGS.knn is not None else ""
        write_result(f"{of}: {describe(row)}")
    if len(runs) > 1:
        print_comparison(found.detailed)
    if FLAGS.detailed:
        print_detailed(found.detailed)
    if out:
        write_result(f"{printable(out)} is written")


if __name__ == "__main__":
    cli.run(main)
