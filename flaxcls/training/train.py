"""Training: `train` tells the whole story."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from flaxcls import build
from flaxcls.buckets import AnyPath, as_path
from flaxcls.build import Before, Experiment
from flaxcls.runs import run_folder
from flaxcls.runs.broken_images import broken_images_log
from flaxcls.runs.goodput import Goodput
from flaxcls.runs.lease import NO_LEASE, Lease, hold
from flaxcls.runtime import processes
from flaxcls.training.hooks import NO_HOOKS, Hooks
from flaxcls.training.initial import complete, inherited_normalization
from flaxcls.training.introduction import introduce
from flaxcls.training.program import Program
from flaxcls.training.session import Session
from flaxcls.weights import sources


def train(
    experiment: Experiment,
    workdir: AnyPath,
    clock: Goodput,
    before: Before | None = None,
    hooks: Hooks = NO_HOOKS,
    lease: Lease = NO_LEASE,
) -> dict[str, Any]:
    """Trains the run in `workdir`, from its beginning or from its last checkpoint.

    Args:
      experiment: what is trained.
      workdir: the run's folder, the same one in all processes.
      clock: where the seconds go.
      before: what the run was until now, if it is resumed.
      hooks: what process 0 calls with the metrics.
      lease: the right to write into the folder.

    Returns what summary.json holds. Raises ConfigError, DataError, CheckpointError, DivergedError,
    RunTakenError and, when a signal asked the run to end and it has saved itself, Interrupted.
    """
    if experiment.init_from is not None and before is None:
        sources.check(experiment.init_from)  # before anything slow
    fingerprint = experiment.train.source.fingerprint
    normalization = (
        run_folder.normalization(workdir, fingerprint)
        or experiment.normalization
        or inherited_normalization(experiment)
    )
    program = Program.open(experiment, broken_images_log(workdir, lease), normalization)
    introduce(experiment, program, workdir, before)
    clock.reach("read")

    with Session(experiment, workdir, program, clock, before, hooks, lease) as session:
        state = session.restore()
        for batch in session.batches():
            state = program.update(state, batch)
            state = session.after(state)  # logs, evaluates, saves, stops, rolls back
        return session.finish()


def train_config(
    config: ConfigDict,
    workdir: AnyPath,
    age: float = 0.0,
    *,
    hooks: Hooks = NO_HOOKS,
    watched: bool = True,
) -> dict[str, Any]:
    """Trains what a config means; returns what summary.json holds, and raises, as `train` does.

    Where another job trains in `workdir` that is RunTakenError, before any device is used. A run
    that has finished, and is not to be longer now, is left as it is. `age` are the seconds that the
    process has taken so far; a run that is `watched` ends the process if it hangs.
    """
    clock = Goodput(age)
    if said := complete(config, workdir):
        processes.say(said)
    build.check(config)
    workdir = as_path(processes.gather(str(workdir))[0])
    with hold(workdir if processes.is_first() else None, processes.say) as lease:
        processes.gather("")  # what is in the folder is this job's now
        mesh = build.mesh(config)
        earlier, finished = run_folder.claim(workdir, config)
        if finished:
            return finished
        with processes.first_before_others():  # it may have to prepare the data for all
            experiment = build.make_experiment(config, mesh)
        clock.reach("checked")
        if not watched:
            experiment = dataclasses.replace(experiment, hang_after=0)
        before = earlier and build.before(earlier, len(experiment.train.source))
        return train(experiment, workdir, clock, before, hooks, lease)
