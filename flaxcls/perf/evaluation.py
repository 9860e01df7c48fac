"""The speed of the evaluation."""

import math
import time
from functools import partial

import jax

from flaxcls.build import Experiment
from flaxcls.perf.figures import Effort, Figures, figure, print_memory, print_rates, rates_of
from flaxcls.runtime import sharding
from flaxcls.runtime.output import say, write_result
from flaxcls.training.program import Program


def bench_eval(experiment: Experiment, effort: Effort) -> Figures:
    """The evaluation of the whole split with its input, as often as makes the steps of a round.

    Where an average of the parameters is kept both are evaluated, as in training, and the images
    count twice.
    """
    source, size = experiment.evaluation.source, experiment.eval_batch_size
    batches = math.ceil(len(source) / size)
    write_result(f"{sharding.describe(experiment.mesh)}, jax {jax.__version__}")
    write_result(
        f"{source.name} '{source.split}', {len(source):,} images, {batches:,} batches of {size:,}"
    )
    with Program.open(experiment, partial(say, error=True)) as program:
        state = jax.block_until_ready(program.init())
        start = time.perf_counter()
        program.evaluate(state)
        first = time.perf_counter() - start
        write_result(f"the first time, compiling included, {first:.1f} s")

        def evaluations() -> int:
            count = 0
            for _ in range(math.ceil(effort.steps / batches)):
                results = program.evaluate(state)
                count += sum(row["count"] for row in results.values())
            return count

        rates = rates_of(evaluations, effort.rounds)
    devices = experiment.mesh.size
    print_rates(rates, devices)
    return {
        "first_evaluation": figure(first, "s"),
        "rate": figure(rates, "images/s"),
        "rate_per_device": figure([rate / devices for rate in rates], "images/s"),
        **print_memory(experiment.mesh),
    }
