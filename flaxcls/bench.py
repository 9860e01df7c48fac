"""Times a recipe: its training step, input, whole loop, start, evaluation or augmentations.

    python -m flaxcls.bench [step|input|train|startup|eval|augment] --config=configs/NAME.py
                            [--config.x=y ...] [--fake] [--json=FILE]

step     seconds of reading the data, initialising and compiling; images/s of rounds of --steps
         steps with their input; milliseconds of a step, of waiting for its input, of computing it
         and of dispatching it; FLOPs an image, their share of the devices' peak; peak memory.
input    images/s that the streaming input decodes, in total and per core; where the time goes; the
         decoder alone on the same bytes; and what a training loop waits for data whose model is
         --busy as fast as the input (0.8: the model is the bottleneck by a fifth).
train    the real loop, with its log, evaluation and checkpoints in a temporary folder: images/s
         between log steps and as a whole, where the time goes, and what the loop itself takes.
startup  seconds from the start of `python -m flaxcls.main` to each stage up to the first step, with
         nothing compiled before and a second time.
eval     images/s of the evaluation with its input.
augment  milliseconds per batch of every augmentation, each compiled alone; per image of those of
         the recipe that the host does.

Rounds are --rounds; one more comes first and is not counted, but for startup. A round ends when
the devices have finished. --fake takes made-up images of the recipe's size, for step, train and
eval. --json=FILE gets the figures with their units, the config, versions and devices.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError, did_you_mean

FLAGS = cli.common_flags("config")
flags.DEFINE_integer("steps", 20, "Steps per round.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "Measured rounds.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("busy", 0.8, "Speed of the model over the input's.", flag_values=FLAGS)
flags.DEFINE_boolean("fake", False, "Made-up images, not the recipe's.", flag_values=FLAGS)
flags.DEFINE_float(
    "peak_tflops",
    None,
    "What a device can do at most, in TFLOP/s, where it is not known.",
    lower_bound=1e-6,
    flag_values=FLAGS,
)
flags.DEFINE_string("json", None, "A file for all figures.", flag_values=FLAGS)

BENCHMARKS = ("step", "input", "train", "startup", "eval", "augment")
RECORDED = ("config", "steps", "rounds", "busy", "fake", "peak_tflops")  # of the flags
ON_FAKE_DATA = ("step", "train", "eval")


def main(argv: Sequence[str]) -> None:
    overrides, argv = cli.split_overrides(argv)
    what = "step"
    if len(argv) > 1 and not argv[1].startswith("-"):
        what = argv.pop(1)
    cli.parse(FLAGS, argv, __doc__)
    if what not in BENCHMARKS:
        raise ConfigError(f"there is no benchmark {what!r}{did_you_mean(what, BENCHMARKS)}")
    if FLAGS.config is None:
        raise ConfigError("--config=FILE is missing, such as --config=configs/digits_cnn.py")
    if FLAGS.fake and what not in ON_FAKE_DATA:
        raise ConfigError(f"--fake is for {', '.join(ON_FAKE_DATA)}, not for {what}")
    if FLAGS.json:
        cli.check_folder("json", FLAGS.json)
    config = cli.load_config(FLAGS.config, overrides)

    experiment, figures = _measure(what, config, overrides)
    if FLAGS.json:
        from flaxcls.perf.figures import write_json

        given = {name: FLAGS[name].value for name in RECORDED}
        write_json(Path(FLAGS.json), what, given, figures=figures, config=experiment.config)


def _measure(what: str, config: Any, overrides: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Runs a benchmark; returns the experiment and its figures."""
    from flaxcls import build  # JAX, which takes seconds: not for --help
    from flaxcls.perf import augmentations, evaluation, input, startup, step, train
    from flaxcls.perf.figures import Effort
    from flaxcls.perf.made_up import made_up

    build.check(config)
    effort = Effort(FLAGS.steps, FLAGS.rounds)
    if what == "startup":  # before this process holds the devices
        figures = startup.bench_startup(FLAGS.config, overrides, FLAGS.rounds)
        return build.make_experiment(config, build.mesh(config)), figures
    if FLAGS.fake:
        config = made_up(config)
    if what == "train":
        config = train.timing_config(config, effort, fake=FLAGS.fake)
    experiment = build.make_experiment(config, build.mesh(config))
    if what == "step":
        figures = step.bench_step(experiment, effort, FLAGS.peak_tflops)
    elif what == "input":
        figures = input.bench_input(experiment, effort, FLAGS.busy)
    elif what == "train":
        figures = train.bench_train(experiment, effort)
    elif what == "eval":
        figures = evaluation.bench_eval(experiment, effort)
    else:
        figures = augmentations.bench_augment(experiment, effort)
    return experiment, figures


if __name__ == "__main__":
    cli.run(main)
