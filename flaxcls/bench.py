"""Times a recipe's training step, its input or its augmentations, without training to the end.

    python -m flaxcls.bench [step|input|augment] --config=configs/NAME.py [--config.x=y ...]

step     seconds of reading the data and of compiling, and the images/s of each round of --steps
         steps with its input; a round ends when the devices have finished.
input    images/s that the streaming input decodes, all in all and a core; where the time goes; the
         decoder alone on the same bytes; and what a training loop waits for data whose model is
         --busy as fast as the input (0.8: the model is the bottleneck by a fifth).
augment  milliseconds a batch of every augmentation, each compiled alone.

Rounds are --rounds; one more comes first and is not counted.
"""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError, did_you_mean

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "The recipe.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 20, "Steps a round.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "Rounds that count.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("busy", 0.8, "Speed of the model over the input's.", flag_values=FLAGS)


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
    config = cli.load_config(FLAGS.config, overrides)

    from flaxcls import build
    from flaxcls.trainer import mesh_for

    build.check(config)
    mesh = mesh_for(config)
    BENCHMARKS[what](config, mesh)


def bench_step(config: Any, mesh: Any) -> None:
    """The training step with its input."""
    import jax

    from flaxcls import build, sharding
    from flaxcls.trainer import Trainer

    start = time.perf_counter()
    trainer = Trainer(config, build.plan(config, mesh), mesh)
    print(f"{sharding.describe(mesh)}, jax {jax.__version__}")
    print(f"data read in {time.perf_counter() - start:.1f} s")
    state = trainer.init()
    print(f"compiled in {trainer.compile():.1f} s")
    with trainer:
        batches = trainer.batches(0, (FLAGS.rounds + 1) * FLAGS.steps)

        def steps() -> int:
            nonlocal state
            for _ in range(FLAGS.steps):
                state = trainer.update(state, next(batches))
            jax.block_until_ready(state)
            return config.batch_size * FLAGS.steps

        _print_rates(_rates(steps))


def step_rate(config: Any, mesh: Any, *, image_size: int, num_classes: int) -> float:
    """Images/s of a recipe's training step on made-up images; compiling it takes some seconds."""
    import jax

    from flaxcls import build
    from flaxcls.trainer import Trainer

    config = config.copy_and_resolve_references()
    channels = config.data.channels or 3
    for section in (config.data, config.crop, config.eval.crop):
        for field in section:
            section[field] = None
    config.data.name, config.data.train_split, config.data.eval_split = "fake", "train", "test"
    config.data.image_shape = (image_size, image_size, channels)
    config.data.num_classes, config.data.num_examples = num_classes, 2 * config.batch_size
    config.image_size = config.eval.image_size = None
    config.duration, config.schedule.warmup = "3 steps", None
    build.check(config)
    trainer = Trainer(config, build.plan(config, mesh), mesh)
    trainer.compile()
    with trainer:
        state = trainer.init()
        seconds = []
        for batch in trainer.batches(0, 3):
            start = time.perf_counter()
            state = jax.block_until_ready(trainer.update(state, batch))
            seconds.append(time.perf_counter() - start)
    return config.batch_size / min(seconds)


def bench_input(config: Any, mesh: Any) -> None:
    """The streaming input, whatever config.input.mode says."""
    import jax

    from flaxcls import build, inputs, sharding
    from flaxcls.data.decode import available_cores
    from flaxcls.data.order import evenly_spaced

    config.input.mode = "stream"
    plan = build.plan(config, mesh)
    source, cores = plan.train_source, available_cores()
    stream = inputs.training(config, source, plan.image_sizes)
    name = type(stream.loader.transform).__name__ if stream.loader.transform else "no transform"
    size = plan.image_sizes(0)
    print(f"{source.name} '{source.split}', {len(source):,} images; {name}, size {size}")
    print(f"{stream.describe()}; {cores} cores")

    indices = evenly_spaced(len(source), 200)
    seconds = _stages(stream, indices, size)
    batch = stream.batch(0)
    start = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(sharding.split_batch(mesh, batch))
    seconds["transfer"] = (time.perf_counter() - start) / 5 / config.batch_size
    total = sum(seconds.values())
    print(
        f"one image on one thread takes {1e3 * total:.3f} ms: "
        + ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in seconds.items())
    )
    print(f"decoder alone, the same bytes: {_decoder_rate(stream, indices):,.0f} images/s")

    batches = sharding.prefetch(mesh, stream.batches(0, 10**9))
    waits, peaks = [], []  # of every round

    def round_of(model_seconds: float = 0.0) -> int:
        begin, waited = time.perf_counter(), 0.0
        for _ in range(FLAGS.steps):
            start = time.perf_counter()
            jax.block_until_ready(next(batches))
            waited += time.perf_counter() - start
            time.sleep(model_seconds)
        waits.append(waited / (time.perf_counter() - begin))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return config.batch_size * FLAGS.steps

    rates = _rates(round_of)
    _print_rates(rates)
    rate = statistics.median(rates)
    print(f"that is {rate / cores:,.0f} images/s a core")
    print(
        f"peak memory of the process: {peaks[0]:,.0f} MiB after {FLAGS.steps:,} batches, "
        f"{peaks[-1]:,.0f} MiB after {FLAGS.steps * len(peaks):,}"
    )
    _rates(lambda: round_of(config.batch_size / (rate * FLAGS.busy)))
    wait = statistics.median(waits[-FLAGS.rounds :])
    print(f"a model of {rate * FLAGS.busy:,.0f} images/s waits {100 * wait:.1f} % of the time")
    batches.close()
    stream.close()


def _stages(stream: Any, indices: Sequence[int], size: int | None) -> dict[str, float]:
    """Seconds an image of reading, decoding, and cropping and resizing, on one thread."""
    loader, decoding = stream.loader, 0.0
    draws = [0.5] * loader.draws

    class TimedPicture:
        """A picture that tells how long its pixels took."""

        def __init__(self, picture: Any):
            self._picture, self.height, self.width = picture, picture.height, picture.width

        def pixels(self, *arguments: Any) -> Any:
            return self._timed(self._picture.pixels, *arguments)

        def part(self, *arguments: Any) -> Any:
            return self._timed(self._picture.part, *arguments)

        def _timed(self, function: Callable, *arguments: Any) -> Any:
            nonlocal decoding
            start = time.perf_counter()
            pixels = function(*arguments)
            decoding += time.perf_counter() - start
            return pixels

    reading = making = 0.0
    for index in indices:
        start = time.perf_counter()
        example = loader.source[index]
        read = time.perf_counter()
        picture = TimedPicture(loader.picture(example.image, index))
        if loader.transform:
            loader.transform(picture, size, draws)
        else:
            picture.pixels()
        making += time.perf_counter() - read
        reading += read - start
    count = len(indices)
    return {
        "read": reading / count,
        "decode": decoding / count,
        "crop and resize": (making - decoding) / count,
    }


def _decoder_rate(stream: Any, indices: Sequence[int]) -> float:
    """Images/s of nothing but decoding whole pictures, in as many threads as there are cores."""
    from concurrent.futures import ThreadPoolExecutor

    from flaxcls.data.decode import available_cores

    loader = stream.loader
    examples = [(loader.source[index].image, index) for index in indices]

    with ThreadPoolExecutor(available_cores()) as threads:

        def decode_all() -> int:
            list(threads.map(lambda example: loader.picture(*example).pixels(), examples))
            return len(examples)

        return statistics.median(_rates(decode_all))


def bench_augment(config: Any, mesh: Any) -> None:
    """Every augmentation on a batch of the recipe's size, and the recipe's own list."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flaxcls import augment, build, inputs, sharding

    plan = build.plan(config, mesh)
    shape = inputs.image_shape(plan.train_source, plan.image_sizes(0))
    count, classes = config.batch_size, len(plan.train_source.class_names)
    random = np.random.default_rng(0)
    batch = {
        "image": random.integers(0, 256, (count, *shape), np.uint8),
        "label": np.eye(classes, dtype=np.float32)[np.arange(count) % classes],
        "index": np.arange(count, dtype=np.int32),
        "epoch": np.zeros(count, np.int32),
    }
    batch = sharding.split_batch(mesh, batch)
    ones = (1.0,) * shape[-1]
    pipelines = {name: ({"name": name},) for name in augment.AUGMENTATIONS}
    pipelines["color_jitter"] = (
        {"name": "color_jitter", "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
    )
    if config.augment:
        pipelines["the recipe's"] = config.augment
    print(f"batches of {count} x {shape}, {sharding.describe(mesh)}, jax {jax.__version__}")
    key = jax.random.key(0)

    def measure(specs: Sequence[Any]) -> float:
        apply = jax.jit(augment.build(specs, mean=ones, std=ones))
        jax.block_until_ready(apply(key, batch))

        def one() -> int:
            jax.block_until_ready(apply(key, batch))
            return 1

        return 1e3 / statistics.median(_rates(one))

    nothing = measure(())
    print(f"{'normalising alone':20} {nothing:8.1f} ms")
    for name, specs in pipelines.items():
        print(f"{name:20} {jnp.maximum(measure(specs) - nothing, 0):8.1f} ms more")


def _rates(work: Callable[[], int]) -> list[float]:
    """Examples/s of every round of `work`, which returns their number."""
    rates = []
    for _ in range(FLAGS.rounds + 1):
        start = time.perf_counter()
        count = work()
        rates.append(count / (time.perf_counter() - start))
    return rates[1:]  # the first round warms up


def _print_rates(rates: Sequence[float]) -> None:
    print("images/s: " + ", ".join(f"{rate:,.0f}" for rate in rates))
    print(f"median {statistics.median(rates):,.0f} images/s")


BENCHMARKS = {"step": bench_step, "input": bench_input, "augment": bench_augment}


if __name__ == "__main__":
    cli.run(main)
