"""Times flaxcls' compiled training step and its evaluation step on one workload.

    python benchmarks/gpu/flaxcls_step.py NAME [--tiny] [--rounds=5] [--trace=DIR]

The step is the real one, as the training loop calls it: it gathers the batch's uint8 images on the
device, augments, normalises, updates, and adds up the metrics. A round of steps ends when
the device has finished; the first round is not counted. The last line is the result as JSON.
With --trace, a profile of some more steps is kept there, and its kernels are added up.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import kernels
import recipes
from workloads import PEAK_FLOPS, WORKLOADS, Workload, tiny


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=WORKLOADS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trace")
    options = parser.parse_args()
    workload = WORKLOADS[options.name]
    workload = tiny(workload) if options.tiny else workload
    config = recipes.made_up_config(workload)
    with recipes.program(config) as program:
        result = train(program, workload, options.rounds)
        result |= evaluate(config, program, workload, options.rounds)
        print(json.dumps(result), flush=True)  # a profile may be too much for the time there is
        if options.trace:
            result["kernels"] = profile(program, options.trace)
    print(json.dumps(result))


def train(program: Any, workload: Workload, num_rounds: int) -> dict[str, Any]:
    """Seconds to compile, images/s of each round, peak memory and the share of the card's peak."""
    start = time.perf_counter()
    state = jax.block_until_ready(program.init())
    initialised = time.perf_counter() - start
    compiled = program.compile()
    batches = program.batches(0, (num_rounds + 1) * workload.steps)

    def round_of_steps() -> None:
        nonlocal state
        for _ in range(workload.steps):
            state = program.update(state, next(batches))
        jax.block_until_ready(state)

    rates = rounds(round_of_steps, workload, num_rounds)
    _, metrics = program.take_metrics(state)
    device = jax.devices()[0]
    peak = next((f for name, f in PEAK_FLOPS.items() if device.device_kind.startswith(name)), None)
    rate = statistics.median(rates)
    return {
        "batch_size": workload.batch_size,
        "initialise_seconds": initialised,
        "compile_seconds": compiled,
        "train_images_per_second": rate,
        "train_rounds": rates,
        "train_milliseconds": 1e3 * workload.batch_size / rate,
        "loss": metrics["loss"],
        "share_of_peak": 6e9 * workload.gmacs * rate / peak if peak else None,
        "peak_gigabytes": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
    }


def evaluate(config: Any, program: Any, workload: Workload, num_rounds: int) -> dict[str, Any]:
    """Images/s of the evaluation step, on one batch that stays on the device."""
    step, sums, batch = recipes.forward(config)
    variables = program.init().variables

    def round_of_steps() -> None:
        nonlocal sums
        for _ in range(workload.steps):
            sums = step(variables, sums, batch)
        jax.block_until_ready(sums)

    rates = rounds(round_of_steps, workload, num_rounds)
    return {"forward_images_per_second": statistics.median(rates), "forward_rounds": rates}


def rounds(work: Callable[[], None], workload: Workload, number: int) -> list[float]:
    """Images/s of every round but the first."""
    rates = []
    for _ in range(number + 1):
        start = time.perf_counter()
        work()
        rates.append(workload.steps * workload.batch_size / (time.perf_counter() - start))
    return rates[1:]


def profile(program: Any, folder: str, steps: int = 5) -> dict[str, Any]:
    """What the device does in a step, from a profile of some steps."""
    state = program.init()
    program.compile()
    batches = program.batches(0, 2 * steps)

    def some_steps() -> None:
        nonlocal state
        for _ in range(steps):
            state = program.update(state, next(batches))
        jax.block_until_ready(state)

    some_steps()
    with jax.profiler.trace(folder):
        some_steps()
    return kernels.table(folder, steps)


if __name__ == "__main__":
    main()
