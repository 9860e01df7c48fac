"""Times a recipe's training step, its input or its augmentations, without training to the end.

    python -m flaxcls.bench [step|input|augment] --config=configs/NAME.py [--config.x=y ...]
                            [--json=FILE]

step     seconds of reading the data and of compiling, and the images/s of each round of --steps
         steps with its input; a round ends when the devices have finished.
input    images/s that the streaming input decodes, in total and per core; where the time goes; the
         decoder alone on the same bytes; and what a training loop waits for data whose model is
         --busy as fast as the input (0.8: the model is the bottleneck by a fifth).
augment  milliseconds per batch of every augmentation, each compiled alone.

Rounds are --rounds; one more comes first and is not counted. --json=FILE gets the figures with
their units, the config, versions and devices.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError, OutputError, did_you_mean
from flaxcls.runtime.output import printable

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "The recipe.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 20, "Steps per round.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "Measured rounds.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("busy", 0.8, "Speed of the model over the input's.", flag_values=FLAGS)
flags.DEFINE_string("json", None, "A file for all figures.", flag_values=FLAGS)

BENCHMARKS = ("step", "input", "augment")


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
    if FLAGS.json and not Path(FLAGS.json).absolute().parent.is_dir():
        raise ConfigError(f"--json={printable(FLAGS.json)} is in a folder that does not exist")
    config = cli.load_config(FLAGS.config, overrides)

    experiment, figures = _measure(what, config)
    if FLAGS.json:
        _write_json(Path(FLAGS.json), what, experiment, figures)


def _measure(what: str, config: Any) -> tuple[Any, dict[str, Any]]:
    """Runs a benchmark; returns the experiment and its figures."""
    from flaxcls import build  # JAX, which takes seconds: not for --help
    from flaxcls.perf import augmentations, input, step
    from flaxcls.perf.figures import Effort

    build.check(config)
    experiment = build.make_experiment(config, build.mesh(config))
    effort = Effort(FLAGS.steps, FLAGS.rounds)
    if what == "step":
        return experiment, step.bench_step(experiment, effort)
    if what == "input":
        return experiment, input.bench_input(experiment, effort, FLAGS.busy)
    return experiment, augmentations.bench_augment(experiment, effort)


def _write_json(path: Path, what: str, experiment: Any, figures: Any) -> None:
    from flaxcls.runs import run_folder

    content = {
        "benchmark": what,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "flags": {name: FLAGS[name].value for name in ("config", "steps", "rounds", "busy")},
        "figures": figures,
        "config": experiment.config,
        **run_folder.surroundings(),
    }
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise OutputError(
            f"--json={printable(path)} can't be written: {error.strerror or error}"
        ) from error


if __name__ == "__main__":
    cli.run(main)
