"""Training, from the config to the summary; `train` tells the whole story."""

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import build, models
from flaxcls.core.schedules import Duration
from flaxcls.errors import SIGNAL_EXIT_CODES, DivergedError, Interrupted
from flaxcls.runs import run_folder, trackers
from flaxcls.runs.goodput import Goodput
from flaxcls.runtime import output, processes, sharding
from flaxcls.runtime.processes import StopRequest
from flaxcls.training.program import Trainer, mesh_for
from flaxcls.training.session import Session


def train(config: ConfigDict, workdir: Path, age: float = 0.0) -> dict[str, Any]:
    """Trains the run in `workdir`, from its beginning or from its last checkpoint.

    Returns what summary.json holds. Raises ConfigError, DataError, CheckpointError, DivergedError
    and, when a signal asked the run to end and it has saved itself, Interrupted.
    """
    clock = Goodput(age)
    build.check(config)
    trackers.check_installed(config.log_to)
    mesh = mesh_for(config)
    workdir = Path(processes.gather(str(workdir))[0])
    before, finished = run_folder.claim(workdir, config)
    if finished:
        return finished
    with processes.first_before_others():  # it may have to prepare the data for all
        plan = build.plan(config, mesh)
    mean_and_std = run_folder.normalization(workdir, plan.train_source.fingerprint)
    trainer = Trainer(config, plan, mesh, _broken_images_log(workdir), mean_and_std)
    processes.check_same(run_folder.identity(config, trainer.facts, plan.eval_source.fingerprint))
    processes.say(_introduction(config, plan, mesh, trainer))
    changed = run_folder.changed_data(workdir, plan.train_source) if processes.is_first() else ()
    for note in (*plan.notes, *_changes(before, config), *changed):
        processes.say(f"note: {note}")

    log_due, eval_due, save_due = (
        Due(interval, plan.total_steps)
        for interval in (plan.log_every, plan.eval_every, plan.save_every)
    )
    session = Session(config, workdir, plan, trainer, clock, before)
    with (
        session,
        StopRequest() as asked,
        jax.transfer_guard("disallow"),
        clock.spending("step"),
        session.watchdog as watchdog,
    ):
        while session.step < plan.total_steps:
            session.advance()
            step = session.step
            watchdog.alive(step)
            signal, evaluates = asked(), eval_due(step)
            logs = log_due(step) or evaluates
            try:
                if logs:
                    session.log()
                improved = session.evaluate() if evaluates else False
                if save_due(step, may_wait=not logs) or improved or signal:
                    session.save(must=bool(signal))
            except DivergedError as trouble:
                session.roll_back(trouble)
                continue
            if signal:
                raise Interrupted(
                    f"stopped after step {step} of {plan.total_steps} and saved; the same command "
                    f"with {shlex.quote(f'--workdir={workdir}')} goes on",
                    SIGNAL_EXIT_CODES[signal],
                )
        return session.finish()


def _introduction(config: ConfigDict, plan: build.Plan, mesh: Mesh, trainer: Trainer) -> str:
    """What is going to be trained, on what, in some lines."""
    train, test = plan.train_source, plan.eval_source
    count = models.parameter_count(trainer.shapes.params)
    epochs = plan.total_steps / plan.steps_per_epoch
    return (
        f"data: {train.name}, {len(train):,} images to train on ({train.split}), {len(test):,} to "
        f"evaluate on ({test.split}), {len(train.class_names)} classes\n"
        f"input: {trainer.describe_input()}{plan.image_sizes.describe()}\n"
        f"model: {config.model.name}, {count:,} parameters\n"
        f"devices: {sharding.describe(mesh)}\n"
        f"optimizer: {plan.treatment}\n"
        f"length: {plan.total_steps:,} steps of {config.batch_size} images, "
        f"{round(epochs, 2) if epochs >= 1 else epochs:.4g} epochs"
    )


def _changes(before: ConfigDict | None, config: ConfigDict) -> Iterator[str]:
    """What a resumed run does otherwise than until now."""
    for field, (old, new) in run_folder.changes(before, config).items() if before else ():
        yield f"config.{field} was {old!r} until now, and is {new!r} from now on"


def _broken_images_log(workdir: Path) -> Callable[[str], None]:
    """Notes a sentence about a broken image in broken_images.log and on standard error.

    Every process notes those that it meets itself, but 0 in a file with its number.
    """

    number = "" if processes.is_first() else f".{processes.index()}"

    def report(sentence: str) -> None:
        output.say(f"flaxcls: {sentence}", error=True)
        with contextlib.suppress(OSError):  # a full disk
            workdir.mkdir(parents=True, exist_ok=True)
            with (workdir / f"broken_images{number}.log").open("a") as log:
                log.write(sentence + "\n")

    return report


class Due:
    """Says after which steps something is due: every so many steps or seconds, and at the end.

    All processes must say the same, so the clock is process 0's; as asking it takes them a moment,
    what is due by time `may_wait` for a step at which they have to stop anyway.
    """

    def __init__(self, interval: Duration, total_steps: int):
        self._interval, self._total_steps = interval, total_steps
        self._last = time.monotonic()

    def __call__(self, step: int, may_wait: bool = False) -> bool:
        if step == self._total_steps:
            return True
        if self._interval.unit == "steps":  # an epoch need not be a whole number of them
            return step // self._interval.value > (step - 1) // self._interval.value
        if may_wait:
            return False
        due = bool(processes.agree(time.monotonic() - self._last >= self._interval.value))
        if due:
            self._last = time.monotonic()
        return due
