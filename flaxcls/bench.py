"""Times the training step of a recipe, without training to the end.

    python -m flaxcls.bench --config=configs/NAME.py [--steps=20] [--rounds=5] [--config.x=y ...]

Prints the seconds of reading the data and of compiling, and the images/s of each round of steps,
with the median; a round ends when the devices have finished.
"""

import statistics
import time
from collections.abc import Sequence

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "The recipe.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 20, "Steps a round.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "Rounds; one more comes first.", lower_bound=1, flag_values=FLAGS)


def main(argv: Sequence[str]) -> None:
    overrides, argv = cli.split_overrides(argv)
    cli.parse(FLAGS, argv, __doc__)
    if FLAGS.config is None:
        raise ConfigError("--config=FILE is missing, such as --config=configs/digits_cnn.py")
    config = cli.load_config(FLAGS.config, overrides)

    import jax

    from flaxcls import build, sharding
    from flaxcls.train import Trainer, mesh_for

    build.check(config)
    start = time.perf_counter()
    mesh = mesh_for(config)
    trainer = Trainer(config, build.plan(config), mesh)
    print(f"{sharding.describe(mesh)}, jax {jax.__version__}")
    print(f"data read in {time.perf_counter() - start:.1f} s")
    state = trainer.init()
    print(f"compiled in {trainer.compile():.1f} s")

    rates, step = [], 0
    for _ in range(FLAGS.rounds + 1):
        start = time.perf_counter()
        for _ in range(FLAGS.steps):
            state = trainer.update(state, trainer.batch(step))
            step += 1
        jax.block_until_ready(state)
        rates.append(config.batch_size * FLAGS.steps / (time.perf_counter() - start))
    rates = rates[1:]  # the first round warms up
    print("images/s: " + ", ".join(f"{rate:,.0f}" for rate in rates))
    print(f"median {statistics.median(rates):,.0f} images/s")


if __name__ == "__main__":
    cli.run(main)
