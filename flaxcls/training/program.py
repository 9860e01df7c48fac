"""The data on the devices and the compiled functions of a run: what the training loop calls."""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flaxcls import augment, build
from flaxcls.build import inputs
from flaxcls.config import fields
from flaxcls.core import losses, metrics
from flaxcls.core.optim import updates_made
from flaxcls.core.state import TrainState
from flaxcls.core.step import (
    forgive,
    is_finite,
    make_init,
    make_train_step,
    seed_key,
    take_metrics,
)
from flaxcls.data.resident import gather
from flaxcls.inference.evaluator import Evaluator
from flaxcls.runtime import processes, sharding


def mesh_for(config: ConfigDict) -> Mesh:
    """The devices that a config asks for, checked against its batch."""
    part = config.batch_size // config.gradient_accumulation
    sharding.set_up_devices(config.mesh.cpu_devices, part, processes.count())
    processes.check_device_counts()
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch_size(mesh, part)
    return mesh


class Trainer:
    """The data on the devices, and the functions that the loop calls, compiled for them.

    Attributes:
      facts: what a checkpoint must tell besides its arrays; JSON.
      shapes, places: of the state, its shapes and shardings.

    Args:
      report: is told about broken images.
      normalization: mean and standard deviation, as a resumed run has them; None: by the config or
        the data.
    """

    def __init__(
        self,
        config: ConfigDict,
        plan: build.Plan,
        mesh: Mesh,
        report: Callable[[str], None] = print,
        normalization: tuple[list[float], list[float]] | None = None,
    ):
        source, network = plan.train_source, plan.network
        num_classes = len(source.class_names)
        self._mesh, self._rate = mesh, plan.rate
        self._image_sizes = plan.image_sizes

        # The data.
        rows = partial(sharding.local_rows, mesh)
        self.input = inputs.training(config, source, plan.image_sizes, report, rows)
        self._data = sharding.replicate(mesh, self.input.arrays)
        mean, std = normalization or inputs.normalization(config, source, self.input)
        class_weights = build.class_weights(config, source, num_classes)
        self._evaluator = Evaluator(
            mesh,
            network,
            losses.likelihood(config.loss.name),
            inputs.evaluation(config, plan.eval_source, rows),
            batch_size=config.eval.batch_size or config.batch_size,
            mean=mean,
            std=std,
            objective=build.objective(config, class_weights),
        )
        self.facts = {
            "config": fields.plain(config),
            "class_names": source.class_names,
            "source_shape": source.image_shape,
            "image_shape": inputs.image_shape(source, inputs.eval_image_size(config)),
            "mean": mean,
            "std": std,
            "class_weights": class_weights,
            "fingerprint": source.fingerprint,
        }

        # The state: shapes, then places; the arrays come with `init` or from a checkpoint.
        images = inputs.first_images(config, source, self.input, network)
        self._sample = np.asarray(augment.normalize(jnp.asarray(images), mean, std))
        self._rng = np.asarray(jax.random.key_data(seed_key(config.seed)))
        with_ema = config.ema_decay is not None
        init = make_init(network, plan.optimizer, num_classes=num_classes, ema=with_ema)
        self.shapes = jax.eval_shape(init, self._rng, self._sample)
        self.places = sharding.shardings(mesh, self.shapes)

        # The functions.
        update = make_update(config, plan, self.facts, sharding.platform(mesh))
        self._init = jax.jit(init, out_shardings=self.places)
        self._jitted_step = jax.jit(update, donate_argnums=0, out_shardings=self.places)
        self._train_steps: dict[Any, Callable] = {}  # compiled, by the size of the images
        self._batches: Iterator[dict[str, jax.Array]] | None = None
        self._take_metrics = jax.jit(
            take_metrics, donate_argnums=0, out_shardings=(self.places, None)
        )
        self._is_finite = jax.jit(is_finite, out_shardings=sharding.everywhere(mesh))
        self._forgive = jax.jit(forgive, donate_argnums=0, out_shardings=self.places)

    def describe_input(self) -> str:
        """The input of the training in words, with the memory it takes."""
        copies = sharding.copies(self._data["image"]) if self._data else 1
        return self.input.describe() + (f" on each of {copies} devices" if copies > 1 else "")

    def compile(self, start: int = 0) -> float:
        """Compiles the training step for every image size from step `start` on; in seconds."""
        began = time.perf_counter()
        sizes = self._image_sizes
        for begin in (start, *(begin for begin in sizes.begins if begin > start)):
            batch = self.batch(begin)
            if _image_size(batch) not in self._train_steps:
                self._train_steps[_image_size(batch)] = self.lower(batch).compile()
        return time.perf_counter() - began

    def lower(self, batch: dict[str, jax.Array]) -> jax.stages.Lowered:
        """The training step for batches of these shapes, not yet compiled."""
        state = jax.tree.map(
            lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
            self.shapes,
            self.places,
        )
        return self._jitted_step.lower(state, self._data, batch)

    def init(self) -> TrainState:
        """The state before the first step."""
        return self._init(self._rng, self._sample)

    def batch(self, step: int) -> dict[str, jax.Array]:
        """The batch of the update number `step`, counted from 0, on the devices."""
        return sharding.split_batch(self._mesh, self.input.batch(step))

    def batches(self, start: int, stop: int, offset: int = 0) -> Iterator[dict[str, jax.Array]]:
        """The batches of the updates `start` to `stop` - 1, made ahead of time.

        Their examples are those that come `offset` steps later. Ends the batches made until now.
        """
        self._end_batches()
        self._batches = sharding.prefetch(self._mesh, self.input.batches(start, stop, offset))
        return self._batches

    def update(self, state: TrainState, batch: dict[str, jax.Array]) -> TrainState:
        """One step, which is compiled now if `compile` has not been called; `state` is used up."""
        step = self._train_steps.get(_image_size(batch), self._jitted_step)
        return sharding.block_on_cpu(self._mesh, step(state, self._data, batch))

    def take_metrics(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """The means since the last time, and the state that starts anew; `state` is used up."""
        state, sums = self._take_metrics(state)
        return state, metrics.compute(sums)

    def skipped(self, state: TrainState) -> int:
        """The updates left out in a row until now."""
        return int(jax.device_get(state.skipped))

    def forgive(self, state: TrainState) -> TrainState:
        """The state with no update left out until now; `state` is used up."""
        return self._forgive(state)

    def rate(self, step: int) -> float:
        """The learning rate of the update number `step`, counted from 0 without skipped ones."""
        with jax.transfer_guard("allow"):
            return float(self._rate(step))

    def last_rate(self, state: TrainState) -> float:
        """The learning rate of the last update; the schedule waits while updates are skipped."""
        updates = int(jax.device_get(updates_made(state.opt_state)))
        return self.rate(max(updates - 1, 0))

    def evaluate(
        self, state: TrainState, alive: Callable[[], None] = lambda: None
    ) -> dict[str, dict[str, float]]:
        """The exact metrics of the parameters as "eval" and, where kept, their average as "ema".

        `alive` is called after every batch.
        """
        return self._evaluator.results(state.variables, state.ema, alive)

    def is_finite(self, state: TrainState) -> bool:
        return bool(self._is_finite(state))

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends what makes the batches."""
        self._end_batches()
        self.input.close()
        self._evaluator.close()

    def _end_batches(self) -> None:
        if self._batches is not None:
            self._batches.close()


def make_update(
    config: ConfigDict, plan: build.Plan, facts: Mapping[str, Any], platform: str
) -> Callable[[TrainState, Any, dict[str, jax.Array]], TrainState]:
    """Returns `update(state, data, batch) -> state`: a run's training step and its input.

    `facts` are those of the Trainer and `platform` is what the step is for, as in
    `make_train_step`; `data` are the arrays of the input on the devices, {} where it is streamed.
    """
    train_step = make_train_step(
        plan.network,
        build.loss(config, facts["class_weights"]),
        plan.optimizer,
        augment.build(config.augment or (), mean=facts["mean"], std=facts["std"]),
        num_classes=len(facts["class_names"]),
        ema_decay=config.ema_decay,
        gradient_accumulation=config.gradient_accumulation,
        max_grad_norm=config.divergence.max_grad_norm,
        platform=platform,
    )

    def update(state, data, batch):
        return train_step(state, gather(data, batch))

    return update


def _image_size(batch: dict[str, jax.Array]) -> int | None:
    """The height of a batch's images; None where they are on the devices already."""
    return batch["image"].shape[1] if "image" in batch else None
