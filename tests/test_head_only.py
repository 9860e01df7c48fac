"""Runs that train the head alone on features computed once: as if they had seen the pictures."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flaxcls import build, models
from flaxcls.inference.evaluator import evaluate_run
from flaxcls.inference.predictor import Predictor
from flaxcls.models import head
from flaxcls.runtime import sharding
from flaxcls.training import head_only, program
from flaxcls.training.program import Program
from flaxcls.training.train import train_config as train


@pytest.fixture
def probe_config(tiny_config):
    """A run that trains the head of a small network with BatchNorm."""

    def make(**changes):
        return tiny_config(
            **{
                "model__name": "digits_cnn",
                "model__widths": None,
                "model__dropout": 0.0,
                "finetune__freeze": "^(?!head/)",
                "finetune__freeze_batch_stats": True,
                **changes,
            }
        )

    return make


def described(config):
    build.check(config)
    with Program.open(build.make_experiment(config, sharding.make_mesh())) as opened:
        return opened.describe_input()


def is_used(config):
    return "are computed once" in described(config)


PLAIN = {}
MUCH = {
    "ema_decay": 0.9,
    "gradient_accumulation": 2,
    "repeats": 2,
    "optimizer__weight_decay": 0.01,
    "loss__class_weights": "balanced",
    "loss__label_smoothing": 0.1,
    "data__eval_split": "test[:19]",
    "eval__batch_size": 24,
}


@pytest.mark.parametrize(
    "changes",
    [PLAIN, MUCH, {"input__mode": "stream"}, {"model__name": "dense", "model__widths": (16, 8)}],
    ids=["plain", "much", "streamed", "without BatchNorm"],
)
def test_the_run_equals_that_with_pictures(
    probe_config, tmp_path, monkeypatch, saved_arrays, changes
):
    config = probe_config(**changes)
    assert is_used(config)
    first = train(config, tmp_path / "features")
    with monkeypatch.context() as patch:
        patch.setattr(program, "head_only", lambda experiment, data: None)
        second = train(config, tmp_path / "pictures")
    assert first.keys() == second.keys()
    for weights in {"eval", "ema"} & first.keys():
        assert first[weights] == pytest.approx(second[weights], rel=1e-4)
    one, other = (saved_arrays(tmp_path / name, 12) for name in ("features", "pictures"))
    assert one.keys() == other.keys()
    for path, array in one.items():
        np.testing.assert_allclose(array, other[path], rtol=2e-4, atol=1e-5, err_msg=path)
        if path.startswith("params/") and "head" not in path:
            assert array.tobytes() == other[path].tobytes(), path

    # What is saved is the whole network.
    _, _, results = evaluate_run(tmp_path / "features")
    assert results["eval"] == pytest.approx(first["eval"], rel=1e-4)
    predictor = Predictor(tmp_path / "features", ema=False)
    assert predictor(np.zeros((3, *predictor.image_shape), np.uint8)).logits.shape == (3, 5)


def test_the_step_does_not_compute_what_is_below_the_head(probe_config, monkeypatch):
    def flops():
        opened = Program.open(build.make_experiment(probe_config(), sharding.make_mesh()))
        return opened.lower().compile().cost_analysis()["flops"]

    features = flops()
    monkeypatch.setattr(program, "head_only", lambda experiment, data: None)
    assert features < flops() / 5


LITE = pytest.param("efficientnet_lite0", marks=pytest.mark.torture)  # compiles for long


@pytest.mark.parametrize("name", ["resnet18", "vit", LITE, "quick", "densenet_bc"])
def test_logits_from_features_are_those_from_images(name):
    options = {
        "vit": {"patch": 8, "width": 16, "depth": 2, "heads": 2},
        "resnet18": {"width": 8},
        "densenet_bc": {"depth": 10, "growth": 4},
        "efficientnet_lite0": {"dropout": 0.0, "drop_path": 0.0},
    }.get(name, {})
    network = models.build(name, num_classes=3, **options)
    shape = (32, 32, 3)
    images = jax.random.normal(jax.random.key(0), (2, *shape))
    quickly = {"xla_backend_optimization_level": 0}
    init = jax.jit(lambda key, x: network.init(key, x, train=False), compiler_options=quickly)
    variables = init(jax.random.key(1), images)
    variables = jax.tree.map(
        lambda x: x + 0.01 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), variables
    )
    above, features = head.begin_at_head(network, variables, shape)

    def both(variables, images):
        given = head.features_of(network, variables, images)
        return (
            given,
            above.apply(variables, given, train=False),
            network.apply(variables, images, train=False),
        )

    given, logits, expected = jax.jit(both, compiler_options=quickly)(variables, images)
    assert given.shape[1:] == features.shape and np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("freeze", [None, "^conv"])
def test_nothing_is_said_where_more_than_the_head_is_trained(probe_config, freeze):
    assert "head" not in described(probe_config(finetune__freeze=freeze))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"finetune__freeze_batch_stats": False}, "BatchNorm's statistics are those of the batch"),
        ({"model__dropout": 0.2}, "something random, such as dropout"),
        ({"augment": ({"name": "flip"},)}, "augmented"),
        (
            {
                "image_size": (("0 steps", 8), ("6 steps", 16)),
                "model__name": "wrn",
                "model__depth": 10,
                "model__width": 1,
            },
            "several sizes",
        ),
        ({"crop__name": "random_resized_crop", "image_size": 8}, "cropped at random"),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_pictures_are_seen_in_every_step_where_it_makes_a_difference(probe_config, changes, why):
    text = described(probe_config(**changes))
    assert "in every step, not once: " in text and why in text


def test_features_that_do_not_fit_are_not_kept(probe_config, monkeypatch):
    config = probe_config()
    monkeypatch.setattr(head_only, "RESIDENT_BYTES", 96 * 1024 * 4)
    assert is_used(config)
    monkeypatch.setattr(head_only, "RESIDENT_BYTES", 96 * 1024 * 4 - 1)
    text = described(config)
    assert "they would take 0 MiB (config.input.mode='resident' allows it)" in text
    config.input.mode = "resident"
    assert is_used(config)


class Detour(nn.Module):
    """Its logits depend on the image past the head."""

    num_classes: int
    past: bool = True

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(len(x), -1)
        logits = nn.Dense(self.num_classes, name="head")(nn.relu(nn.Dense(8, name="below")(x)))
        return logits + x.mean(axis=1, keepdims=True) if self.past else 2 * logits


class TwoHeads(nn.Module):
    """There is no layer named "head" at its top."""

    num_classes: int

    @nn.compact
    def __call__(self, x, *, train):
        return nn.Dense(self.num_classes, name="top")(x.reshape(len(x), -1))


def test_a_network_of_ones_own_may_do_more_than_its_head(monkeypatch):
    shape = (4, 4, 1)
    for network, fits in ((Detour(3), False), (Detour(3, past=False), True), (TwoHeads(3), False)):
        variables = models.shapes(network, shape)
        assert (head.begin_at_head(network, variables, shape) is not None) == fits


def test_a_resumed_run_ends_bitwise_the_same(
    probe_config, tmp_path, monkeypatch, saved_arrays, assert_same_arrays
):
    """After an end that nothing was done about: the features are computed again."""
    config = probe_config(ema_decay=0.9)
    train(config, tmp_path / "whole")
    update, calls = Program.update, []

    def update_and_die(self, state, batch):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return update(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "update", update_and_die)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "killed")
    train(config, tmp_path / "killed")
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert logs[0] == logs[1]
    assert_same_arrays(*(saved_arrays(tmp_path / name, 12) for name in ("whole", "killed")))
