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

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError
from flaxcls.runtime.output import printable, write_result

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string("run", None, "The run's folder; several.", flag_values=FLAGS)
flags.DEFINE_string("split", None, "The split; the run's own if not given.", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "Which one: last, best or a step.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "Where the data is, if it has moved.", flag_values=FLAGS)
flags.DEFINE_string("source", None, "Other data: a name or a path.", flag_values=FLAGS)
flags.DEFINE_string("classes", None, "A CSV: what --source calls classes.", flag_values=FLAGS)
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
flags.DEFINE_enum(
    "average",
    "probabilities",
    ("probabilities", "logits"),
    "What of several runs is averaged.",
    flag_values=FLAGS,
)
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
    cli.check_run(FLAGS.run)
    in_depth = FLAGS.detailed or FLAGS.out or len(FLAGS.run) > 1
    if FLAGS.knn is not None and (in_depth or FLAGS.source):
        raise ConfigError("--knn is of one run and its own data, and has no details")
    if FLAGS.knn is not None and FLAGS.tta is not None:
        raise ConfigError("--tta averages logits, of which --knn has none: give one of the two")
    if FLAGS.out:
        cli.check_folder("out", FLAGS.out)

    from flaxcls.runtime import compilation_cache
    from flaxcls.runtime.new_folder import new_folder

    compilation_cache.enable()
    with contextlib.ExitStack() as stack:
        out = cli.local_folder("out", FLAGS.out) if FLAGS.out else None
        folder = stack.enter_context(new_folder(out)) if out else None
        if len(FLAGS.run) == 1:
            _print_metrics(FLAGS.run[0])
        if in_depth:
            _print_in_depth(folder)
    if out:
        write_result(f"{printable(out)} is written")


def _flags(*names: str) -> dict[str, Any]:
    return {name: FLAGS[name].value for name in names}


def _print_metrics(run: str) -> None:
    from flaxcls.inference.evaluator import evaluate_run
    from flaxcls.inference.neighbors import knn_run
    from flaxcls.runs.metric_log import describe

    if FLAGS.knn is not None:
        evaluate = partial(knn_run, neighbors=FLAGS.knn)
    else:
        evaluate = partial(evaluate_run, **_flags("source", "classes", "tta"))
    step, split, results = evaluate(
        cli.local_folder("run", run), **_flags("split", "checkpoint", "data_dir")
    )
    source = f"{printable(FLAGS.source)}, " if FLAGS.source else ""
    for name, row in results.items():
        weights = "" if name == "eval" else f", {name}"
        weights += f", {FLAGS.knn} nearest neighbors" if FLAGS.knn is not None else ""
        write_result(f"{printable(run)}, step {step}, {source}{split}{weights}: {describe(row)}")


def _print_in_depth(folder: Path | None) -> None:
    from flaxcls.insight.detailed import evaluate_in_depth
    from flaxcls.insight.tables import print_comparison, print_detailed
    from flaxcls.insight.written import write_detailed
    from flaxcls.runtime.new_folder import written

    found = evaluate_in_depth(
        [cli.local_folder("run", run) for run in FLAGS.run],
        **_flags("split", "checkpoint", "data_dir", "source", "classes", "tta"),
        **_flags("ema", "average", "fit_split"),
    )
    if folder:
        with written(Path(FLAGS.out)):
            write_detailed(found, folder)
    if len(FLAGS.run) > 1:
        print_comparison(found)
    if FLAGS.detailed:
        print_detailed(found)


if __name__ == "__main__":
    cli.run(main)
