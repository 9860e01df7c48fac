"""Attacks a saved run: its accuracy on adversarial images.

    python -m flaxcls.attack --run=DIR [--norm=linf|l2] [--eps=8/255] [--method=fgsm|pgd|apgd]

needs the run's folder and the data. eps is in units of [0, 1], before the normalisation. apgd is
AutoAttack's APGD with the cross-entropy and then with the targeted DLR loss. Each method begins
with those before it and attacks further what they have left, so that no stronger method reports a
higher accuracy. Intervals are Wilson's, of 95 %. --out=FOLDER is made, for the adversarial images
and a table; an image of 8 bits is not quite what was found, so that the accuracy after rounding is
printed, too.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError
from flaxcls.runtime.output import printable, say, write_result

FLAGS = flags.FlagValues()
flags.DEFINE_string("run", None, "The run's folder.", flag_values=FLAGS)
flags.DEFINE_string("method", "apgd", "The attack: fgsm, pgd or apgd.", flag_values=FLAGS)
flags.DEFINE_string("norm", "linf", "Of the change of an image: linf or l2.", flag_values=FLAGS)
flags.DEFINE_string("eps", "8/255", "The largest change, in units of [0, 1].", flag_values=FLAGS)
flags.DEFINE_integer("steps", None, "Of pgd, 20, and of apgd, 100.", flag_values=FLAGS)
flags.DEFINE_integer("restarts", 1, "From other random images.", flag_values=FLAGS)
flags.DEFINE_integer("examples", 1000, "How many of the split, at random.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of all that is random.", flag_values=FLAGS)
flags.DEFINE_string("split", None, "The split; the run's own if not given.", flag_values=FLAGS)
flags.DEFINE_string("checkpoint", "last", "Which one: last, best or a step.", flag_values=FLAGS)
flags.DEFINE_bool("ema", None, "Averaged parameters, or not; the better ones.", flag_values=FLAGS)
flags.DEFINE_string("data_dir", None, "Where the data is, if it has moved.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder to make, for images and table.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> None:
    cli.parse(FLAGS, argv, __doc__)
    if FLAGS.run is None:
        raise ConfigError("--run=DIR is missing; it is the folder that training made")

    from flaxcls.insight.robustness import attack_run
    from flaxcls.runtime import compilation_cache

    compilation_cache.enable()
    result = attack_run(
        cli.local_folder("run", FLAGS.run),
        norm=FLAGS.norm,
        eps=FLAGS.eps,
        method=FLAGS.method,
        steps=FLAGS.steps,
        restarts=FLAGS.restarts,
        examples=FLAGS.examples,
        seed=FLAGS.seed,
        split=FLAGS.split,
        checkpoint=FLAGS.checkpoint,
        ema=FLAGS.ema,
        data_dir=FLAGS.data_dir,
        out=FLAGS.out and cli.local_folder("out", FLAGS.out),
        alive=lambda text: say(text, error=True),
    )
    write_result(f"{printable(FLAGS.run)}, {describe(result)}")
    if FLAGS.out:
        write_result(f"{printable(FLAGS.out)} is written")


def describe(result: dict[str, Any]) -> str:
    """What `attack_run` has found, in lines."""
    lines = [
        f"step {result['step']}, {result['weights']}, {result['split']}: {result['count']:,} of "
        f"{result['size']:,} examples, {result['norm']} up to {result['eps']:.6g}"
    ]
    intervals = {"clean": result["clean_interval"]}
    intervals[[*result["accuracies"]][-1]] = result["interval"]
    for name, accuracy in result["accuracies"].items():
        line = f"{name:10} accuracy {accuracy:7.2%}"
        if name in intervals:
            low, high = intervals[name]
            line += f", 95 % interval {low:.2%} to {high:.2%}"
        lines.append(line)
    lines.append(f"{'rounded':10} accuracy {result['rounded']:7.2%}, of the images in 8 bits")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
