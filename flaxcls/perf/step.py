"""The speed of the training step."""

import time
from functools import partial

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import build
from flaxcls.build import Experiment
from flaxcls.perf.figures import Effort, Figures, figure, print_rates, rates_of
from flaxcls.runtime import sharding
from flaxcls.runtime.output import say, write_result
from flaxcls.training.program import Program


def bench_step(experiment: Experiment, effort: Effort) -> Figures:
    """The training step with its input."""
    start = time.perf_counter()
    program = Program.open(experiment, partial(say, error=True))
    read = time.perf_counter() - start
    write_result(f"{sharding.describe(experiment.mesh)}, jax {jax.__version__}")
    write_result(f"data read in {read:.1f} s")
    state = program.init()
    compiled = program.compile()
    write_result(f"compiled in {compiled:.1f} s")
    with program:
        batches = program.batches(0, (effort.rounds + 1) * effort.steps)

        def steps() -> int:
            nonlocal state
            for _ in range(effort.steps):
                state = program.update(state, next(batches))
            jax.block_until_ready(state)
            return experiment.batch_size * effort.steps

        rates = rates_of(steps, effort.rounds)
    print_rates(rates)
    return {
        "reading_data": figure(read, "s"),
        "compilation": figure(compiled, "s"),
        "rate": figure(rates, "images/s"),
    }


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
