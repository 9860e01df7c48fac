"""The speed of the streaming input, and where its time goes."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from flaxcls.build import Experiment
from flaxcls.data.order import evenly_spaced
from flaxcls.data.stream import Stream
from flaxcls.perf.figures import Effort, Figures, figure, host_peak, print_rates, rates_of
from flaxcls.runtime import sharding
from flaxcls.runtime.cores import available_cores
from flaxcls.runtime.output import say, write_result


def bench_input(experiment: Experiment, effort: Effort, busy: float) -> Figures:
    """The streaming input, also of data that would be resident.

    `busy` is the speed of a model, over the input's, whose wait for data is measured.
    """
    streamed = dataclasses.replace(experiment.train.options, mode="stream")
    pipeline = dataclasses.replace(experiment.train, options=streamed)
    source, size, mesh = pipeline.source, pipeline.sizes(0), experiment.mesh
    stream = pipeline.open(partial(say, error=True))
    with contextlib.closing(stream):
        name = type(stream.loader.transform).__name__ if stream.loader.transform else "no transform"
        write_result(
            f"{source.name} '{source.split}', {len(source):,} images; {name}, size {size}\n"
            f"{stream.describe()}; {available_cores()} cores"
        )
        indices = evenly_spaced(len(source), 200)
        return {
            **_parts_of_input(stream, indices, size, mesh, experiment.batch_size),
            **_end_to_end(stream, mesh, experiment.batch_size, effort, busy),
        }


def _parts_of_input(
    stream: Stream, indices: Sequence[int], size: int | None, mesh: Mesh, batch_size: int
) -> Figures:

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
        **{names[name]: figure(1e3 * part, "ms/image") for name, part in seconds.items()},
        "decoder_alone": figure(decoder, "images/s"),
    }


def _end_to_end(
    stream: Stream, mesh: Mesh, batch_size: int, effort: Effort, busy: float
) -> Figures:

    waits, peaks = [], []  # of every round
    with contextlib.closing(sharding.prefetch(mesh, stream.batches(0, 10**9))) as batches:

        def round_of(model_seconds: float = 0.0) -> int:
            begin, waited = time.perf_counter(), 0.0
            for _ in range(effort.steps):
                start = time.perf_counter()
                jax.block_until_ready(next(batches))
                waited += time.perf_counter() - start
                time.sleep(model_seconds)
            waits.append(waited / (time.perf_counter() - begin))
            peaks.append(host_peak())
            return batch_size * effort.steps

        rates = rates_of(round_of, effort.rounds)
        print_rates(rates)
        rate = statistics.median(rates)
        per_core = rate / available_cores()
        write_result(
            f"that is {per_core:,.0f} images/s per core\n"
            f"peak memory of the process: {peaks[0]:,.0f} MiB after {effort.steps:,} batches, "
            f"{peaks[-1]:,.0f} MiB after {effort.steps * len(peaks):,}"
        )
        first_peak, peak = peaks[0], peaks[-1]
        rates_of(lambda: round_of(batch_size / (rate * busy)), effort.rounds)
    wait = statistics.median(waits[-effort.rounds :])
    write_result(f"a model of {rate * busy:,.0f} images/s waits {100 * wait:.1f} % of the time")
    return {
        "rate": figure(rates, "images/s"),
        "rate_per_core": figure(per_core, "images/s"),
        "peak_memory_first_round": figure(first_peak, "MiB"),
        "peak_memory": figure(peak, "MiB"),
        "waiting_of_busy_model": figure(100 * wait, "%"),
    }


def _stages(stream: Stream, indices: Sequence[int], size: int | None) -> dict[str, float]:
    """Seconds an image of reading, decoding, and cropping and resizing, on one thread."""
    loader, decoding = stream.loader, 0.0
    draws = [0.5] * loader.draws

    class TimedPicture:
        """A picture that times its decoding."""

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


def _decoder_rate(stream: Stream, indices: Sequence[int]) -> float:
    """Images/s of nothing but decoding whole pictures, in as many threads as there are cores."""

    loader = stream.loader
    examples = [(loader.source[index].image, index) for index in indices]

    with ThreadPoolExecutor(available_cores()) as threads:

        def decode_all() -> int:
            list(threads.map(lambda example: loader.picture(*example).pixels(), examples))
            return len(examples)

        return statistics.median(rates_of(decode_all, 5))
