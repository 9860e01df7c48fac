"""Adversarial training: its ball is exact, and its step is that of the papers, on any devices."""

from fractions import Fraction
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from flaxcls import augment, build, models
from flaxcls.build import pieces
from flaxcls.build.validate import check
from flaxcls.core import adversarial
from flaxcls.core.adversarial import AdversarialTraining
from flaxcls.core.perturbation import Ball, distance, parse_eps
from flaxcls.core.step import make_init, make_train_step, step_keys, take_metrics
from flaxcls.errors import ConfigError
from flaxcls.training.hooks import Hooks, StopTraining
from flaxcls.training.program import Program
from flaxcls.training.train import train_config as train

unit = st.floats(0, 1, width=32)
anything = st.floats(-3, 3, width=32)
project = jax.jit(
    lambda images, candidates, norm, eps: Ball(norm, eps).project(images, candidates),
    static_argnums=(2, 3),
)


@given(st.lists(st.tuples(unit, anything), min_size=12, max_size=12), st.sampled_from([8, 1, 77]))
def test_linf_ball_is_exact_to_the_last_bit(pixels, numerator):
    images, candidates = np.array(pixels, np.float32).T.reshape(2, 2, 2, 3, 1)
    eps = numerator / 255
    found = np.asarray(project(images, candidates, "linf", eps))
    for image, candidate, pixel in zip(images.flat, candidates.flat, found.flat, strict=True):
        gap = abs(Fraction(float(pixel)) - Fraction(float(image)))
        assert gap <= Fraction(eps) and 0 <= pixel <= 1
        if gap < Fraction(eps) * (1 - Fraction(1, 10**5)) and 0 < pixel < 1:
            assert pixel == candidate  # nothing was to be cut off


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 1 / 3, 0.01, 3.0]))
def test_l2_ball_is_kept_and_reached(seed, eps):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (4, 16, 16, 3)).astype(np.float32) / 255
    candidates = images + rng.normal(size=images.shape).astype(np.float32) * 10.0 ** rng.uniform(
        -4, 1
    )
    ball = Ball("l2", eps)
    found = ball.inside(images, np.asarray(project(images, candidates, "l2", eps)))
    lengths = distance("l2", found.astype(np.float64) - images)
    assert (lengths <= eps).all() and (found >= 0).all() and (found <= 1).all()
    free = np.full_like(images, 0.5)  # where [0, 1] cuts nothing off the edge is reached
    found = np.asarray(project(free, free + (candidates - images) * 1e3, "l2", 0.1))
    np.testing.assert_allclose(distance("l2", found - free), 0.1, rtol=1e-4)


def test_what_is_outside_of_the_ball_is_brought_back():
    images = np.full((2, 2, 2, 1), 0.5, np.float32)
    far = images + np.array([0.2, 0.001], np.float32)[:, None, None, None]
    for norm in ("linf", "l2"):
        found = Ball(norm, 0.1).inside(images, far)
        assert (distance(norm, found.astype(np.float64) - images) <= 0.1).all()
        np.testing.assert_array_equal(found[1], far[1])


def test_nan_is_no_attack():
    images = np.full((1, 2, 2, 1), 0.5, np.float32)
    for norm in ("linf", "l2"):
        np.testing.assert_array_equal(project(images, images * np.nan, norm, 0.1), images)


def test_radii_are_numbers_or_fractions():
    assert parse_eps("eps", "8/255") == 8 / 255 and parse_eps("eps", "0.5") == parse_eps("e", 0.5)
    for wrong in ("8/0", "0", "-1/255", "8/255/2", "big", "", "nan", "inf", True):
        with pytest.raises(ConfigError, match="--eps must be a number above 0 or text such as"):
            parse_eps("--eps", wrong)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "pgd"}, "config.adversarial.name is 'pgd'.*did you mean 'pgd_at'"),
        ({"name": "pgd_at", "beta": 6.0}, "config.adversarial.beta is not used by pgd_at"),
        ({"name": "pgd_at", "step": 3}, "step is not used by pgd_at, did you mean 'steps'"),
        ({"name": "trades", "eps": "8/0"}, "config.adversarial.eps must be a number above 0"),
        ({"name": "trades", "steps": 0}, "config.adversarial.steps must be int at least 1"),
        ({"name": "trades", "norm": "l1"}, "config.adversarial.norm must be 'linf' or 'l2'"),
    ],
)
def test_wrong_config_is_one_sentence(tiny_config, changes, sentence):
    config = tiny_config(**{f"adversarial__{name}": value for name, value in changes.items()})
    with pytest.raises(ConfigError, match=sentence):
        check(config)
        pieces.adversarial_training(config)


# A step, against PyTorch in float64.

MEAN, STD = (0.4,), (0.3,)
METHODS = {
    "pgd_at": adversarial.PgdAt("0.1", steps=3, step_size="0.04"),
    "trades": adversarial.Trades("0.1", steps=3, step_size="0.04", beta=2.0),
}


def tiny_batch(size=24):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, 8, 8, 1), np.uint8)),
        "label": jnp.asarray(rng.integers(0, 5, size, np.int32)),
        "index": jnp.arange(size, dtype=jnp.int32),
        "epoch": jnp.zeros(size, jnp.int32),
    }


def cross_entropy(logits, targets):
    return optax.softmax_cross_entropy(logits, targets), jnp.ones(len(logits))


def after_a_step(network, method, parts=1, platform="cpu", steps=1):
    optimizer = optax.sgd(0.5)
    batch = tiny_batch()
    init = make_init(network, optimizer, num_classes=5, ema=False)
    state = init(jax.random.key_data(jax.random.key(3)), batch["image"] / 255)
    step = jax.jit(
        make_train_step(
            network,
            cross_entropy,
            optimizer,
            augment.build((), mean=MEAN, std=STD),
            num_classes=5,
            ema_decay=None,
            gradient_accumulation=parts,
            max_grad_norm=1e4,
            platform=platform,
            adversarial=AdversarialTraining(method, MEAN, STD) if method else None,
        )
    )
    before = jax.device_get(state)
    for _ in range(steps):
        state = step(state, batch)
    state, sums = take_metrics(state)
    return before, jax.device_get(state), jax.device_get(sums)


class TwoLayers(nn.Module):
    """Dense, BatchNorm, tanh, dense."""

    num_classes: int = 5

    @nn.compact
    def __call__(self, images, train):
        x = nn.Dense(12, name="hidden")(images.reshape(len(images), -1))
        x = jnp.tanh(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        return nn.Dense(self.num_classes, name="head")(x)


def by_torch(torch, before, method):
    """The parameters and running statistics after a step, of float64 and the papers' rules."""
    batch = jax.device_get(tiny_batch())
    weights = jax.tree.map(
        lambda x: torch.tensor(np.asarray(x, np.float64), requires_grad=True), before.params
    )
    running = jax.tree.map(lambda x: torch.tensor(np.asarray(x, np.float64)), before.batch_stats)

    def network(pixels, train):
        x = ((pixels - MEAN[0]) / STD[0]).reshape(len(pixels), -1)
        x = x @ weights["hidden"]["kernel"] + weights["hidden"]["bias"]
        mean, var = running["norm"]["mean"], running["norm"]["var"]
        if train:
            mean, var = x.mean(0), x.var(0, unbiased=False)
        x = (x - mean) / torch.sqrt(var + 1e-5) * weights["norm"]["scale"] + weights["norm"]["bias"]
        logits = torch.tanh(x) @ weights["head"]["kernel"] + weights["head"]["bias"]
        return logits, mean.detach(), var.detach()

    x = torch.tensor(batch["image"] / 255.0)
    y = torch.tensor(batch["label"]).long()
    key = jax.random.fold_in(step_keys(jax.random.key(3), 0)[1], 2**32 - 1)
    keys = [jax.random.fold_in(key, index) for index in batch["index"]]
    functional, trades = torch.nn.functional, isinstance(method, adversarial.Trades)
    if trades:
        noise = 0.001 * np.stack([jax.random.normal(key, (8, 8, 1)) for key in keys])
    else:
        noise = np.stack(
            [jax.random.uniform(key, (8, 8, 1), minval=-0.1, maxval=0.1) for key in keys]
        )

    def kl(logits, natural):
        log_p = functional.log_softmax(natural, 1)
        return functional.kl_div(functional.log_softmax(logits, 1), log_p.exp(), reduction="sum")

    adv = torch.clamp(x + torch.tensor(np.asarray(noise, np.float64)), 0, 1)
    for _ in range(3):
        adv = adv.detach().requires_grad_()
        if trades:
            grows = kl(network(adv, False)[0], network(x, False)[0])
        else:
            grows = functional.cross_entropy(network(adv, True)[0], y, reduction="sum")
        adv = adv + 0.04 * torch.sign(torch.autograd.grad(grows, adv)[0])
        adv = torch.clamp(torch.minimum(torch.maximum(adv, x - 0.1), x + 0.1), 0, 1).detach()
    logits, mean, var = network(adv, True)
    value = functional.cross_entropy(logits, y)
    if trades:
        natural, other_mean, other_var = network(x, True)
        value = functional.cross_entropy(natural, y) + 2.0 * kl(logits, natural) / len(y)
        mean, var = (mean + other_mean) / 2, (var + other_var) / 2
    value.backward()
    params = jax.tree.map(lambda w: (w - 0.5 * w.grad).detach().numpy(), weights)
    stats = {"mean": 0.1 * mean.numpy(), "var": 0.9 + 0.1 * var.numpy()}
    return params, {"norm": stats}, value.item()


@pytest.mark.parametrize("name", METHODS)
def test_step_is_that_of_the_paper(name):
    torch = pytest.importorskip("torch")
    before, after, sums = after_a_step(TwoLayers(), METHODS[name])
    params, batch_stats, value = by_torch(torch, before, METHODS[name])
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6)
    jax.tree.map(close, after.params, params)
    jax.tree.map(close, after.batch_stats, batch_stats)
    assert sums["loss"][0] / sums["loss"][1] == pytest.approx(value, rel=1e-5)
    _, plain, plain_sums = after_a_step(TwoLayers(), None)
    assert sums["loss"][0] > plain_sums["loss"][0] * 1.05
    assert np.abs(plain.params["hidden"]["kernel"] - params["hidden"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_parts_of_a_batch_are_attacked_as_in_the_whole(name):
    """Without BatchNorm the update is the same; for GPUs the attack is a loop."""
    network = models.build("dense", num_classes=5, widths=(16,))
    _, whole, sums = after_a_step(network, METHODS[name], steps=2)
    for changes in ({"parts": 2}, {"platform": "gpu"}):
        _, other, other_sums = after_a_step(network, METHODS[name], steps=2, **changes)
        for a, b in zip(
            jax.tree.leaves((whole, sums)), jax.tree.leaves((other, other_sums)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def mesh_of(devices):
    types = (AxisType.Auto, AxisType.Auto)
    chosen = jax.devices()[:devices]
    return jax.make_mesh((devices, 1), ("data", "fsdp"), axis_types=types, devices=chosen)


def attacked_config(tiny_config, name, **changes):
    return tiny_config(
        model__name="quick",
        model__widths=(4,),
        adversarial__name=name,
        adversarial__eps="16/255",
        adversarial__steps=2,
        adversarial__step_size="10/255",
        **changes,
    )


@pytest.mark.parametrize("name", ["pgd_at", pytest.param("trades", marks=pytest.mark.slow)])
def test_eight_devices_attack_as_one_does(tiny_config, name):
    results = []
    for devices in (1, 8):
        config = attacked_config(tiny_config, name, optimizer__learning_rate=0.02)
        with Program.open(build.make_experiment(config, mesh_of(devices))) as program:
            state = program.init()
            with jax.transfer_guard("disallow"):
                for step in range(3):
                    state = program.update(state, program.batch(step))
            state, row = program.take_metrics(state)
            results.append((jax.device_get(state.variables), row))
    (one, row), (eight, other_row) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one, eight)
    assert row == pytest.approx(other_row, rel=1e-4)


def test_run_that_is_resumed_ends_with_the_same_bits(
    tiny_config, tmp_path, saved_arrays, assert_same_arrays
):
    config = attacked_config(tiny_config, "trades", gradient_accumulation=2)
    config.model.name, config.model.widths = "dense", (8,)
    train(config, tmp_path / "whole")

    def stop(row):
        if row["step"] == 6:
            raise StopTraining

    train(config, tmp_path / "parts", hooks=Hooks(None, stop))
    train(config, tmp_path / "parts")
    assert_same_arrays(*(saved_arrays(tmp_path / name, 12) for name in ("whole", "parts")))
