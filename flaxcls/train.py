"""Training, from the config to the summary; `train` tells the whole story."""

import math
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import augment, build, metrics, models, run, sharding
from flaxcls.checkpoint import Checkpoints
from flaxcls.data import resident
from flaxcls.data.decode import materialize
from flaxcls.errors import SIGNAL_EXIT_CODES, DataError, DivergedError, Interrupted
from flaxcls.evaluator import Evaluator
from flaxcls.schedules import Duration
from flaxcls.state import TrainState
from flaxcls.step import is_finite, make_init, make_train_step, take_metrics
from flaxcls.watch import Stopwatch, Watch

SAMPLE = 2000  # training images that a model may look at before its first step


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
    trainer = Trainer(config, plan, mesh)
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
    watch.say(f"compiled in {trainer.compile():.1f} s; the run is in {workdir}")
    stopwatch, logged = Stopwatch(), start
    with watch, Signals() as signals, jax.transfer_guard("disallow"):
        for step in range(start + 1, plan.total_steps + 1):
            with stopwatch.waiting():
                batch = trainer.batch(step - 1)
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
                checkpoints.close()
                raise Interrupted(
                    f"stopped after step {step} of {plan.total_steps} and saved; the same command "
                    f"with --workdir={workdir} goes on",
                    SIGNAL_EXIT_CODES[signals.received],
                )
    checkpoints.close()
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


def mesh_for(config: ConfigDict) -> Mesh:
    """The devices that a config asks for, checked against its batch."""
    part = config.batch_size // config.gradient_accumulation
    sharding.set_up_devices(config.mesh.cpu_devices, part)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch_size(mesh, part)
    return mesh


class Trainer:
    """The data on the devices, and the functions that the loop calls, compiled for them.

    Attributes:
      facts: what a checkpoint must tell besides its arrays; JSON.
      shapes, places: of the state, its shapes and shardings.
    """

    def __init__(self, config: ConfigDict, plan: build.Plan, mesh: Mesh):
        source, network = plan.train_source, plan.network
        num_classes = len(source.class_names)
        self._mesh, self._rate = mesh, plan.rate

        # The data.
        images, labels = materialize(source)
        mean, std = build.normalization(config, images)
        pipeline = resident.Resident(images, labels, batch_size=config.batch_size, seed=config.seed)
        self._data, self._batch = sharding.replicate(mesh, pipeline.arrays), pipeline.batch
        class_weights = build.class_weights(config, labels, num_classes)
        loss = build.loss(config, class_weights)
        self._evaluator = Evaluator(
            mesh,
            network,
            loss,
            *materialize(plan.eval_source),
            batch_size=config.eval.batch_size or config.batch_size,
            mean=mean,
            std=std,
        )
        self.facts = {
            "config": run.plain(config),
            "class_names": source.class_names,
            "image_shape": source.image_shape,
            "mean": mean,
            "std": std,
            "class_weights": class_weights,
            "fingerprint": source.fingerprint,
        }

        # The state: shapes, then places; the arrays come with `init` or from a checkpoint.
        self._sample = augment.normalize(jnp.asarray(images[:SAMPLE]), mean, std)
        self._rng = jax.random.key_data(jax.random.key(config.seed))
        with_ema = config.ema_decay is not None
        init = make_init(network, plan.optimizer, num_classes=num_classes, ema=with_ema)
        self.shapes = jax.eval_shape(init, self._rng, self._sample)
        self.places = sharding.shardings(mesh, self.shapes)

        # The functions.
        train_step = make_train_step(
            network,
            loss,
            plan.optimizer,
            augment.build(config.augment or (), mean=mean, std=std),
            num_classes=num_classes,
            ema_decay=config.ema_decay,
            gradient_accumulation=config.gradient_accumulation,
        )

        def update(state, data, batch):
            return train_step(state, resident.gather(data, batch))

        self._init = jax.jit(init, out_shardings=self.places)
        self._train_step = jax.jit(update, donate_argnums=0, out_shardings=self.places)
        self._take_metrics = jax.jit(
            take_metrics, donate_argnums=0, out_shardings=(self.places, None)
        )
        self._is_finite = jax.jit(is_finite)

    def compile(self) -> float:
        """Compiles the training step for just these shapes, once; returns the seconds it took."""
        start = time.perf_counter()
        state = jax.tree.map(
            lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
            self.shapes,
            self.places,
        )
        self._train_step = self._train_step.lower(state, self._data, self.batch(0)).compile()
        return time.perf_counter() - start

    def init(self) -> TrainState:
        """The state before the first step."""
        return self._init(self._rng, self._sample)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of the update number `step`, counted from 0, on the devices."""
        return sharding.split_batch(self._mesh, self._batch(step))

    def update(self, state: TrainState, batch: dict[str, jax.Array]) -> TrainState:
        """One step; `state` is used up."""
        return sharding.keep_pace(self._train_step(state, self._data, batch))

    def take_metrics(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The means since the last time, and the state that starts anew; `state` is used up."""
        state, sums = self._take_metrics(state)
        return state, metrics.compute(sums)

    def rate(self, step: int) -> float:
        """The learning rate of the update number `step`, counted from 0."""
        with jax.transfer_guard("allow"):
            return float(self._rate(step))

    def evaluate(self, state: TrainState) -> dict[str, dict[str, float]]:
        """The exact metrics of the parameters as "eval" and, where kept, their average as "ema"."""
        return self._evaluator.results(state.variables, state.ema)

    def is_finite(self, state: TrainState) -> bool:
        return bool(self._is_finite(state))


def _introduction(config: ConfigDict, plan: build.Plan, mesh: Mesh, trainer: Trainer) -> str:
    """What is going to be trained, on what, in some lines."""
    train, test = plan.train_source, plan.eval_source
    count = models.parameter_count(trainer.shapes.params)
    return (
        f"data: {train.name}, {len(train):,} images to train on ({train.split}), {len(test):,} to "
        f"evaluate on ({test.split}), {len(train.class_names)} classes\n"
        f"model: {config.model.name}, {count:,} parameters\n"
        f"devices: {sharding.describe(mesh)}\n"
        f"optimizer: {plan.treatment}\n"
        f"length: {plan.total_steps:,} steps of {config.batch_size} images, "
        f"{plan.total_steps / plan.steps_per_epoch:g} epochs"
    )


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
    checkpoints.close()
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
