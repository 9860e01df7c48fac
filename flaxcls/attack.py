"""Attacks a saved run: its accuracy on adversarial or corrupted images.

    python -m flaxcls.attack --run=DIR [--norm=linf|l2] [--eps=8/255] [--method=fgsm|pgd|apgd]
    python -m flaxcls.attack --run=DIR --corruptions

needs the run's folder and the data. eps is in units of [0, 1], before the normalisation. apgd is
AutoAttack's APGD with the cross-entropy and then with the targeted DLR loss. Each method begins
with those before it and attacks further what they have left, so that no stronger method reports a
higher accuracy. Intervals are Wilson's, of 95 %. --out=FOLDER is made, for the adversarial images
and a table; an image of 8 bits is not quite what was found, so that the accuracy after rounding is
printed, too.

--corruptions makes no attack: it prints the accuracy under noise, blur, weather and the like, the
fifteen kinds of CIFAR-10-C and ImageNet-C at five severities.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError
from flaxcls.runtime.output import printable, say, write_result

FLAGS = cli.common_flags("run", "split", "checkpoint", "ema", "data_dir")
flags.DEFINE_string("method", "apgd", "The attack: fgsm, pgd or apgd.", flag_values=FLAGS)
flags.DEFINE_string("norm", "linf", "Of the change of an image: linf or l2.", flag_values=FLAGS)
flags.DEFINE_string("eps", "8/255", "The largest change, in units of [0, 1].", flag_values=FLAGS)
flags.DEFINE_integer("steps", None, "Of pgd, 20, and of apgd, 100.", flag_values=FLAGS)
flags.DEFINE_integer("restarts", 1, "From other random images.", flag_values=FLAGS)
flags.DEFINE_bool("corruptions", False, "Corrupt images, not attack.", flag_values=FLAGS)
flags.DEFINE_integer("examples", 1000, "How many of the split, at random.", flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of all that is random.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder to make, for images and table.", flag_values=FLAGS)
OF_ATTACKS = ("norm", "eps", "method", "steps", "restarts")


def main(argv: Sequence[str]) -> None:
    cli.parse(FLAGS, argv, __doc__)
    cli.check_run(FLAGS.run)

    if FLAGS.corruptions and FLAGS.out:
        raise ConfigError("--out is for adversarial images; --corruptions writes none")

    from flaxcls.insight.corrupted import corrupt_run
    from flaxcls.insight.robustness import attack_run
    from flaxcls.runtime import compilation_cache

    compilation_cache.enable()
    run, alive = cli.folder("run", FLAGS.run), partial(say, error=True)
    others = ("run", "out", "corruptions")
    if FLAGS.corruptions:
        given = cli.arguments(FLAGS, *others, *OF_ATTACKS)
        result = corrupt_run(run, alive=alive, **given)
        write_result(f"{printable(FLAGS.run)}, {describe_corruptions(result)}")
        return
    result = attack_run(
        run,
        out=FLAGS.out and cli.folder("out", FLAGS.out),
        alive=alive,
        **cli.arguments(FLAGS, *others),
    )
    write_result(f"{printable(FLAGS.run)}, {describe(result)}")
    if FLAGS.out:
        write_result(f"{printable(FLAGS.out)} is written")


def describe(result: dict[str, Any]) -> str:
    """What `attack_run` has found, in lines."""
    lines = [f"{_examples(result)}, {result['norm']} up to {result['eps']:.6g}"]
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


def describe_corruptions(result: dict[str, Any]) -> str:
    """What `corrupt_run` has found, as a table."""
    low, high = result["clean_interval"]
    lines = [
        _examples(result),
        f"clean accuracy {result['clean']:.2%}, 95 % interval {low:.2%} to {high:.2%}",
        f"{'severity':18}" + "".join(f"{number:9}" for number in range(1, 6)) + "     mean",
    ]
    for name, accuracies in result["corruptions"].items():
        row = [*accuracies, sum(accuracies) / len(accuracies)]
        lines.append(f"{name:18}" + "".join(f"{accuracy:9.2%}" for accuracy in row))
    lines.append(f"mean corruption accuracy {result['mean']:.2%}")
    return "\n".join(lines)


def _examples(result: dict[str, Any]) -> str:
    return (
        f"step {result['step']}, {result['weights']}, {result['split']}: {result['count']:,} of "
        f"{result['size']:,} examples"
    )


if __name__ == "__main__":
    cli.run(main)
