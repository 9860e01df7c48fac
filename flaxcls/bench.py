"""Times a recipe's training step, its input or its augmentations, without training to the end.

    python -m flaxcls.bench [step|input|augment] --config=configs/NAME.py [--config.x=y ...]
                            [--json=FILE]

step     seconds of reading the data and of compiling, and the images/s of each round of --steps
         steps with its input; a round ends when the devices have finished.
input    images/s that the streaming input decodes, all in all and a core; where the time goes; the
         decoder alone on the same bytes; and what a training loop waits for data whose model is
         --busy as fast as the input (0.8: the model is the bottleneck by a fifth).
augment  milliseconds a batch of every augmentation, each compiled alone.

Rounds are --rounds; one more comes first and is not counted. --json=FILE gets the figures with
their units, the config, versions and devices.
"""

import contextlib
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from flaxcls import cli
from flaxcls.errors import ConfigError, OutputError, did_you_mean
from flaxcls.runtime.output import printable, say, write_result

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "The recipe.", flag_values=FLAGS)
flags.DEFINE_integer("steps", 20, "Steps a round.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "Rounds that count.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("busy", 0.8, "Speed of the model over the input's.", flag_values=FLAGS)
flags.DEFINE_string("json", None, "A file for all figures.", flag_values=FLAGS)

Figures = dict[str, dict[str, Any]]  # by name {"value": number, "unit": str}, maybe "rounds"


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

    from flaxcls import build
    from flaxcls.training.program import mesh_for

    build.check(config)
    mesh = mesh_for(config)
    figures = BENCHMARKS[what](config, mesh)
    if FLAGS.json:
        _write_json(Path(FLAGS.json), what, config, figures)


def _write_json(path: Path, what: str, config: Any, figures: Figures) -> None:
    from flaxcls.config.fields import plain
    from flaxcls.runs import run_folder

    content = {
        "benchmark": what,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "flags": {name: FLAGS[name].value for name in ("config", "steps", "rounds", "busy")},
        "figures": figures,
        "config": plain(config),
        **run_folder.surroundings(),
    }
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise OutputError(
            f"--json={printable(path)} can't be written: {error.strerror or error}"
        ) from error


def bench_step(config: Any, mesh: Any) -> Figures:
    """The training step with its input."""
    import jax

    from flaxcls import build
    from flaxcls.runtime import sharding
    from flaxcls.training.program import Trainer

    start = time.perf_counter()
    trainer = Trainer(config, build.plan(config, mesh), mesh, partial(say, error=True))
    read = time.perf_counter() - start
    write_result(f"{sharding.describe(mesh)}, jax {jax.__version__}")
    write_result(f"data read in {read:.1f} s")
    state = trainer.init()
    compiled = trainer.compile()
    write_result(f"compiled in {compiled:.1f} s")
    with trainer:
        batches = trainer.batches(0, (FLAGS.rounds + 1) * FLAGS.steps)

        def steps() -> int:
            nonlocal state
            for _ in range(FLAGS.steps):
                state = trainer.update(state, next(batches))
            jax.block_until_ready(state)
            return config.batch_size * FLAGS.steps

        rates = _rates(steps)
    _print_rates(rates)
    return {
        "reading_data": _figure(read, "s"),
        "compilation": _figure(compiled, "s"),
        "rate": _figure(rates, "images/s"),
    }


def step_rate(config: Any, mesh: Any, *, image_size: int, num_classes: int) -> float:
    """Images/s of a recipe's training step on made-up images; compiling it takes some seconds."""
    import jax

    from flaxcls import build
    from flaxcls.training.program import Trainer

    config = config.copy_and_resolve_references()
    channels = config.data.get("channels") or 3
    for section in (config.data, config.crop, config.eval.crop):
        for field in list(section):
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


def bench_input(config: Any, mesh: Any) -> Figures:
    """The streaming input, whatever config.input.mode says."""
    from flaxcls import build
    from flaxcls.build import inputs
    from flaxcls.data.decode import available_cores
    from flaxcls.data.order import evenly_spaced

    config.input.mode = "stream"
    plan = build.plan(config, mesh)
    source, size = plan.train_source, plan.image_sizes(0)
    stream = inputs.training(config, source, plan.image_sizes, partial(say, error=True))
    with contextlib.closing(stream):
        name = type(stream.loader.transform).__name__ if stream.loader.transform else "no transform"
        write_result(
            f"{source.name} '{source.split}', {len(source):,} images; {name}, size {size}\n"
            f"{stream.describe()}; {available_cores()} cores"
        )
        indices = evenly_spaced(len(source), 200)
        return {
            **_parts_of_input(stream, indices, size, mesh, config.batch_size),
            **_input_as_a_whole(stream, mesh, config.batch_size),
        }


def _parts_of_input(
    stream: Any, indices: Sequence[int], size: int | None, mesh: Any, batch_size: int
) -> Figures:
    import jax

    from flaxcls.runtime import sharding

    seconds = _stages(stream, indices, size)
    batch = stream.batch(0)
    start = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(sharding.split_batch(mesh, batch))
    seconds["transfer"] = (time.perf_counter() - start) / 5 / batch_size
    total = sum(seconds.values())
    write_result(
        f"one image on one thread takes {1e3 * total:.3f} ms: "
        + ", ".join(f"{name} {100 * part / total:.0f} %" for name, part in seconds.items())
    )
    decoder = _decoder_rate(stream, indices)
    write_result(f"decoder alone, the same bytes: {decoder:,.0f} images/s")
    names = {name: f"{name.replace(' ', '_')}_on_one_thread" for name in seconds}
    return {
        **{names[name]: _figure(1e3 * part, "ms/image") for name, part in seconds.items()},
        "decoder_alone": _figure(decoder, "images/s"),
    }


def _input_as_a_whole(stream: Any, mesh: Any, batch_size: int) -> Figures:
    import jax

    from flaxcls.data.decode import available_cores
    from flaxcls.runtime import sharding

    waits, peaks = [], []  # of every round
    with contextlib.closing(sharding.prefetch(mesh, stream.batches(0, 10**9))) as batches:

        def round_of(model_seconds: float = 0.0) -> int:
            begin, waited = time.perf_counter(), 0.0
            for _ in range(FLAGS.steps):
                start = time.perf_counter()
                jax.block_until_ready(next(batches))
                waited += time.perf_counter() - start
                time.sleep(model_seconds)
            waits.append(waited / (time.perf_counter() - begin))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            return batch_size * FLAGS.steps

        rates = _rates(round_of)
        _print_rates(rates)
        rate = statistics.median(rates)
        per_core = rate / available_cores()
        write_result(
            f"that is {per_core:,.0f} images/s a core\n"
            f"peak memory of the process: {peaks[0]:,.0f} MiB after {FLAGS.steps:,} batches, "
            f"{peaks[-1]:,.0f} MiB after {FLAGS.steps * len(peaks):,}"
        )
        first_peak, peak = peaks[0], peaks[-1]
        _rates(lambda: round_of(batch_size / (rate * FLAGS.busy)))
    wait = statistics.median(waits[-FLAGS.rounds :])
    write_result(
        f"a model of {rate * FLAGS.busy:,.0f} images/s waits {100 * wait:.1f} % of the time"
    )
    return {
        "rate": _figure(rates, "images/s"),
        "rate_per_core": _figure(per_core, "images/s"),
        "peak_memory_first_round": _figure(first_peak, "MiB"),
        "peak_memory": _figure(peak, "MiB"),
        "waiting_of_busy_model": _figure(100 * wait, "%"),
    }


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


def bench_augment(config: Any, mesh: Any) -> Figures:
    """Every augmentation on a batch of the recipe's size, and the recipe's own list."""
    import jax
    import numpy as np

    from flaxcls import augment, build
    from flaxcls.build import inputs
    from flaxcls.runtime import sharding

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
    write_result(f"batches of {count} x {shape}, {sharding.describe(mesh)}, jax {jax.__version__}")
    key = jax.random.key(0)

    def measure(specs: Sequence[Any]) -> float:
        apply = jax.jit(augment.build(specs, mean=ones, std=ones))
        jax.block_until_ready(apply(key, batch))

        def one() -> int:
            jax.block_until_ready(apply(key, batch))
            return 1

        return 1e3 / statistics.median(_rates(one))

    nothing = measure(())
    write_result(f"{'normalising alone':20} {nothing:8.1f} ms")
    figures = {"normalising alone": _figure(nothing, "ms/batch")}
    for name, specs in pipelines.items():
        more = max(measure(specs) - nothing, 0)
        write_result(f"{name:20} {more:8.1f} ms more")
        figures[name] = _figure(more, "ms/batch more")
    return figures


def _rates(work: Callable[[], int]) -> list[float]:
    """Examples/s of every round of `work`, which returns their number."""
    rates = []
    for _ in range(FLAGS.rounds + 1):
        start = time.perf_counter()
        count = work()
        rates.append(count / (time.perf_counter() - start))
    return rates[1:]  # the first round warms up


def _print_rates(rates: Sequence[float]) -> None:
    write_result("images/s: " + ", ".join(f"{rate:,.0f}" for rate in rates))
    write_result(f"median {statistics.median(rates):,.0f} images/s")


def _figure(value: float | Sequence[float], unit: str) -> dict[str, Any]:
    """A figure, or the median of those of the rounds and all of them."""
    if isinstance(value, Sequence):
        return {"value": statistics.median(value), "unit": unit, "rounds": list(value)}
    return {"value": value, "unit": unit}


BENCHMARKS = {"step": bench_step, "input": bench_input, "augment": bench_augment}


if __name__ == "__main__":
    cli.run(main)
