"""A timing run: the real loop with its log, evaluation and checkpoints, in a folder that goes."""

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from flaxcls.build import Experiment
from flaxcls.core.state import TrainState
from flaxcls.perf.figures import Effort, Figures, figure, print_memory, print_rates
from flaxcls.perf.temporary import temporary_folder
from flaxcls.runs.goodput import Goodput, process_age
from flaxcls.runtime import sharding
from flaxcls.runtime.output import say, write_result
from flaxcls.training.hooks import Hooks
from flaxcls.training.program import Program
from flaxcls.training.session import Session


def timing_config(config: ConfigDict, effort: Effort, *, fake: bool) -> ConfigDict:
    """A copy of a config that trains for the steps of all rounds, and logs after each.

    It evaluates and saves at its end and, on its own data, as often as the recipe says; a few
    made-up images have an epoch of two steps, after which no recipe means to evaluate.
    """
    config = config.copy_and_resolve_references()
    total = f"{(effort.rounds + 1) * effort.steps} steps"
    config.duration, config.log_every = total, f"{effort.steps} steps"
    config.log_to = config.profile.start = config.profile.stop = None
    if fake:
        config.eval.every = config.checkpoint.every = total
    return config


class TimedProgram(Program):
    """A Program that notes what the loop does between its steps.

    Attributes:
      between: seconds from the end of each `update` to the beginning of the next, without those in
        which a batch was waited for; of several steps in one dispatch the share of each.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.between: list[float] = []
        self._returned: float | None = None
        self._waited = 0.0

    def update(self, state: TrainState, batch: dict[str, jax.Array]) -> TrainState:
        if self._returned is not None:
            steps = len(batch["index"]) if sharding.is_stacked(batch) else 1
            seconds = time.perf_counter() - self._returned - self._waited
            self.between += [seconds / steps] * steps
        state = super().update(state, batch)
        self._returned, self._waited = time.perf_counter(), 0.0
        return state

    def batches(self, *arguments: Any) -> Iterator[dict[str, jax.Array]]:
        batches = super().batches(*arguments)

        def timed() -> Iterator[dict[str, jax.Array]]:
            while True:
                began = time.perf_counter()
                batch = next(batches, None)
                self._waited += time.perf_counter() - began
                if batch is None:
                    return
                yield batch

        return timed()


def bench_train(experiment: Experiment, effort: Effort) -> Figures:
    """The loop of an experiment whose config is a `timing_config`."""
    write_result(f"{sharding.describe(experiment.mesh)}, jax {jax.__version__}")
    rows: list[dict[str, Any]] = []
    hooks = Hooks(on_log=lambda row: rows.append(dict(row)))
    clock = Goodput(process_age())
    with temporary_folder() as workdir:
        program = TimedProgram.open(experiment, partial(say, error=True))
        with Session(experiment, workdir, program, clock, hooks=hooks) as session:
            state = session.restore()
            for batch in session.batches():
                state = program.update(state, batch)
                state = session.after(state)
            summary = session.finish()
    warm = [row["images_per_second"] for row in rows if row["step"] > effort.steps]
    write_result("between the log steps, the first stretch left out:")
    print_rates(warm, experiment.mesh.size)
    between = 1e6 * statistics.median(program.between[effort.steps :])
    write_result(
        f"the loop's own time on the host is {between:.0f} microseconds a step (median, beside the "
        "step and its batch)"
    )
    return {
        "rate": figure(warm, "images/s"),
        "rate_per_device": figure([rate / experiment.mesh.size for rate in warm], "images/s"),
        "loop_on_host": figure(between, "microseconds/step"),
        **_shares(experiment, summary),
        **print_memory(experiment.mesh),
    }


def _shares(experiment: Experiment, summary: dict[str, Any]) -> Figures:
    """The run as a whole, from its first step to its last checkpoint, and where its time went."""
    spent = summary["goodput"]["seconds"]
    names = {
        "step": "stepping",
        "data_wait": "waiting for data",
        "evaluate": "evaluating",
        "save": "saving",
    }
    total = sum(spent[name] for name in names)
    rate = experiment.batch_size * summary["step"] / total
    shares = {name: 100 * spent[name] / total for name in names}
    write_result(
        f"as a whole {rate:,.0f} images/s in {total:.1f} s of {summary['step']:,} steps: "
        + ", ".join(f"{names[name]} {share:.1f} %" for name, share in shares.items())
        + f"; before that {spent['startup']:.1f} s of starting and {spent['compile']:.1f} s of "
        "initialising and compiling"
    )
    return {
        "rate_of_the_whole": figure(rate, "images/s"),
        **{f"share_of_{name}": figure(share, "%") for name, share in shares.items()},
        **{f"seconds_of_{name}": figure(spent[name], "s") for name in (*names, "compile")},
    }
