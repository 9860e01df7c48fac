"""What a step computes: the same on any devices, in any number of parts, bitwise every time."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from flaxcls import augment, build, models
from flaxcls.build.accepted import options_given
from flaxcls.build.length import Length
from flaxcls.core.step import augmentation_key, make_init, make_train_step, seed_key, take_metrics
from flaxcls.models.dense import DenseNetwork
from flaxcls.models.resnet import BottleneckBlock, ResNet
from flaxcls.training.program import Program
from flaxcls.training.train import train_config as train


def mesh_of(data, fsdp):
    devices = jax.devices()[: data * fsdp]
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=types, devices=devices)


def after_steps(config, mesh, steps=4):
    """The state after some steps, and the metrics summed up over them."""
    program = Program.open(build.make_experiment(config, mesh))
    state = program.init()
    with jax.transfer_guard("disallow"):
        for step in range(steps):
            state = program.update(state, program.batch(step))
    placed = state
    state, row = program.take_metrics(state)
    return jax.device_get(state), row, program, placed


@pytest.fixture(scope="module")
def on_one_device():
    return {}


RULES = {
    "momentum": {"optimizer__name": "sgd", "optimizer__momentum": 0.9},
    # Adam divides by the size of the gradient: a larger eps keeps rounding small where it is tiny.
    "adam": {"optimizer__name": "adam", "optimizer__eps": 1e-3, "optimizer__momentum": None},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "data", "fsdp"),
    [("momentum", 8, 1), ("momentum", 4, 2), ("momentum", 1, 8), ("adam", 2, 4)],
)
def test_eight_devices_equal_one(tiny_config, on_one_device, rule, data, fsdp):
    config = tiny_config(
        model__name="digits_cnn",
        model__widths=None,
        ema_decay=0.9,
        optimizer__learning_rate=0.02,
        augment=({"name": "pad_crop", "padding": 1},),
        **RULES[rule],
    )
    if rule not in on_one_device:
        on_one_device[rule] = after_steps(config, mesh_of(1, 1))
    state, row, *_ = on_one_device[rule]
    other, other_row, program, placed = after_steps(config, mesh_of(data, fsdp))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, other)
    assert other_row == pytest.approx(row, rel=1e-4)
    start = jax.device_get(program.init())
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), start.params, other.params)
    assert min(jax.tree.leaves(moved)) > 1e-3  # or the comparison would mean little

    kernel = placed.params["conv3"]["kernel"]  # [3, 3, 64, 64]: large enough to be split
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 3, 64 // fsdp, 64)
    assert placed.ema["params"]["conv3"]["kernel"].sharding == kernel.sharding
    copies = [
        leaf.sharding.shard_shape(leaf.shape)
        for leaf in jax.tree.leaves(placed.opt_state)
        if leaf.shape == kernel.shape
    ]
    assert copies and set(copies) == {(3, 3, 64 // fsdp, 64)}
    assert placed.params["conv3"]["kernel"].sharding.mesh.size == 8
    scale = placed.params["norm3"]["scale"]
    assert scale.sharding.shard_shape(scale.shape) == scale.shape


def test_hidden_transfer_would_be_noticed(tiny_config):
    config = tiny_config()
    mesh = mesh_of(8, 1)
    program = Program.open(build.make_experiment(config, mesh))
    program.compile()
    state = program.init()
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="[Dd]isallowed"):
        program.update(state, program._data.train.batch(0))


def test_whole_run_compiles_every_function_once(tiny_config, tmp_path):
    compiled = []

    def note(event, seconds, **details):
        if event.endswith("backend_compile_duration"):
            compiled.append(details.get("fun_name"))

    def compilations(**changes):
        compiled.clear()
        jax.clear_caches()
        train(tiny_config(optimizer__momentum=0.8, **changes), tmp_path / str(len(counts)))
        counts.append(collections.Counter(compiled))

    counts = []
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        compilations()
        compilations(duration="24 steps")
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    short, long = counts
    assert long == short  # twice the steps, logs, evaluations and checkpoints
    for name in ("init", "update", "take_metrics", "eval_step", "is_finite"):
        assert long[f"jit({name})"] == 1, name


# Accumulation, on the bare step function.


def tiny_batch(size=24, classes=5):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, 8, 8, 1), np.uint8)),
        "label": jnp.asarray(rng.integers(0, classes, size, np.int32)),
        "index": jnp.arange(size, dtype=jnp.int32),
        "epoch": jnp.zeros(size, jnp.int32),
    }


def step_in_parts(config, parts, steps=2, max_grad_norm=1e4, platform="cpu"):
    """State and metrics after some steps on one batch that is computed in parts."""
    network = models.build(config.model.name, num_classes=5, **options_given(config, "model"))
    shape = (8, 8, 1)
    params = models.shapes(network, shape)["params"]
    frozen = build.frozen(config, network, params)
    config.optimizer.learning_rate, config.schedule.name = 0.1, "constant"
    optimizer, _ = build.optimizer(config, network, shape, params, frozen, Length(9, 16, 96))
    init = make_init(network, optimizer, num_classes=5, ema=True)
    step = make_train_step(
        network,
        build.loss(config, 5).with_weights(config.loss.class_weights),
        optimizer,
        augment.build(config.augment or (), mean=(0.5,), std=(0.25,)),
        num_classes=5,
        frozen=frozen,
        batch_norm_group=config.model.batch_norm_group,
        ema_decay=0.9,
        gradient_accumulation=parts,
        max_grad_norm=max_grad_norm,
        platform=platform,
    )
    step, batch = jax.jit(step), tiny_batch()
    state = init(jax.random.key_data(jax.random.key(0)), batch["image"].astype(jnp.float32))
    for _ in range(steps):
        state = step(state, batch)
    state, sums = take_metrics(state)
    return jax.device_get(state), jax.device_get(sums)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "loss__class_weights": (0.2, 3.0, 1.0, 0.0, 2.0),
            "loss__label_smoothing": 0.1,
            "augment": ({"name": "flip", "mode": "alternating"}, {"name": "normalize"}),
            "optimizer__gradient_clip_norm": 0.5,
            "optimizer__weight_decay": 0.01,
        },
    ],
    ids=["plain", "weighted, smoothed, augmented, clipped"],
)
def test_accumulated_parts_equal_the_large_batch(tiny_config, changes):
    config = tiny_config(optimizer__momentum=0.9, **changes)
    state, sums = step_in_parts(config, 1)
    for parts in (2, 4):
        other, other_sums = step_in_parts(config, parts)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(*(jax.tree.leaves(s) for s in (sums, other_sums)), rtol=1e-5)


def test_parts_are_augmented_as_they_come_each_with_its_own_numbers(tiny_config):
    seen = []

    def augmentation(key, batch):
        assert batch["image"].dtype == jnp.uint8 and batch["label"].shape[1] == 5
        jax.debug.callback(
            lambda *part: seen.append(part), jax.random.key_data(key), batch["index"]
        )
        return {**batch, "image": batch["image"].astype(jnp.float32)}

    config = tiny_config()
    experiment = build.make_experiment(config, mesh_of(1, 1))
    batch = tiny_batch()
    for parts in (1, 4):
        step = make_train_step(
            experiment.network,
            build.loss(config, 5).with_weights(None),
            experiment.optimizer,
            augmentation,
            num_classes=5,
            ema_decay=None,
            gradient_accumulation=parts,
            max_grad_norm=1e9,
            platform="cpu",
        )
        init = make_init(experiment.network, experiment.optimizer, num_classes=5, ema=False)
        state = init(jax.random.key_data(seed_key(7)), batch["image"].astype(jnp.float32))
        seen.clear()
        jax.block_until_ready(jax.jit(step)(state, batch))
        jax.effects_barrier()
        key = jax.random.split(jax.random.fold_in(seed_key(7), 0))[0]
        keys = {
            tuple(jax.random.key_data(augmentation_key(key, n, parts)).tolist())
            for n in range(parts)
        }
        assert {tuple(key.tolist()) for key, _ in seen} == keys and len(keys) == parts
        indices = sorted(tuple(index.tolist()) for _, index in seen)
        whole = np.asarray(batch["index"])
        assert indices == sorted(tuple(whole[n::parts].tolist()) for n in range(parts))


@pytest.mark.parametrize("high", [1, 2**31, 2**32 - 1])
def test_every_bit_of_the_seed_counts(high):
    plain, other = (jax.random.key_data(seed_key(seed)) for seed in (5, 5 + high * 2**32))
    np.testing.assert_array_equal(plain, jax.random.key_data(jax.random.key(5)))
    assert (plain != other).any()


class HalfFrozen(DenseNetwork):
    frozen = r"^hidden1/kernel$"


def test_frozen_parameters_have_no_gradient(monkeypatch, tiny_config):
    monkeypatch.setitem(models.MODELS, "half_frozen", HalfFrozen)
    config = tiny_config(model__name="half_frozen", optimizer__momentum=0.9)
    before, _ = step_in_parts(config, 1, steps=0)
    after, sums = step_in_parts(config, 1, steps=2)
    first, last = (state.params["hidden1"] for state in (before, after))
    np.testing.assert_array_equal(first["kernel"], last["kernel"])
    assert (first["bias"] != last["bias"]).any()

    # The norm, which is logged and limited, is that of what is trained.
    experiment = build.make_experiment(config, mesh_of(1, 1))
    batch = tiny_batch()
    image = augment.build((), mean=(0.5,), std=(0.25,))(
        jax.random.key(0), {**batch, "label": jax.nn.one_hot(batch["label"], 5)}
    )["image"]

    def loss(params):
        logits = experiment.network.apply({"params": params}, image, train=True)
        losses, weights = build.loss(config, 5).with_weights(None)(
            logits, jax.nn.one_hot(batch["label"], 5)
        )
        return jnp.sum(losses * weights) / jnp.sum(weights)

    grads = jax.grad(loss)(before.params)
    assert np.abs(grads["hidden1"].pop("kernel")).max() > 0
    _, sums = step_in_parts(config, 1, steps=1)
    assert float(sums["grad_norm"][0]) == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)


def test_accumulation_with_batch_norm_is_as_documented(tiny_config):
    config = tiny_config(model__name="digits_cnn", model__widths=None)
    whole, _ = step_in_parts(config, 1, steps=1)
    parts, _ = step_in_parts(config, 4, steps=1)
    first, other = whole.batch_stats["norm1"], parts.batch_stats["norm1"]
    # The mean of the means of the parts is that of the batch, and the statistics move once.
    np.testing.assert_allclose(other["mean"], first["mean"], rtol=1e-5, atol=1e-6)
    # The parts' variances lack what their means differ by, so that their mean is no larger.
    assert (other["var"] <= first["var"] + 1e-6).all() and (other["var"] != first["var"]).any()
    jax.tree.map(lambda x: np.testing.assert_array_equal(np.isfinite(x), True), parts.params)


def in_groups(tiny_config, **changes):
    return tiny_config(
        batch_size=32,
        model__name="digits_cnn",
        model__widths=None,
        optimizer__learning_rate=0.02,
        **{"model__batch_norm_group": 4, **changes},
    )


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_of_whole_groups_equal_the_large_batch(tiny_config, parts):
    config = in_groups(tiny_config)
    whole, sums = step_in_parts(config, 1)
    other, other_sums = step_in_parts(config, parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), whole, other)
    np.testing.assert_allclose(*(jax.tree.leaves(s) for s in (sums, other_sums)), rtol=1e-4)
    of_all, _ = step_in_parts(in_groups(tiny_config, model__batch_norm_group=None), parts)
    assert np.abs(of_all.params["conv2"]["kernel"] - whole.params["conv2"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    ("data", "fsdp"),
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(4, 1, marks=pytest.mark.slow),
        (8, 1),
        (2, 4),
    ],
)
def test_groups_are_those_of_the_batch_on_any_devices(tiny_config, on_one_device, data, fsdp):
    config = in_groups(tiny_config, augment=({"name": "pad_crop", "padding": 1},))
    if "groups" not in on_one_device:
        on_one_device["groups"] = after_steps(config, mesh_of(1, 1))
    state, row, *_ = on_one_device["groups"]
    other, other_row, *_ = after_steps(config, mesh_of(data, fsdp))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, other)
    assert other_row == pytest.approx(row, rel=1e-4)


def collectives(config, mesh):
    """How many of each kind a step compiled for the mesh has."""
    with Program.open(build.make_experiment(config, mesh)) as program:
        text = program.lower().compile().as_text()
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))


def test_groups_within_a_device_need_no_collective(tiny_config):
    config = in_groups(tiny_config, gradient_accumulation=2)
    # The gradient's and the metrics', as in a network without BatchNorm.
    without = collectives(tiny_config(gradient_accumulation=2), mesh_of(4, 1))
    assert collectives(config, mesh_of(4, 1)) == without == {"all-reduce": 2}
    config.model.batch_norm_group = None
    assert collectives(config, mesh_of(4, 1))["all-reduce"] > 2


def test_same_seed_gives_bitwise_the_same_run_and_another_seed_does_not(
    tiny_config, tmp_path, saved_arrays, assert_same_arrays
):
    changes = {"augment": ({"name": "pad_crop", "padding": 1},), "model__dropout": 0.2}
    logs, arrays = [], []
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        train(tiny_config(seed=seed, **changes), tmp_path / name)
        logs.append((tmp_path / name / "metrics.jsonl").read_bytes())
        arrays.append(saved_arrays(tmp_path / name, 12))
    assert_same_arrays(arrays[0], arrays[1])
    assert logs[0] == logs[1] and logs[0] != logs[2]
    name = "params/hidden1/kernel"
    assert (arrays[0][name] != arrays[2][name]).any()


# Updates that are skipped.


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # a branch there, a choice of numbers here
def test_update_that_is_left_out_changes_nothing_but_the_counts(tiny_config, platform):
    config = tiny_config(model__name="quick", model__widths=(4, 8), optimizer__momentum=0.9)
    before, _ = step_in_parts(config, 1, steps=0)
    after, sums = step_in_parts(config, 1, 3, max_grad_norm=1e-9, platform=platform)
    for name in ("params", "batch_stats", "opt_state", "ema", "rng"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert after.step == 3 and after.skipped == 3
    assert sums["skipped_updates"] == (3, 3)
    assert sums["loss"] == sums["accuracy"] == sums["grad_norm"] == (0, 0)
    trained, sums = step_in_parts(config, 1, 3, platform=platform)
    assert trained.skipped == 0 and sums["skipped_updates"] == (0, 3)
    assert sums["accuracy"][1] == 72


@pytest.mark.parametrize("parts", [1, 2])
def test_step_for_another_platform_trains_alike(tiny_config, parts):
    config = tiny_config(model__name="quick", model__widths=(4, 8), optimizer__momentum=0.9)
    cpu, _ = step_in_parts(config, parts)
    gpu, _ = step_in_parts(config, parts, platform="gpu")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), cpu, gpu)


@pytest.mark.parametrize(("group", "parts"), [(None, 2), (8, 1)])
def test_step_for_tpus_is_that_of_other_devices_but_for_rounding(group, parts):
    """There BatchNorm of projections is computed from their inputs."""
    network = ResNet(num_classes=5, stage_sizes=(1,), block=BottleneckBlock, width=8, stem="cifar")
    init = make_init(network, optax.sgd(0.1), num_classes=5, ema=False)
    batch = tiny_batch()
    batch["image"] = batch["image"] / 255
    after = {}
    for platform in ("cpu", "tpu"):
        step = make_train_step(
            network,
            lambda logits, labels: (
                optax.softmax_cross_entropy(logits, labels),
                jnp.ones(len(logits)),
            ),
            optax.sgd(0.1),
            lambda key, batch: batch,
            num_classes=5,
            batch_norm_group=group,
            ema_decay=None,
            gradient_accumulation=parts,
            max_grad_norm=1e4,
            platform=platform,
            batch_shards=len(batch["image"]) // (group or len(batch["image"])),
        )
        state = init(jax.random.key_data(jax.random.key(0)), batch["image"])
        after[platform] = jax.jit(step)(state, batch).variables
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        after["tpu"],
        after["cpu"],
    )
