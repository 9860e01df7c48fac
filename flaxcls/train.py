"""Training, from the config to the summary; `train` tells the whole story."""

import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import build, models, run, sharding
from flaxcls.checkpoint import Checkpoints
from flaxcls.errors import SIGNAL_EXIT_CODES, DataError, DivergedError, Interrupted
from flaxcls.schedules import Duration
from flaxcls.trainer import Trainer, mesh_for
from flaxcls.watch import Stopwatch, Watch


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains the run in `workdir`, from its beginning or from its last checkpoint.

    Returns what summary.json holds. Raises ConfigError, DataError, DivergedError and, when a signal
    asked the run to end and it has saved itself, Interrupted.
    """
    build.check(config)
    if finished := run.claim(workdir, config):
        return finished
    began = time.perf_counter()
    mesh = mesh_for(config)
    plan = build.plan(config)
    trainer = Trainer(config, plan, mesh, report=_broken_images_log(workdir))
    print(_introduction(config, plan, mesh, trainer))

    # Begin, or go on.
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
    start = checkpoints.find("last") if checkpoints.steps() else 0
    if start:
        facts = checkpoints.facts(start)
        if facts["fingerprint"] != trainer.facts["fingerprint"]:
            raise DataError(f"the training data are not those that {workdir} began with")
        state = checkpoints.state(start, trainer.shapes, trainer.places)
        progress = facts["progress"]
    else:
        run.record(workdir, config, trainer.facts)
        state = trainer.init()
        progress = {"seconds": 0.0, "results": {}, "best": {}}
    earlier = progress["seconds"]

    log_due, eval_due, save_due = (
        Due(interval, plan.total_steps)
        for interval in (plan.log_every, plan.eval_every, plan.save_every)
    )
    watch = Watch(workdir, start, plan.total_steps, config.batch_size)
    watch.say(f"compiled in {trainer.compile(start):.1f} s; the run is in {workdir}")
    batches = trainer.batches(start, plan.total_steps)
    stopwatch, logged = Stopwatch(), start
    with watch, Signals() as signals, checkpoints, trainer, jax.transfer_guard("disallow"):
        for step in range(start + 1, plan.total_steps + 1):
            with stopwatch.waiting():
                batch = next(batches)
            state = trainer.update(state, batch)

            epoch, improved = step / plan.steps_per_epoch, False
            evaluates = eval_due(step)
            if log_due(step) or evaluates:
                state, row = trainer.take_metrics(state)
                if not math.isfinite(row["loss"]):
                    raise _diverged(f"the loss of steps {logged + 1} to {step}", checkpoints)
                row["learning_rate"] = trainer.rate(step - 1)
                watch.training(step, epoch, row, stopwatch.lap(step - logged))
                logged = step
            if evaluates:
                with stopwatch.pause():
                    progress["results"] = trainer.evaluate(state)
                if not all(math.isfinite(row["loss"]) for row in progress["results"].values()):
                    raise _diverged(f"the evaluation's loss after step {step}", checkpoints)
                watch.evaluation(step, epoch, progress["results"])
                improved = _keep_best(progress, step, config.checkpoint.best_metric)
            if save_due(step) or improved or signals.received:
                jax.block_until_ready(state)
                with stopwatch.pause(), jax.transfer_guard("allow"):
                    if not trainer.is_finite(state):
                        raise _diverged(f"the state after step {step}", checkpoints)
                    progress["seconds"] = earlier + time.perf_counter() - began
                    # A copy: it is written in the background, while training goes on.
                    facts = {**trainer.facts, "progress": dict(progress)}
                    checkpoints.save(step, state, facts)
            if signals.received:
                raise Interrupted(
                    f"stopped after step {step} of {plan.total_steps} and saved; the same command "
                    f"with --workdir={workdir} goes on",
                    SIGNAL_EXIT_CODES[signals.received],
                )
    summary = {
        "finished": True,
        "step": plan.total_steps,
        "seconds": earlier + time.perf_counter() - began,
        "images_per_second": config.batch_size * stopwatch.steps_per_second,
        "data_wait": stopwatch.data_wait,
        **progress["results"],
        "best": progress["best"],
    }
    run.write_json(workdir / "summary.json", summary)
    return summary


def _introduction(config: ConfigDict, plan: build.Plan, mesh: Mesh, trainer: Trainer) -> str:
    """What is going to be trained, on what, in some lines."""
    train, test = plan.train_source, plan.eval_source
    count = models.parameter_count(trainer.shapes.params)
    return (
        f"data: {train.name}, {len(train):,} images to train on ({train.split}), {len(test):,} to "
        f"evaluate on ({test.split}), {len(train.class_names)} classes\n"
        f"input: {trainer.input.describe()}{plan.image_sizes.describe()}\n"
        f"model: {config.model.name}, {count:,} parameters\n"
        f"devices: {sharding.describe(mesh)}\n"
        f"optimizer: {plan.treatment}\n"
        f"length: {plan.total_steps:,} steps of {config.batch_size} images, "
        f"{plan.total_steps / plan.steps_per_epoch:g} epochs"
    )


def _broken_images_log(workdir: Path) -> Callable[[str], None]:
    """Notes a sentence about a broken image in broken_images.log and on standard error."""

    def report(sentence: str) -> None:
        print(f"flaxcls: {sentence}", file=sys.stderr)
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "broken_images.log").open("a") as log:
            log.write(sentence + "\n")

    return report


def _keep_best(progress: dict[str, Any], step: int, metric: str) -> bool:
    """Takes the newest results for the best if they are; whether they are."""
    sign = -1 if metric == "loss" else 1
    weights, result = max(progress["results"].items(), key=lambda item: sign * item[1][metric])
    best = progress["best"]
    if best and sign * result[metric] <= sign * best[metric]:
        return False
    progress["best"] = {"step": step, "weights": weights, **result}
    return True


def _diverged(what: str, checkpoints: Checkpoints) -> DivergedError:
    checkpoints.wait()
    steps = checkpoints.steps()
    last = f"the checkpoint of step {steps[-1]} is good" if steps else "no checkpoint was saved yet"
    return DivergedError(
        f"{what} is not finite; {last}; a lower config.optimizer.learning_rate, a warm-up or "
        "config.optimizer.gradient_clip_norm may help"
    )


class Due:
    """Says after which steps something is due: every so many steps or seconds, and at the end."""

    def __init__(self, interval: Duration, total_steps: int):
        self._interval, self._total_steps = interval, total_steps
        self._last = time.monotonic()

    def __call__(self, step: int) -> bool:
        if step == self._total_steps:
            return True
        if self._interval.unit == "steps":  # an epoch need not be a whole number of them
            return step // self._interval.value > (step - 1) // self._interval.value
        due = time.monotonic() - self._last >= self._interval.value
        if due:
            self._last = time.monotonic()
        return due


class Signals:
    """While it is entered, the first SIGINT or SIGTERM is only noted; a second one acts at once."""

    received: int | None = None

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNAL_EXIT_CODES}
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.received = number
        self.__exit__()

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
