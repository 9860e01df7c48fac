"""Layers split over devices (config.mesh.model): the same steps, and checkpoints for any layout."""

import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from flaxcls import build, models
from flaxcls.errors import ConfigError
from flaxcls.inference.predictor import Predictor
from flaxcls.runtime import sharding
from flaxcls.training.program import Program
from flaxcls.training.train import train_config as train

VIT = {"name": "vit", "patch": 4, "width": 64, "depth": 1, "heads": 4, "widths": None}
MIXER = {"name": "mixer", "patch": 4, "width": 64, "depth": 1, "widths": None}


def config_of(tiny_config, network, **changes):
    fields = {f"model__{name}": value for name, value in network.items()}
    return tiny_config(ema_decay=0.9, **fields, **changes)


def one_device():
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=types, devices=jax.devices()[:1])


def after_steps(config, mesh, steps=3):
    program = Program.open(build.make_experiment(config, mesh))
    state = program.init()
    start = jax.device_get(state)
    for step in range(steps):
        state = program.update(state, program.batch(step))
    return start, state, program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "fsdp", "rate"),
    [(VIT, 2, 0.05), (MIXER, 1, 1.0)],  # a Mixer's head starts at zero, so little moves at first
)
def test_layers_split_over_devices_equal_those_of_one(tiny_config, network, fsdp, rate):
    config = config_of(tiny_config, network, optimizer__learning_rate=rate)
    start, expected, _ = after_steps(config, one_device())
    _, state, _ = after_steps(config, sharding.make_mesh(fsdp, 2))
    assert dict(state.step.sharding.mesh.shape) == {"data": 4 // fsdp, "fsdp": fsdp, "model": 2}
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), start.params, jax.device_get(state).params
    )
    assert max(jax.tree.leaves(moved)) > 0.05  # or the comparison would mean little
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.device_get(expected),
        jax.device_get(state),
    )


def test_parameters_averages_and_the_optimizers_state_are_split_alike(tiny_config):
    config = config_of(tiny_config, VIT)
    program = Program.open(build.make_experiment(config, sharding.make_mesh(2, 2)))
    specs = jax.tree.map(lambda x: x.spec, program.shardings)
    block = specs.params["block1"]
    assert block["mlp"]["fc1"] == {"kernel": P("fsdp", "model"), "bias": P("model")}
    assert block["mlp"]["fc2"] == {"kernel": P("model", "fsdp"), "bias": P()}
    # These are too small to be split over `fsdp`, too.
    assert block["attn"]["qkv"] == {"kernel": P(None, "model"), "bias": P("model")}
    assert block["attn"]["proj"] == {"kernel": P("model", None), "bias": P()}
    assert block["norm1"] == {"scale": P(), "bias": P()}
    assert specs.ema["params"] == specs.params
    (momentum,) = (
        tree
        for tree in jax.tree.leaves(specs.opt_state, is_leaf=lambda x: isinstance(x, dict))
        if isinstance(tree, dict)
    )
    assert momentum == specs.params
    # As many devices for `fsdp` alone: the network's rules are for `model` only.
    program = Program.open(build.make_experiment(config, sharding.make_mesh(4)))
    assert program.shardings.params["block1"]["mlp"]["fc1"]["kernel"].spec == P(None, "fsdp")


@pytest.mark.slow
def test_checkpoint_resumes_and_predicts_on_another_layout(tiny_config, tmp_path):
    layouts = {"split": {"mesh__model": 2, "mesh__fsdp": 2}, "whole": {"mesh__model": 1}}
    for layout in layouts.values():
        layout["optimizer__learning_rate"] = 0.05
    for name, layout in layouts.items():
        train(config_of(tiny_config, VIT, **layout), tmp_path / name)
    expected = Predictor(tmp_path / "whole")
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
    for began, other in (("split", "whole"), ("whole", "split")):
        run = tmp_path / f"{began} then {other}"
        shutil.copytree(tmp_path / began, run)
        (run / "summary.json").unlink()
        for step in (8, 12):
            shutil.rmtree(run / f"checkpoints/{step}", ignore_errors=True)
        train(config_of(tiny_config, VIT, **layouts[other]), run)
        resumed = Predictor(run)
        assert resumed.step == expected.step == 12
        np.testing.assert_allclose(
            resumed(images).logits, expected(images).logits, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("network", "fsdp", "model", "sentence"),
    [
        (VIT, 1, 3, "config.mesh.model must divide the number of devices, 8, got 3"),
        (VIT, 4, 4, "config.mesh.fsdp times config.mesh.model must divide the number of devices, "),
        (VIT, 1, 8, "config.mesh.model must divide the 4 heads of vit, got 8"),
        (
            {**MIXER, "width": 8},
            1,
            8,
            "config.mesh.model must divide the 4 hidden channels over the patches of mixer, got 8",
        ),
        ({}, 1, 2, "config.mesh.model must be 1 for dense, which offers no rules to split its lay"),
    ],
)
def test_what_cannot_be_split_is_one_sentence(tiny_config, network, fsdp, model, sentence):
    with pytest.raises(ConfigError) as error:
        config = config_of(tiny_config, network)
        build.make_experiment(config, sharding.make_mesh(fsdp, model))
    assert str(error.value).startswith(sentence)


def test_batch_is_split_over_the_devices_that_do_not_share_layers():
    mesh = sharding.make_mesh(2, 2)
    assert sharding.describe(mesh).endswith("(data 2, fsdp 2, model 2)")
    assert sharding.round_up(mesh, 5) == 8
    sharding.check_batch_size(mesh, 12)
    with pytest.raises(ConfigError, match="8 devices divided by config.mesh.model = 2, got 6"):
        sharding.check_batch_size(mesh, 6)
    np.testing.assert_array_equal(sharding.local_rows(mesh, 8), np.arange(8))
    batch = sharding.split_batch(mesh, {"index": np.arange(8, dtype=np.int32)})
    parts = [np.asarray(shard.data).tolist() for shard in batch["index"].addressable_shards]
    assert sorted(parts) == sorted(2 * [[0, 1], [2, 3], [4, 5], [6, 7]])


@pytest.mark.parametrize("name", ["vit", "deit3_s16", "mixer_b16"])
def test_rules_split_every_layer_of_the_blocks(name):
    network = models.build(name, num_classes=3)
    shapes = models.shapes(network, (32, 32, 3))["params"]
    placed = sharding.shardings(sharding.make_mesh(1, 2), shapes, models.partition_rules(network))
    for name in ("block1", "block12"):
        for path, named in jax.tree.leaves_with_path(placed[name]):
            if jax.tree_util.keystr(path).endswith("['kernel']"):
                assert "model" in named.spec, path
