"""Draws where in pictures a saved run sees what it says of them.

    python -m flaxcls.explain --run=DIR FILES-or-FOLDERS... [--method=gradcam] [--class=NAME]

writes a PNG for every picture into the folder --out: the picture as the network is shown it, beside
it the same with the heat that speaks for the class over it, and the best classes with their
probabilities. Standard output has a line for every picture: its file, the class that is explained,
its probability, and the PNG. The class is the one that is predicted, or --class. Methods:

  gradcam               the last map of the network, coarse and robust; for networks with maps
  hirescam              the same for networks that tell places apart, without a global mean
  integrated_gradients  each pixel's part, for or against, in the logit's difference to that of a
                        blank image; the parts add up to it, within 1 % where they can
  smoothgrad            pixels that the logit changes with, of the mean of 32 noisy copies
  saliency              the same of the picture alone: fast, and noisy
  occlusion             by how much the logit falls when a square is hidden
  attention_rollout     what attention brings to the answer; for vit, the same for every class

A heat map shows what the answer depends on, not why, and not that it is right. Pictures that can't
be read are named on standard error and skipped; the exit code is 45 then.
"""

import itertools
from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError, DataError
from flaxcls.runtime.output import printable, say, write_result

METHODS = (
    "gradcam",
    "hirescam",
    "integrated_gradients",
    "smoothgrad",
    "saliency",
    "occlusion",
    "attention_rollout",
)
FLAGS = cli.common_flags("run", "checkpoint", "ema")
flags.DEFINE_enum("method", "gradcam", METHODS, "How.", flag_values=FLAGS)
flags.DEFINE_string("class", None, "The class to explain.", flag_values=FLAGS)
flags.DEFINE_string("out", "explanations", "The folder for the PNGs.", flag_values=FLAGS)
flags.DEFINE_integer("batch_size", 16, "Images per batch.", lower_bound=1, flag_values=FLAGS)


def main(argv: Sequence[str]) -> None:
    arguments = cli.parse(FLAGS, argv, __doc__, others=True)
    cli.check_run(FLAGS.run)
    cli.check_pictures(arguments)
    files = cli.find_pictures(arguments)
    first = list(itertools.islice(files, FLAGS.batch_size))
    if not first:
        raise ConfigError(f"there are no pictures in {', '.join(arguments)}")

    from flaxcls.insight.explainer import explain_files
    from flaxcls.runtime import compilation_cache  # JAX, which takes seconds: not for --help

    compilation_cache.enable()
    unreadable = []

    def report(error: DataError) -> None:
        unreadable.append(error)
        say(f"flaxcls: {printable(str(error))}", error=True)

    explained = explain_files(
        cli.folder("run", FLAGS.run),
        itertools.chain(first, files),
        class_name=FLAGS["class"].value,
        out=cli.folder("out", FLAGS.out),
        report=report,
        batch_size=len(first),
        **cli.arguments(FLAGS, "run", "class", "out", "batch_size"),
    )
    count = 0
    for file, explanation, png in explained:
        count += 1
        probability = explanation.prediction.probabilities[explanation.class_name]
        columns = printable(file), printable(explanation.class_name), f"{probability:.4f}"
        write_result("\t".join((*columns, printable(png))))
        if note := explanation.note():
            say(f"note: {printable(file)}: {note}", error=True)
    if unreadable:
        raise DataError(
            f"{len(unreadable):,} of {len(unreadable) + count:,} files could not be read; "
            "they are named above"
        )


if __name__ == "__main__":
    cli.run(main)
