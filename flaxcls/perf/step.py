"""The speed of the training step, and where its time goes."""

import statistics
import time
from functools import partial

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import build
from flaxcls.build import Experiment
from flaxcls.core.state import TrainState
from flaxcls.perf import devices
from flaxcls.perf.figures import Effort, Figures, figure, print_memory, print_rates, rates_of
from flaxcls.perf.flops import xla_flops
from flaxcls.runtime import compilation_cache, sharding
from flaxcls.runtime.output import say, write_result
from flaxcls.training.program import Program

_IDLE_CALLS = 8  # that are dispatched at once; after some dozens a call waits for the device


def bench_step(experiment: Experiment, effort: Effort, peak_tflops: float | None = None) -> Figures:
    """The training step with its input, the two apart, and its share of the devices' peak.

    `peak_tflops` is that of a device, in 10**12 FLOP/s, where perf/devices.py does not know it.
    """
    compilation_cache.saved_seconds()  # listens from now on
    start = time.perf_counter()
    program = Program.open(experiment, partial(say, error=True))
    read = time.perf_counter() - start
    write_result(f"{sharding.describe(experiment.mesh)}, jax {jax.__version__}")
    write_result(f"data read in {read:.1f} s")
    with program:
        start = time.perf_counter()
        state = jax.block_until_ready(program.init())
        initialised = time.perf_counter() - start
        compiled = program.compile()
        program.prepare(state)
        saved = compilation_cache.saved_seconds()
        write_result(
            f"initialised in {initialised:.1f} s, compiled in {compiled:.1f} s"
            + (f" (programs kept from earlier save at least {saved:.0f} s)" if saved >= 1 else "")
        )
        state, with_input = _with_input(experiment, program, state, effort)
        parts = _without_input(experiment, program, state, effort)
        utilisation = _utilisation(experiment, program, with_input["rate"]["value"], peak_tflops)
    return {
        "reading_data": figure(read, "s"),
        "initialisation": figure(initialised, "s"),
        "compilation": figure(compiled, "s"),
        **with_input,
        **parts,
        **utilisation,
        **print_memory(experiment.mesh),
    }


def _with_input(
    experiment: Experiment, program: Program, state: TrainState, effort: Effort
) -> tuple[TrainState, Figures]:
    """Steps as the training loop makes them, and what of them the host waits for batches."""
    waits = []  # seconds a step, of every round
    batches = program.batches(0, (effort.rounds + 1) * effort.steps)

    def steps() -> int:
        nonlocal state
        waited = 0.0
        for _ in range(effort.steps):
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            state = program.update(state, batch)
        jax.block_until_ready(state)
        waits.append(waited / effort.steps)
        return experiment.batch_size * effort.steps

    rates = rates_of(steps, effort.rounds)
    size, parts = experiment.batch_size, experiment.mesh.size
    print_rates(rates, parts)
    milliseconds = [1e3 * size / rate for rate in rates]
    waits = [1e3 * seconds for seconds in waits[1:]]
    write_result(
        f"a step takes {statistics.median(milliseconds):.2f} ms, {statistics.median(waits):.2f} of "
        "which the loop waits for its batch"
    )
    return state, {
        "rate": figure(rates, "images/s"),
        "rate_per_device": figure([rate / parts for rate in rates], "images/s"),
        "step": figure(milliseconds, "ms"),
        "input_wait": figure(waits, "ms"),
    }


def _without_input(
    experiment: Experiment, program: Program, state: TrainState, effort: Effort
) -> Figures:
    """Steps with one batch that is on the devices already, and the calls that dispatch them."""
    batch = jax.block_until_ready(program.batch(0))
    calls = []  # seconds until `update` returns, of the calls that find the devices not yet busy

    def steps() -> int:
        nonlocal state
        for number in range(effort.steps):
            start = time.perf_counter()
            state = program.update(state, batch)
            if number < _IDLE_CALLS:
                calls.append(time.perf_counter() - start)
        jax.block_until_ready(state)
        return effort.steps

    compute = [1e3 / rate for rate in rates_of(steps, effort.rounds)]
    figures = {"compute": figure(compute, "ms")}
    text = f"with a batch that is ready {statistics.median(compute):.2f} ms"
    if sharding.platform(experiment.mesh) == "cpu":
        text += "; dispatch is not told apart, as on CPUs the loop waits for each step"
    else:
        dispatch = 1e3 * statistics.median(calls[min(effort.steps, _IDLE_CALLS) :])
        figures["dispatch"] = figure(dispatch, "ms")
        text += f", {dispatch:.2f} ms until the host has dispatched it"
    write_result(text)
    return figures


def _utilisation(
    experiment: Experiment, program: Program, rate: float, peak_tflops: float | None
) -> Figures:
    """What XLA counts of FLOPs, and their share of what the devices can do at `rate` images/s."""
    mesh = experiment.mesh
    compiled = program.compiled()
    flops = xla_flops(compiled, compiled.as_text())
    if not flops:
        write_result("XLA does not count the FLOPs of this step")
        return {}
    flops *= mesh.size  # the program is that of one device
    if sharding.platform(mesh) != "cpu":
        flops *= experiment.gradient_accumulation  # a loop, of which XLA counts one pass
    flops /= experiment.batch_size
    figures = {"flops_per_image": figure(flops / 1e9, "GFLOP")}
    text = f"{flops / 1e9:.4g} GFLOP an image, by XLA"
    kind = mesh.devices.flat[0].device_kind
    chip = devices.find(kind)
    peak = peak_tflops or (chip.peak_tflops if chip else None)
    if peak is None:
        text += f"; --peak_tflops=N, of one device, gives their share of the peak of {kind!r}"
    else:
        share = 100 * flops * rate / (1e12 * peak * mesh.size)
        source = "--peak_tflops" if peak_tflops else f"bfloat16, {chip.source}" if chip else ""
        text += f": {share:.1f} % of the peak of {peak:,.4g} TFLOP/s a device ({source})"
        figures["peak_per_device"] = figure(peak, "TFLOP/s")
        figures["flop_utilisation"] = figure(share, "%")
    write_result(text)
    return figures


def step_rate(config: ConfigDict, mesh: Mesh, *, image_size: int, num_classes: int) -> float:
    """Images/s of a recipe's training step on made-up images; compiling it takes some seconds."""
    config = build.on_fake_data(config, image_size=image_size, num_classes=num_classes)
    config.duration = "3 steps"
    build.check(config)
    with Program.open(build.make_experiment(config, mesh)) as program:
        program.compile()
        state = program.init()
        seconds = []
        for batch in program.batches(0, 3):
            start = time.perf_counter()
            state = jax.block_until_ready(program.update(state, batch))
            seconds.append(time.perf_counter() - start)
    return config.batch_size / min(seconds)
