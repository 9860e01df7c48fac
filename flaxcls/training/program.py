"""The compiled functions of a run, for the devices of its mesh: what the training loop calls."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Self

import jax
import numpy as np

from flaxcls import augment, models
from flaxcls.build import Experiment
from flaxcls.core import metrics
from flaxcls.core.adversarial import AdversarialTraining
from flaxcls.core.optim import updates_made
from flaxcls.core.state import TrainState
from flaxcls.core.step import (
    is_finite,
    make_init,
    make_train_step,
    reset_skipped,
    seed_key,
    take_metrics,
)
from flaxcls.data.resident import gather
from flaxcls.inference.evaluator import Evaluator
from flaxcls.models.kernels import kernels_for
from flaxcls.runtime import sharding
from flaxcls.training.data import RunData
from flaxcls.training.dispatch import automatic, several_steps, stacks
from flaxcls.training.head_only import HeadOnly, head_only

Compiler = Callable[[jax.stages.Lowered], jax.stages.Compiled]


class Program:
    """The functions that the loop calls, compiled; and the data that is on the devices.

    Until `prepare` nothing is put there, so that a step can be lowered for devices that this
    machine doesn't have.

    Attributes:
      metadata: what a checkpoint holds besides its arrays; JSON.
      shapes, shardings: of the state.
      head_only: what the head is trained with, where it is all that is trained; else None.
      steps_per_dispatch: how many steps are compiled as one; where that is automatic, 1 until
        `compile` has found out.
    """

    def __init__(self, experiment: Experiment, data: RunData):
        mesh, source = experiment.mesh, experiment.train.source
        self._mesh, self._data = mesh, data
        self._sizes = experiment.train.sizes
        found = head_only(experiment, data)
        self.head_only = found if isinstance(found, HeadOnly) else None
        self._not_once = found if isinstance(found, str) else None
        self._input = self.head_only.train if self.head_only else data.train
        self._arrays: Any = None  # of the input, on the devices
        self._make_evaluator = partial(_evaluator, experiment, data, self.head_only)
        self._evaluator: Evaluator | None = None
        self.metadata = {
            "config": experiment.config,
            "class_names": source.class_names,
            "source_shape": source.image_shape,
            "image_shape": experiment.evaluation.image_shape(),
            "mean": data.mean,
            "std": data.std,
            "class_weights": data.class_weights,
            "class_counts": data.class_counts,
            "fingerprint": source.fingerprint,
        }

        # The state: shapes, then shardings; the arrays come with `init` or from a checkpoint.
        self._first_images = data.first_images
        self._rng = np.asarray(jax.random.key_data(seed_key(experiment.seed)))
        init_normalized = make_init(
            experiment.network,
            experiment.optimizer,
            num_classes=len(experiment.class_names),
            ema=experiment.ema_decay is not None,
        )

        def init(rng: jax.Array, images: jax.Array, weights: Mapping[str, Any]) -> TrainState:
            normalized = augment.normalize(images, data.mean, data.std)
            return init_normalized(rng, normalized, weights)

        self.shapes = jax.eval_shape(init, self._rng, self._first_images, {})
        rules = models.partition_rules(experiment.network)
        self.shardings = sharding.shardings(mesh, self.shapes, rules)

        # The functions.
        self.steps_per_dispatch = experiment.steps_per_dispatch or 1
        self._is_automatic = experiment.steps_per_dispatch is None and bool(self._input.arrays)
        update = make_update(experiment, self.metadata, sharding.platform(mesh), self.head_only)
        update = kernels_for(mesh, update)
        state = self.shardings
        self._init = jax.jit(init, out_shardings=state)
        self._jitted_step = jax.jit(update, donate_argnums=0, out_shardings=state)
        self._train_steps: dict[Any, jax.stages.Compiled] = {}  # by `_kind` of the batch
        self._batches: Iterator[dict[str, jax.Array]] | None = None
        self._take_metrics = jax.jit(take_metrics, donate_argnums=0, out_shardings=(state, None))
        self._rate = jax.jit(experiment.learning_rate)
        self._is_finite = jax.jit(is_finite, out_shardings=sharding.everywhere(mesh))
        self._reset_skipped = jax.jit(reset_skipped, donate_argnums=0, out_shardings=state)

    @classmethod
    def open(cls, experiment: Experiment, *arguments: Any, **options: Any) -> Self:
        """The program with its data, opened as `RunData` does with the other arguments."""
        program = cls(experiment, RunData(experiment, *arguments, **options))
        if not program.head_only:
            program._open_data()
        return program

    def describe_input(self) -> str:
        """The input of the training in words, with the memory it takes."""
        if self.head_only:
            return self.head_only.describe()
        copies = sharding.copies(self._arrays["image"]) if self._arrays else 1
        on_devices = f" on each of {copies} devices" if copies > 1 else ""
        text = self._data.train.describe() + on_devices + self._sizes.describe()
        if self._not_once:
            text += (
                "\nonly the head is trained, but what is below is computed in every step, not "
                f"once: {self._not_once}"
            )
        return text

    def prepare(self, state: TrainState) -> None:
        """Computes, once, what of the network's work is the same in every step; mostly nothing.

        Puts the data on the devices where that is still to be done.

        `update` and `evaluate` see to it themselves; it may take as long as an epoch.
        """
        if self._evaluator is None:
            if self.head_only:
                self.head_only.compute(state.variables)
            self._open_data()

    def _open_data(self) -> None:
        """Puts on the devices what is kept there of both splits."""
        self._arrays = sharding.replicate(self._mesh, self._input.arrays)
        self._evaluator = self._make_evaluator()

    def compile(self, start: int = 0, compiler: Compiler = jax.stages.Lowered.compile) -> float:
        """Compiles the training step for every image size from step `start` on; in seconds.

        Also the one of several steps, if they are dispatched together.
        """
        began = time.perf_counter()
        for begin in (start, *(begin for begin in self._sizes.begins if begin > start)):
            compiled = self.compiled(begin, compiler=compiler)
        if self._is_automatic:
            self.steps_per_dispatch = automatic(compiled, sharding.platform(self._mesh))
        if self.steps_per_dispatch > 1:
            self.compiled(start, self.steps_per_dispatch, compiler)
        return time.perf_counter() - began

    def compiled(
        self, step: int = 0, count: int = 1, compiler: Compiler = jax.stages.Lowered.compile
    ) -> jax.stages.Compiled:
        """The training step, or `count` of them, for batches as that of a step.

        It is compiled now, by the `compiler`, if it has not been.
        """
        kind = _kind(self.step_arguments(step, count)[2])
        if kind not in self._train_steps:
            self._train_steps[kind] = compiler(self.lower(step, count))
        return self._train_steps[kind]

    def lower(self, step: int = 0, count: int = 1) -> jax.stages.Lowered:
        """The training step, or `count` of them, for batches as that of a step; not compiled."""
        return self._jitted_step.lower(*self.step_arguments(step, count))

    def step_arguments(self, step: int = 0, count: int = 1) -> tuple[TrainState, Any, Any]:
        """The shapes, with their shardings, of `update`'s state, data on the devices and batch.

        The batch is that of a step; with a `count` above 1 a stack of so many.
        """
        struct, stack = jax.ShapeDtypeStruct, (count,) if count > 1 else ()
        split = sharding.batch_sharding(self._mesh, stacked=count > 1)
        return (
            jax.tree.map(
                lambda x, named: struct(x.shape, x.dtype, sharding=named),
                self.shapes,
                self.shardings,
            ),
            jax.tree.map(
                lambda x: struct(x.shape, x.dtype, sharding=sharding.everywhere(self._mesh)),
                self._input.arrays,
            ),
            {
                name: struct((*stack, *shape), dtype, sharding=split)
                for name, (shape, dtype) in self._input.batch_shapes(step).items()
            },
        )

    def init(self, weights: Mapping[str, Any] = {}) -> TrainState:
        """The state before the first step, with `weights` as in `make_init`, if any."""
        return self._init(self._rng, self._first_images, weights)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of the update number `step`, counted from 0, on the devices."""
        return sharding.split_batch(self._mesh, self._input.batch(step))

    def batches(
        self,
        start: int,
        stop: int,
        offset: int = 0,
        steps_at: Callable[[int], int] = lambda step: 1,
    ) -> Iterator[dict[str, jax.Array]]:
        """The batches of the updates `start` to `stop` - 1, made ahead of time.

        Their examples are those that come `offset` steps later. From a step on `steps_at(step)` of
        them are one stack. Ends the batches made until now.
        """
        self._end_batches()
        batches = stacks(self._input.batches(start, stop, offset), start, steps_at)
        self._batches = sharding.prefetch(self._mesh, batches)
        return self._batches

    def update(self, state: TrainState, batch: dict[str, jax.Array]) -> TrainState:
        """One step, or those of a stack of batches; `state` is donated.

        It is compiled now if `compile` has not been called.
        """
        self.prepare(state)
        step = self._train_steps.get(_kind(batch), self._jitted_step)
        return sharding.block_on_cpu(self._mesh, step(state, self._arrays, batch))

    def take_metrics(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The means since the last time, and the state with sums of zero; `state` is donated."""
        state, sums = self._take_metrics(state)
        return state, metrics.compute(sums)

    def skipped(self, state: TrainState) -> int:
        """The updates skipped in a row until now."""
        return int(jax.device_get(state.skipped))

    def reset_skipped(self, state: TrainState) -> TrainState:
        """The state with no update skipped until now; `state` is donated."""
        return self._reset_skipped(state)

    def updates_made(self, state: TrainState) -> int:
        """How many updates there were until now, without those skipped."""
        return int(jax.device_get(updates_made(state.opt_state)))

    def learning_rate(self, step: int) -> float:
        """That of the update number `step`, counted from 0 without skipped ones."""
        with jax.transfer_guard("allow"):
            return float(self._rate(step))

    def last_learning_rate(self, state: TrainState) -> float:
        """That of the last update; the schedule waits while updates are skipped."""
        return self.learning_rate(max(self.updates_made(state) - 1, 0))

    def evaluate(
        self, state: TrainState, alive: Callable[[], None] = lambda: None
    ) -> dict[str, dict[str, float]]:
        """The exact metrics of the parameters as "eval" and, where kept, their average as "ema".

        `alive` is called after every batch.
        """
        self.prepare(state)
        return self._evaluator.results(state.variables, state.ema, alive)

    def is_finite(self, state: TrainState) -> bool:
        return bool(self._is_finite(state))

    def close(self) -> None:
        """Ends what makes the batches."""
        self._end_batches()
        self._data.close()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _end_batches(self) -> None:
        if self._batches is not None:
            self._batches.close()


def _evaluator(experiment: Experiment, data: RunData, only: HeadOnly | None) -> Evaluator:
    return Evaluator(
        experiment.mesh,
        only.network if only else experiment.network,
        experiment.loss.likelihood,
        only.evaluation if only else data.evaluation,
        batch_size=experiment.eval_batch_size,
        mean=None if only else data.mean,
        std=None if only else data.std,
        objective=experiment.loss.objective(data.class_weights, data.class_counts),
        balanced_accuracy=experiment.saving.best_metric == "balanced_accuracy",
        tta=experiment.tta,
    )


def make_update(
    experiment: Experiment,
    metadata: Mapping[str, Any],
    platform: str,
    only: HeadOnly | None = None,
) -> Callable[[TrainState, Any, dict[str, jax.Array]], TrainState]:
    """Returns `update(state, data, batch) -> state`: a run's training step and its input.

    Of a stack of batches it makes all steps.

    `metadata` is the Program's and `platform` what the step is for, as in `make_train_step`; `data`
    are the arrays of the input on the devices, {} where it is streamed. With `only` the input are
    features.
    """
    mean, std = metadata["mean"], metadata["std"]
    augmentation = augment.build(experiment.augmentations, mean=mean, std=std)
    method = experiment.adversarial
    train_step = make_train_step(
        only.network if only else experiment.network,
        experiment.loss.with_weights(metadata["class_weights"], metadata["class_counts"]),
        experiment.optimizer,
        (lambda key, batch: batch) if only else augmentation,
        num_classes=len(metadata["class_names"]),
        frozen=experiment.frozen,
        freeze_batch_stats=experiment.freeze_batch_stats,
        batch_norm_group=experiment.batch_norm_group,
        ema_decay=experiment.ema_decay,
        gradient_accumulation=experiment.gradient_accumulation,
        max_grad_norm=experiment.divergence.max_grad_norm,
        platform=platform,
        batch_shards=sharding.batch_parts(experiment.mesh),
        adversarial=AdversarialTraining(method, mean, std) if method else None,
    )

    def update(state, data, batch):
        return train_step(state, gather(data, batch))

    return several_steps(update)


def _kind(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """What the compiled step depends on: the shape of the batch's images, or of their indices."""
    return batch["image" if "image" in batch else "index"].shape
