"""A run under way in this process: its folder, and all that a step may lead to."""

import contextlib
import math
import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax

from flaxcls.buckets import AnyPath
from flaxcls.build import Before, Experiment
from flaxcls.config.fields import fields
from flaxcls.core.metrics import best_of, is_better
from flaxcls.core.state import TrainState
from flaxcls.errors import (
    SIGNAL_EXIT_CODES,
    CheckpointError,
    DataError,
    DivergedError,
    Interrupted,
)
from flaxcls.files import write_json
from flaxcls.runs import run_folder
from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.goodput import Goodput
from flaxcls.runs.lease import NO_LEASE, Lease
from flaxcls.runs.metric_log import MetricLog
from flaxcls.runs.recovery import restore_newest
from flaxcls.runtime import compilation_cache, processes, sharding
from flaxcls.runtime.autotuning import Autotuning
from flaxcls.runtime.stop_request import StopRequest
from flaxcls.runtime.watchdog import Watchdog
from flaxcls.training import rollbacks
from flaxcls.training.due import Due
from flaxcls.training.hooks import NO_HOOKS, HookCalls, Hooks
from flaxcls.training.introduction import check_new_length
from flaxcls.training.profile import Profile
from flaxcls.training.program import Program
from flaxcls.weights.initial import initial_weights

_START = {"seconds": {}, "results": {}, "best": {}, **rollbacks.NONE}


class Session:
    """A run under way; to be entered, `restore` begins it, and `after` follows each update.

    The state stays with the loop: it is passed in, may be donated, and the next one
    is returned.

    Attributes:
      step: the number of updates made, those skipped included.
    """

    def __init__(
        self,
        experiment: Experiment,
        workdir: AnyPath,
        program: Program,
        clock: Goodput,
        before: Before | None = None,
        hooks: Hooks = NO_HOOKS,
        lease: Lease = NO_LEASE,
    ):
        self._experiment, self._workdir, self._program = experiment, workdir, program
        self._clock, self._before, self._hooks = clock, before, HookCalls(hooks)
        self._lease, self._total_steps = lease, experiment.length.total_steps
        self._progress: dict[str, Any] = dict(_START)
        self.step = 0

    def __enter__(self) -> "Session":
        with contextlib.ExitStack() as stack:
            self._checkpoints = Checkpoints(
                self._workdir / "checkpoints", self._experiment.saving.keep, self._lease.check
            )
            stack.push(self._close_checkpoints)
            stack.enter_context(self._program)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        return self._stack.__exit__(*exception)

    def _close_checkpoints(self, kind: type[BaseException] | None, *details: Any) -> None:
        try:
            self._checkpoints.close()
        except CheckpointError as error:
            if kind is None:
                raise
            processes.say(str(error))  # what ends the run comes first

    # The beginning.

    def restore(self) -> TrainState:
        """The state of the newest intact checkpoint, or of the beginning.

        From here on the run is under way: recorded in its folder, logged, watched.
        """
        state = self._restored()
        self._clock.reach("initialised")
        if self._before:
            check_new_length(self._before, self._experiment, self.step, self._workdir)
        self._record()
        self._log = self._stack.enter_context(
            MetricLog(
                self._workdir if processes.is_first() else None,
                self.step,
                self._total_steps,
                self._experiment.batch_size,
                self._lease.check,
            )
        )
        config = dict(fields(self._experiment.config))
        self._log.track(self._experiment.log_to, config)
        if self._total_steps:
            self._compile(state)
        experiment, total = self._experiment, self._total_steps
        self._log_due = Due(experiment.log_every, total)
        self._eval_due = Due(experiment.eval_every, total)
        self._save_due = Due(experiment.saving.every, total)
        self._begin_batches()
        enter = self._stack.enter_context
        self._stop_request = enter(StopRequest())
        enter(jax.transfer_guard("disallow"))
        enter(self._clock.spending("step"))
        self._watchdog = enter(Watchdog(experiment.hang_after or None))
        self._profile = enter(self._new_profile())
        if not self._total_steps and not self._progress["results"]:  # of weights as they came
            self._evaluate(state)
            self._save(state, must=True)
        self._profile.begin(self.step, state)
        return state

    def _restored(self) -> TrainState:
        self._lease.check()
        found = restore_newest(
            self._checkpoints, self._program.shapes, self._program.shardings, processes.say
        )
        if not found:
            with self._clock.spending("compile"):
                self.step, self._progress = 0, dict(_START)
                return self._program.init(self._initial_weights())
        self.step, state, metadata = found
        if metadata["fingerprint"] != self._program.metadata["fingerprint"]:
            raise DataError(f"the training data are not those that {self._workdir} began with")
        made = partial(self._program.updates_made, state)
        self._progress = rollbacks.dated(metadata["progress"], made)
        return state

    def _initial_weights(self) -> Mapping[str, Any]:
        """What config.init_from names, the same in all processes; nothing where it is None."""
        experiment = self._experiment
        if experiment.init_from is None:
            return {}
        initial = initial_weights(
            experiment.network,
            self._program.metadata["image_shape"],
            experiment.init_from,
            experiment.class_names,
        )
        processes.check_same({"the weights of config.init_from": initial.digest})
        processes.say(initial.sentence)
        return initial.variables

    def _record(self) -> None:
        """Writes config.json, and resumes the clock of goodput.json."""
        if processes.is_first():
            modified = self._experiment.train.source.modified
            metadata = {
                **self._program.metadata,
                **({"data_modified": modified[0]} if modified else {}),
            }
            before = self._before.config if self._before and self.step else None
            self._lease.check()
            run_folder.record(self._workdir, metadata, before)
        processes.check_shared(self._workdir / "config.json")
        path = self._workdir / "goodput.json" if processes.is_first() else None
        self._clock.resume(path, self._progress["seconds"])

    def _compile(self, state: TrainState) -> None:
        platform = sharding.platform(self._experiment.mesh)
        autotuning = Autotuning(self._workdir / "autotuning", platform)
        with self._clock.spending("compile"):
            seconds = self._program.compile(self.step, autotuning.compile)
            self._lease.check()
            autotuning.write()
            self._program.prepare(state)
        self._clock.reach("compiled")
        saved = compilation_cache.saved_seconds()
        if self.step:
            self._log.say(f"resumed from step {self.step:,} of {self._total_steps:,}")
        self._log.say(
            f"the training step compiled in {seconds:.1f} s"
            + (f" (programs kept from earlier save at least {saved:.0f} s)" if saved >= 1 else "")
            + f"; the run is in {self._workdir}"
        )

    def _begin_batches(self) -> None:
        """Goes on with the batch of the next step."""
        self._batches = self._program.batches(
            self.step, self._total_steps, self._progress["data_offset"], self._steps_at
        )
        self._log.begin(self.step)
        self._logged = self.step

    def _new_profile(self) -> Profile:
        @contextlib.contextmanager
        def spending() -> Iterator[None]:
            self._lease.check()
            with self._watchdog.pause(), self._clock.spending("save"):
                yield

        return Profile(
            self._experiment.profiled,
            self._workdir / "profile",
            self._log.say,
            lambda: self._program.compiled(
                self.step - 1, self._program.steps_per_dispatch
            ).as_text(),
            spending,
        )

    # The loop.

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """The batch of each step that is left, or of several; those after a rollback are others."""
        while self.step < self._total_steps and not self._hooks.is_stopped:
            with jax.profiler.StepTraceAnnotation("train", step_num=self.step):
                with self._clock.spending("data_wait"):
                    batch = next(self._batches)
                yield batch

    def after(self, state: TrainState) -> TrainState:
        """Logs, evaluates, saves, stops and goes back, as it is due after the steps of a batch.

        Returns the state for the next update. Raises Interrupted when a signal has asked the run to
        end and it is saved, and DivergedError when it has diverged too often.
        """
        self.step += self._steps_at(self.step)
        self._profile.end(self.step, state)
        if self._log.is_silent:  # what is only dispatched tells nothing of the speed
            jax.block_until_ready(state)
        self._clock.reach("first_step")
        self._log.stepped(self.step, self._epoch)
        self._watchdog.alive(self.step)
        signal, evaluates = self._stop_request(), self._eval_due(self.step)
        if signal:
            self._lease.announce_end()
        logs = self._log_due(self.step) or evaluates
        try:
            if logs:
                state = self._log_metrics(state)
            improved = self._evaluate(state) if evaluates else False
            ends = bool(signal) or (logs and self._hooks.end_the_run())
            if self._save_due(self.step, may_wait=not logs) or improved or ends:
                self._save(state, must=ends)
        except DivergedError as trouble:
            return self._roll_back(state, trouble)
        if signal:
            raise Interrupted(
                f"stopped after step {self.step} of {self._total_steps} and saved; the same "
                f"command with {shlex.quote(f'--workdir={self._workdir}')} resumes it",
                SIGNAL_EXIT_CODES[signal],
            )
        if self._hooks.error:
            raise self._hooks.error
        self._profile.begin(self.step, state)
        return state

    def _steps_at(self, step: int) -> int:
        """How many steps are one dispatch from a step on: so many that nothing is due before all.

        A pure function of the step, so that a resumed run has the same dispatches.
        """
        count = self._program.steps_per_dispatch
        dues = (self._log_due, self._eval_due, self._save_due)
        traced, within = self._experiment.profiled, range(step + 1, step + count)
        is_due = any(due.at(step) for step in within for due in dues)
        return 1 if is_due or traced.start in within or traced.stop in within else count

    @property
    def _epoch(self) -> float:
        return self.step / self._experiment.length.steps_per_epoch

    def _log_metrics(self, state: TrainState) -> TrainState:
        """Notes the metrics of the steps since the last time."""
        skipped = self._program.skipped(state)
        if skipped >= self._experiment.divergence.max_skipped:
            raise DivergedError(
                f"the updates of steps {self.step - skipped + 1} to {self.step} were not finite or "
                "too large"
            )
        state, row = self._program.take_metrics(state)
        row["learning_rate"] = self._program.last_learning_rate(state)
        lap = self._clock.lap(self.step - self._logged)
        self._log.training(self.step, self._epoch, row, lap)
        self._logged = self.step
        steps_per_second, data_wait = lap
        speed = self._experiment.batch_size * steps_per_second
        row |= {"images_per_second": speed, "data_wait": data_wait}
        with self._watchdog.pause():
            self._hooks.on_log({"step": self.step, "epoch": self._epoch, **row})
        self._write_clock(every=10)
        if failure := self._checkpoints.failure():  # reported as soon as it is known
            with self._saving(must=False):
                raise failure
        return state

    def _evaluate(self, state: TrainState) -> bool:
        """Evaluates; whether the results are the best until now."""
        with self._clock.spending("evaluate"):
            alive = partial(self._watchdog.alive, self.step)
            results = self._program.evaluate(state, alive)
        if not all(math.isfinite(row["loss"]) for row in results.values()):
            raise DivergedError(f"the evaluation's loss after step {self.step} is not finite")
        self._log.evaluation(self.step, self._epoch, results)
        self._progress["results"] = results
        with self._watchdog.pause():
            self._hooks.on_evaluation({"step": self.step, "epoch": self._epoch, **results})

        metric, best = self._experiment.saving.best_metric, self._progress["best"]
        weights = best_of(results, metric)
        improved = not best or is_better(results[weights][metric], best[metric], metric)
        if improved:
            self._progress["best"] = {"step": self.step, "weights": weights, **results[weights]}
        return improved

    def _save(self, state: TrainState, must: bool = False) -> None:
        """Starts saving; an error ends the run if the config says so or it `must` be saved."""
        jax.block_until_ready(state)
        with self._clock.spending("save"), jax.transfer_guard("allow"):
            if not self._program.is_finite(state):
                raise DivergedError(f"the state after step {self.step} is not finite")
            with self._saving(must=False), self._watchdog.pause():  # a slow disk is no hang
                self._checkpoints.wait()  # the last time's failure: this is the next try
            must = must or self.step == self._total_steps
            has_rows = self._log.flush()  # in process 0
            self._progress["seconds"] = self._clock.totals
            # A copy: it is written in the background, while training continues.
            metadata = {**self._program.metadata, "progress": dict(self._progress)}
            with self._saving(must), self._watchdog.pause():
                if not must and not processes.from_first(has_rows):
                    # Resumed from here, the run would never write them again.
                    why = "its rows of metrics.jsonl can't be written"
                    raise CheckpointError(f"checkpoint of step {self.step} not saved: {why}")
                self._checkpoints.save(self.step, state, metadata)
                if must:
                    self._checkpoints.wait()
            self._write_clock()

    def _write_clock(self, every: float = 0.0) -> None:
        self._lease.check()
        self._clock.write(every)

    @contextlib.contextmanager
    def _saving(self, must: bool) -> Iterator[None]:
        """Tells that a checkpoint could not be saved, unless that is to end the run."""
        try:
            yield
        except CheckpointError as error:
            if must or self._experiment.saving.on_error == "stop":
                raise
            self._log.say(f"{error}; training continues until the next one is due")

    def _roll_back(self, state: TrainState, trouble: DivergedError) -> TrainState:
        """Goes back to the last good checkpoint, and on from there with the examples to come.

        Raises DivergedError where `rollbacks` has it that this is once too often.
        """
        within, before = self._experiment.divergence.within, self._progress
        updates, diverged_at_step = self._program.updates_made(state), self.step
        jax.tree.map(lambda x: x.delete(), state)  # its memory is needed for the other one
        recent = rollbacks.recent(before, updates, within)
        if recent >= self._experiment.divergence.max_rollbacks:
            with contextlib.suppress(CheckpointError):
                self._checkpoints.wait()
            raise rollbacks.too_many(trouble, recent, within, self._checkpoints.steps())
        with (
            jax.transfer_guard("allow"),
            self._clock.spending("lost"),
            self._watchdog.pause(),
        ):
            state = self._program.reset_skipped(self._restored())
        self._clock.roll_back(self._progress["seconds"])
        self._progress |= rollbacks.after(before, updates, diverged_at_step - self.step)
        self._log.say(
            f"{trouble}: back to step {self.step}, and on with the examples that come after those"
        )
        self._log.cut(self.step)
        self._begin_batches()
        return state

    # The end.

    def finish(self) -> dict[str, Any]:
        """Writes and returns what summary.json holds."""
        with self._watchdog.pause(), self._clock.spending("save"):
            self._checkpoints.wait()
        self._write_clock()
        steps_per_second, data_wait = self._clock.rate(self.step)
        summary = {
            "finished": self.step == self._total_steps,
            "step": self.step,
            "seconds": sum(self._clock.totals.values()),
            "goodput": self._clock.numbers(),
            "images_per_second": self._experiment.batch_size * steps_per_second,
            "data_wait": data_wait,
            "rollbacks": self._progress["rollbacks"],
            **self._progress["results"],
            "best": self._progress["best"],
        }
        if processes.is_first():
            try:
                write_json(self._workdir / "summary.json", summary)
            except OSError as error:  # it can be rebuilt
                self._log.say(f"summary.json can't be written: {error.strerror}")
        return summary
