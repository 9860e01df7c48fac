"""A run under way in this process: its state, its folder, and all that a step may lead to."""

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from flaxcls import build
from flaxcls.core.schedules import parse_duration
from flaxcls.errors import CheckpointError, ConfigError, DataError, DivergedError
from flaxcls.files import write_json
from flaxcls.runs import run_folder
from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.goodput import Goodput
from flaxcls.runs.metric_log import Watch
from flaxcls.runs.recovery import restore_newest
from flaxcls.runtime import compilation_cache, processes
from flaxcls.runtime.watchdog import Watchdog
from flaxcls.training.program import Trainer


class Session:
    """A run under way: its state on the devices, its folder, and all that a step may lead to.

    It begins anew or goes on from the newest checkpoint that is whole. To be entered.

    Attributes:
      step: the number of updates made, those left out included.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        plan: build.Plan,
        trainer: Trainer,
        clock: Goodput,
        before: ConfigDict | None = None,
    ):
        self._config, self._workdir, self._plan, self._trainer = config, workdir, plan, trainer
        self._clock, self.watchdog = (
            clock,
            Watchdog(parse_duration(config.hang_after).value or None),
        )
        self._checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint.keep)
        self._restore()
        if before is not None and before.duration != config.duration:
            self._say_new_length(before)
        if processes.is_first():
            modified = plan.train_source.modified
            facts = {"data_modified": modified[0]} if modified else {}
            facts = {**trainer.facts, **facts}
            run_folder.record(workdir, config, facts, before if self.step else None)
        processes.check_shared(workdir / "config.json")
        path = workdir / "goodput.json" if processes.is_first() else None
        clock.resume(path, self._progress["seconds"])
        self._watch = Watch(
            workdir if processes.is_first() else None,
            self.step,
            plan.total_steps,
            config.batch_size,
        )
        self._watch.track(config.log_to, dict(run_folder.fields(config)))
        with clock.spending("compile"):
            seconds = trainer.compile(self.step)
        saved = compilation_cache.saved_seconds()
        if self.step:
            self._watch.say(f"resumed from step {self.step:,} of {plan.total_steps:,}")
        self._watch.say(
            f"the training step compiled in {seconds:.1f} s"
            + (f" (programs kept from earlier save at least {saved:.0f} s)" if saved >= 1 else "")
            + f"; the run is in {workdir}"
        )
        self._begin_batches()

    def _restore(self) -> None:
        """The newest checkpoint that is whole, or the beginning."""
        found = restore_newest(
            self._checkpoints, self._trainer.shapes, self._trainer.places, processes.say
        )
        if found:
            self.step, self._state, facts = found
            if facts["fingerprint"] != self._trainer.facts["fingerprint"]:
                raise DataError(f"the training data are not those that {self._workdir} began with")
            self._progress = facts["progress"]
        else:
            with self._clock.spending("compile"):
                self.step, self._state = 0, self._trainer.init()
            self._progress = {
                "seconds": {},
                "results": {},
                "best": {},
                "rollbacks": 0,
                "data_offset": 0,  # steps that the order of the examples is ahead by
            }

    def _say_new_length(self, before: ConfigDict) -> None:
        """What becomes of the learning rate when a run is made longer or shorter."""
        total, config = self._plan.total_steps, self._config
        num_examples = len(self._plan.train_source)
        planned, _ = build.length(before, num_examples)
        if self.step > total or self.step == total != planned:  # which was not to be the last one
            raise ConfigError(
                f"the run in {self._workdir} has made {self.step:,} steps already, "
                f"{'more than' if self.step > total else 'as many as'} config.duration = "
                f"{config.duration!r} asks for, {total:,}: it can be made longer, not shorter"
            )
        if self.step and total != planned:
            old = build.learning_rate(before, num_examples)
            processes.say(
                f"note: after step {self.step:,} the learning rate would have been "
                f"{float(old(self.step)):.3g} and is {self._trainer.rate(self.step):.3g}: "
                f"config.schedule now ends at step {total:,}"
            )

    def _begin_batches(self) -> None:
        """Goes on with the batches of the next step."""
        self._batches = self._trainer.batches(
            self.step, self._plan.total_steps, self._progress["data_offset"]
        )
        self._watch.begin(self.step)
        self._logged = self.step

    @property
    def _epoch(self) -> float:
        return self.step / self._plan.steps_per_epoch

    def advance(self) -> None:
        """Makes one update."""
        with self._clock.spending("data_wait"):
            batch = next(self._batches)
        self._state = self._trainer.update(self._state, batch)
        self.step += 1
        if self._watch.is_silent:  # what is only dispatched tells nothing of the speed
            jax.block_until_ready(self._state)
        self._watch.stepped(self.step, self._epoch)

    def log(self) -> None:
        """Notes the metrics of the steps since the last time."""
        self._state, row = self._trainer.take_metrics(self._state)
        skipped = self._trainer.skipped(self._state)
        if skipped >= self._config.divergence.max_skipped:
            raise DivergedError(
                f"the updates of steps {self.step - skipped + 1} to {self.step} were not finite or "
                "too large"
            )
        row["learning_rate"] = self._trainer.last_rate(self._state)
        lap = self._clock.lap(self.step - self._logged)
        self._watch.training(self.step, self._epoch, row, lap)
        self._logged = self.step
        self._clock.write(every=10)
        if failure := self._checkpoints.failure():  # told as soon as it is known
            with self._saving(must=False):
                raise failure

    def evaluate(self) -> bool:
        """Evaluates; whether the results are the best until now."""
        with self._clock.spending("evaluate"):
            alive = partial(self.watchdog.alive, self.step)
            results = self._trainer.evaluate(self._state, alive)
        if not all(math.isfinite(row["loss"]) for row in results.values()):
            raise DivergedError(f"the evaluation's loss after step {self.step} is not finite")
        self._watch.evaluation(self.step, self._epoch, results)
        self._progress["results"] = results

        metric, best = self._config.checkpoint.best_metric, self._progress["best"]
        sign = -1 if metric == "loss" else 1
        weights, result = max(results.items(), key=lambda item: sign * item[1][metric])
        improved = not best or sign * result[metric] > sign * best[metric]
        if improved:
            self._progress["best"] = {"step": self.step, "weights": weights, **result}
        return improved

    def save(self, must: bool = False) -> None:
        """Starts saving; an error ends the run if the config says so or it `must` be saved."""
        jax.block_until_ready(self._state)
        with self._clock.spending("save"), jax.transfer_guard("allow"):
            if not self._trainer.is_finite(self._state):
                raise DivergedError(f"the state after step {self.step} is not finite")
            with self._saving(must=False), self.watchdog.pause():  # a slow disk is no hang
                self._checkpoints.wait()  # the last time's failure: this is the next try
            self._watch.flush()  # what a checkpoint counts as done has its rows
            self._progress["seconds"] = self._clock.totals
            # A copy: it is written in the background, while training goes on.
            facts = {**self._trainer.facts, "progress": dict(self._progress)}
            must = must or self.step == self._plan.total_steps
            with self._saving(must), self.watchdog.pause():
                self._checkpoints.save(self.step, self._state, facts)
                if must:
                    self._checkpoints.wait()
            self._clock.write()

    @contextlib.contextmanager
    def _saving(self, must: bool) -> Iterator[None]:
        """Tells that a checkpoint could not be saved, unless that is to end the run."""
        try:
            yield
        except CheckpointError as error:
            if must or self._config.checkpoint.on_error == "stop":
                raise
            self._watch.say(f"{error}; training goes on until the next one is due")

    def roll_back(self, trouble: DivergedError) -> None:
        """Goes back to the last good checkpoint, and on from there with the examples to come."""
        rollbacks, offset = self._progress["rollbacks"] + 1, self._progress["data_offset"]
        diverged, self._state = self.step, None  # its memory is needed for the other one
        if rollbacks > self._config.divergence.max_rollbacks:
            with contextlib.suppress(CheckpointError):
                self._checkpoints.wait()
            steps = self._checkpoints.steps()
            raise DivergedError(
                f"{trouble}, after {rollbacks - 1} rollbacks; "
                + (f"the checkpoint of step {steps[-1]} is good" if steps else "nothing is saved")
                + "; a lower config.optimizer.learning_rate, a warm-up or "
                "config.optimizer.gradient_clip_norm may help"
            )
        with jax.transfer_guard("allow"), self._clock.spending("lost"), self.watchdog.pause():
            self._restore()
            self._state = self._trainer.forgive(self._state)
        self._clock.roll_back(self._progress["seconds"])
        self._progress["rollbacks"] = rollbacks
        self._progress["data_offset"] = offset + diverged - self.step
        self._watch.say(
            f"{trouble}: back to step {self.step}, and on with the examples that come after those"
        )
        self._watch.cut(self.step)
        self._begin_batches()

    def finish(self) -> dict[str, Any]:
        """Writes and returns what summary.json holds."""
        with self.watchdog.pause(), self._clock.spending("save"):
            self._checkpoints.wait()
        self._clock.write()
        steps_per_second, data_wait = self._clock.rate(self.step)
        summary = {
            "finished": True,
            "step": self.step,
            "seconds": sum(self._clock.totals.values()),
            "goodput": self._clock.numbers(),
            "images_per_second": self._config.batch_size * steps_per_second,
            "data_wait": data_wait,
            "rollbacks": self._progress["rollbacks"],
            **self._progress["results"],
            "best": self._progress["best"],
        }
        if processes.is_first():
            try:
                write_json(self._workdir / "summary.json", summary)
            except OSError as error:  # it can be made anew
                self._watch.say(f"summary.json can't be written: {error.strerror}")
        return summary

    def __enter__(self) -> "Session":
        self._watch.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        self._trainer.__exit__(kind, *details)
        self._watch.__exit__(kind, *details)
        try:
            self._checkpoints.close()
        except CheckpointError as error:
            if kind is None:
                raise
            self._watch.say(str(error))  # what ends the run comes first
