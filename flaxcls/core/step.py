"""Initialisation, one update and one evaluation batch: pure functions, no I/O, no devices."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from flaxcls import models
from flaxcls.core import metrics
from flaxcls.core.adversarial import AdversarialTraining
from flaxcls.core.optim import ema_update
from flaxcls.core.state import TrainState
from flaxcls.core.update_rules import path_name
from flaxcls.models.batch_norm_groups import batch_norm_in_groups
from flaxcls.models.layers import batch_stats_frozen
from flaxcls.models.projected_batch_norm import batch_norm_of_projections

Batch = dict[str, jax.Array]
Loss = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]

_ATTACK = 2**32 - 1  # folded into a step's key for dropout, whose parts are counted from 0


def seed_key(seed: int) -> jax.Array:
    """The key that all randomness of a run on the devices comes from; `seed` is below 2**64.

    JAX's own keys know 32 bits of a seed: 2**40 would be 0.
    """
    high, low = divmod(seed, 2**32)
    key = jax.random.key(low)
    return jax.random.fold_in(key, high) if high else key


def make_init(
    model: nn.Module, optimizer: optax.GradientTransformation, *, num_classes: int, ema: bool
) -> Callable[[jax.Array, jax.Array], TrainState]:
    """Returns `init(rng, images, weights={}) -> TrainState`.

    `rng` is uint32 key data; `images` float32 [B, H, W, C] are normalised training images, for the
    models whose first weights depend on the data. `weights`, {"params", "batch_stats"}, are what
    some of the variables, or all, begin with instead of what the model initialises.
    """

    def init(rng: jax.Array, images: jax.Array, weights: Mapping[str, Any] = {}) -> TrainState:
        params_key, dropout_key = jax.random.split(jax.random.wrap_key_data(rng))
        keys = {"params": params_key, "dropout": dropout_key}
        variables = dict(model.init(keys, images[:1], train=False))
        variables = models.initialize_from_data(model, variables, images)
        variables = _replaced(variables, weights)
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            rng=rng,
            params=params,
            batch_stats=batch_stats,
            opt_state=optimizer.init(params),
            ema={"params": params, "batch_stats": batch_stats} if ema else {},
            metrics={
                **zero_metrics(num_classes),
                "grad_norm": (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)),
                "broken_images": (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
                "skipped_updates": (jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)),
            },
            skipped=jnp.zeros((), jnp.int32),
        )

    return init


def _replaced(tree: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with those leaves that are `given`."""
    return {
        name: _replaced(value, given.get(name, {}))
        if isinstance(value, Mapping)
        else given.get(name, value)
        for name, value in tree.items()
    }


def step_keys(key: jax.Array, step: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the augmentation and the dropout of a step are keyed by, of the run's own key."""
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
    return augment_key, dropout_key


def augmentation_key(key: jax.Array, part: int | jax.Array, parts: int) -> jax.Array:
    """What the augmentation of a part of a batch is keyed by, of the batch's own key."""
    return key if parts == 1 else jax.random.fold_in(key, part)


def zero_metrics(num_classes: int) -> metrics.Metrics:
    """What the sums of `classification_metrics` start from."""
    per_class = jax.ShapeDtypeStruct((1, num_classes), jnp.float32)
    per_example = jax.ShapeDtypeStruct((1,), jnp.float32)
    return metrics.zeros_like(
        jax.eval_shape(
            metrics.classification_metrics, per_class, per_class, per_example, per_example
        )
    )


def take_metrics(state: TrainState) -> tuple[TrainState, metrics.Metrics]:
    """The metrics that a state has summed up, and the state with sums of zero."""
    return state.replace(metrics=metrics.zeros_like(state.metrics)), state.metrics


def reset_skipped(state: TrainState) -> TrainState:
    """The state with no update skipped until now."""
    return state.replace(skipped=jnp.zeros_like(state.skipped))


def is_finite(state: TrainState) -> jax.Array:
    """Whether all floating-point values of a state are finite; bool []."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]))


def make_train_step(
    model: nn.Module,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    augment: Callable[[jax.Array, Batch], Batch],
    *,
    num_classes: int,
    frozen: Collection[str] = (),
    freeze_batch_stats: bool = False,
    batch_norm_group: int | None = None,
    ema_decay: float | None,
    gradient_accumulation: int,
    max_grad_norm: float,
    platform: str,
    batch_shards: int = 1,
    adversarial: AdversarialTraining | None = None,
) -> Callable[[TrainState, Batch], TrainState]:
    """Returns `train_step(state, batch) -> state`, one update.

    `batch` has "image" uint8 [B, H, W, C], "label", "index" and "epoch" int32 [B]. Its metrics are
    added to the state's.

    An update that is not finite or too large is skipped: one with a NaN or infinity in the loss,
    gradient or statistics of BatchNorm, or a gradient whose L2 norm exceeds `max_grad_norm`.
    The state then keeps its parameters, statistics, averages and optimizer, whose schedule waits;
    the step counts in "skipped_updates" and in no mean.

    With `gradient_accumulation` = k the batch is computed in k parts and updates once. The gradient
    is that of the weighted mean loss over the whole batch, so that without BatchNorm and dropout
    the update equals that of the whole batch. BatchNorm normalises each part by its own statistics;
    its running statistics move once, by the mean over the parts. Dropout and augmentation, which
    each part has to itself, draw other random numbers. The devices sum up the gradient once, after
    the last part, and nothing else but the statistics of BatchNorm without groups; where parameters
    are split (FSDP, `mesh.model`) each part gathers what it uses.

    With `batch_norm_group` = g BatchNorm takes its statistics of each g neighbours in the batch, as
    in `batch_norm_in_groups`. Parts are then of whole groups, so that the update is that of the
    whole batch with BatchNorm, too. B / k must be a multiple of g.

    Nothing is differentiated by the parameters whose paths are `frozen`, so that there is no
    backward pass below the lowest of the others. With `freeze_batch_stats` BatchNorm normalises by
    its running statistics, which stay as they are; dropout is as ever.

    `platform`, "cpu", "gpu" or "tpu", is what the step is for, not what it is compiled on: the
    results are the same but for rounding, what is fast differs. `batch_shards` is the number of
    devices that the batch is split over.

    With `adversarial` the network is attacked first, for images to train on. What is drawn for an
    example is the same in any part of a batch. "accuracy" is that on the adversarial images, or
    with TRADES on the others.
    """

    def trained(params: Any) -> Any:
        """The parameters, with nothing to differentiate by in those that are frozen."""
        return jax.tree.map_with_path(
            lambda path, x: jax.lax.stop_gradient(x) if path_name(path) in frozen else x, params
        )

    def batch_norm(examples: int) -> contextlib.AbstractContextManager:
        if freeze_batch_stats:
            return batch_stats_frozen()
        groups = examples // batch_norm_group if batch_norm_group else 1
        contexts = contextlib.ExitStack()
        if platform == "tpu" and groups in (1, batch_shards):
            contexts.enter_context(batch_norm_of_projections(groups))  # asked first
        if batch_norm_group:
            contexts.enter_context(batch_norm_in_groups(groups))
        return contexts

    def forward(params, batch_stats, key, images):
        with batch_norm(len(images)):
            logits, updates = model.apply(
                {"params": trained(params), "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
        return logits, updates.get("batch_stats", {})

    def predict(state, key, images, train) -> Any:
        if train:
            return forward(state.params, state.batch_stats, key, images)[0]
        return model.apply(state.variables, images, train=False)

    def loss_sum(params, batch_stats, key, batch):
        network = partial(forward, params, batch_stats, key)
        logits, updates = network(batch["image"])
        losses, weights = loss(logits, batch["label"])
        if adversarial and "adversarial" in batch:
            other, other_updates = network(batch["adversarial"])
            losses += adversarial.penalty(logits, other)
            updates = jax.tree.map(lambda x, y: (x + y) / 2, updates, other_updates)
        pairs = metrics.example_metrics(logits, batch["label"], losses, weights)
        return jnp.sum(losses * weights), (updates, pairs)

    def train_step(state: TrainState, batch: Batch) -> TrainState:
        augment_key, dropout_key = step_keys(jax.random.wrap_key_data(state.rng), state.step)

        def part(index, part_batch):
            labels = jax.nn.one_hot(part_batch["label"], num_classes)
            part_key = augmentation_key(augment_key, index, gradient_accumulation)
            part_batch = augment(part_key, {**part_batch, "label": labels})
            key = jax.random.fold_in(dropout_key, index)
            if adversarial:
                attack_key = jax.random.fold_in(dropout_key, _ATTACK)
                network = partial(predict, state, key)
                part_batch = adversarial(attack_key, network, loss, part_batch, platform)
            grads, rest = jax.grad(loss_sum, has_aux=True)(
                state.params, state.batch_stats, key, part_batch
            )
            return grads, *rest

        run = batch_norm_group or 1
        grads, batch_stats, sums = _sum_over_parts(
            part, batch, gradient_accumulation, run, platform
        )
        sums = metrics.over_examples(sums)
        weight = sums["loss"][1]
        grads = jax.tree.map(lambda g: g / weight, grads)
        if freeze_batch_stats:  # not their mean over the parts, which rounds
            batch_stats = state.batch_stats
        else:
            batch_stats = _means(batch_stats, gradient_accumulation, state.batch_stats)

        # A norm is finite only if every element is.
        grad_norm, stats_norm = optax.tree.norm(grads), optax.tree.norm(batch_stats)
        finite = jnp.isfinite(sums["loss"][0]) & jnp.isfinite(stats_norm)
        accepted = finite & (grad_norm <= max_grad_norm)  # false if the norm is NaN

        def updated(state: TrainState) -> TrainState:
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params, ema = optax.apply_updates(state.params, updates), state.ema
            if ema_decay is not None:
                averaged = {"params": params, "batch_stats": batch_stats}
                ema = ema_update(state.ema, averaged, state.step, ema_decay)
            return state.replace(
                params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema
            )

        one = accepted.astype(jnp.int32)
        sums = {**sums, "grad_norm": (grad_norm, one)}
        broken = jnp.sum(batch.get("broken", 0), dtype=jnp.int32)
        counts = {"broken_images": broken, "skipped_updates": 1 - one}
        sums = {
            **_where(accepted, sums, metrics.zeros_like(sums)),
            **{name: (number, jnp.ones_like(one)) for name, number in counts.items()},
        }
        return _if(accepted, updated, state, platform).replace(
            step=state.step + 1,
            skipped=jnp.where(accepted, 0, state.skipped + 1),
            metrics=metrics.add(state.metrics, sums),
        )

    return train_step


def _means(sums: Any, parts: int, like: Any) -> Any:
    """The means over the parts and, where each group has its own, [G,C], over the groups."""

    def mean(total: jax.Array, old: jax.Array) -> jax.Array:
        return total / parts if total.shape == old.shape else total.mean(0) / parts

    return jax.tree.map(mean, sums, like)


def _where(condition: jax.Array, true: Any, false: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), true, false)


def _if(condition: jax.Array, function: Callable[[Any], Any], tree: Any, platform: str) -> Any:
    """`function(tree)` or, if the condition is false, `tree` as it is.

    Selecting every element costs nothing where it is fused into what computes it, on GPUs and
    TPUs, where a branch would have to be waited for. On a CPU it keeps XLA from updating the arrays
    in place: ResNet-18's took 46 to 50 instead of 17 ms, and 17 ms in a branch (2 cores, jax
    0.10.2).
    """
    if platform == "cpu":
        return jax.lax.cond(condition, function, lambda tree: tree, tree)
    return _where(condition, function(tree), tree)


def _sum_over_parts(part: Callable, batch: Batch, parts: int, run: int, platform: str) -> Any:
    """The sum of `part(index, part_batch)` over the parts of a batch.

    Part i takes the runs i, i + parts, ... of so many neighbours each: so that a batch that is
    split over devices in longer runs of neighbours stays where it is.

    Of what a part gives nothing but the gradient is a sum over devices, added up as it is: such
    sums XLA takes out of the loop, so that they are made once (WhileLoopAllReduceCodeMotion, which
    compilers for TPUs and GPUs have; seen for v5e). Any arithmetic in between would keep them in.
    """
    if parts == 1:
        return part(0, batch)
    split = jax.tree.map(lambda x: x.reshape(-1, parts, run, *x.shape[1:]), batch)

    def take(index):
        return jax.tree.map(lambda x: jnp.take(x, index, axis=1).reshape(-1, *x.shape[3:]), split)

    def body(total, index):
        return jax.tree.map(jnp.add, total, part(index, take(index))), None

    shapes = jax.eval_shape(lambda: part(0, take(0)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    # XLA:CPU runs convolutions inside a loop on one thread, 12 times slower: there, no loop.
    total, _ = jax.lax.scan(body, zeros, jnp.arange(parts), unroll=platform == "cpu")
    return total


def make_eval_step(
    forward: Callable[[Any, jax.Array], jax.Array],
    loss: Loss,
    objective: Loss | None = None,
    balanced_accuracy: bool = False,
) -> Callable[[Any, Any, Batch], Any]:
    """Returns `eval_step(variables, sums, batch) -> sums`, which start as `zero_metrics`.

    `forward(variables, images)` gives the logits [B, K]. `loss` is what "loss" means; with an
    `objective`, what is trained for, its own mean is "objective", and the sums have to have a pair
    for it, as for "balanced_accuracy". `batch` has "image" uint8 [B, H, W, C], "label" int32 [B]
    and "mask" [B], 0 where an example only fills the batch up and must not count.
    """

    def eval_step(variables: Any, sums: Any, batch: Batch) -> Any:
        logits = forward(variables, batch["image"])
        targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        losses, weights = loss(logits, targets)
        new = metrics.classification_metrics(logits, targets, losses, weights, batch["mask"])
        if objective is not None:
            losses, weights = objective(logits, targets)
            other = metrics.classification_metrics(logits, targets, losses, weights, batch["mask"])
            new["objective"] = other["loss"]
        if balanced_accuracy:
            pair = metrics.balanced_accuracy(logits, batch["label"], batch["mask"])
            new["balanced_accuracy"] = pair
        return metrics.add(sums, new)

    return eval_step
