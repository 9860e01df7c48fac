"""cifar10_airbench94 against its source, made again in float64: network, updates, schedules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flaxcls import augment, build
from flaxcls.build import pieces
from flaxcls.build.length import Length
from flaxcls.config.recipes import load_recipe
from flaxcls.core.step import make_init, make_train_step
from flaxcls.errors import ConfigError
from flaxcls.runtime import sharding

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
WIDTHS, BATCH = (32, 40, 40), 10
STEPS, WHITENING_STEPS = 200, 75  # of the source's 25 batches an epoch, for 8 and 3 epochs


@pytest.fixture(scope="module")
def experiment():
    """The recipe with narrow layers and 25 small batches an epoch of made-up images."""
    config = load_recipe("cifar10_airbench94", []).config
    config.batch_size, config.model.widths = BATCH, WIDTHS
    config.data.name, config.data.image_shape, config.data.num_classes = "fake", (16, 16, 3), 10
    config.data.num_examples = 25 * BATCH
    return build.make_experiment(config, sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def batches():
    random = np.random.default_rng(0)
    return [
        {
            "image": random.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8),
            "label": random.integers(0, 10, BATCH).astype(np.int32),
        }
        for _ in range(2)
    ]


class Airbench:
    """The source's training in float64, from given parameters on, at given steps."""

    def __init__(self, torch, params):
        self.torch = torch
        order = (3, 2, 0, 1)  # [H, W, I, O] -> [O, I, H, W]
        self.params = {
            path: torch.tensor(
                np.asarray(x.transpose(order) if x.ndim == 4 else x.T, np.float64),
                requires_grad=True,
            )
            for path, x in params.items()
        }
        self.velocity = {path: torch.zeros_like(x) for path, x in self.params.items()}
        self.statistics = {}

    def norm(self, x, name):
        """Normalises over batch and pixels; its statistics keep 0.6 of what they were, 0 and 1."""
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        self.statistics[name] = 0.4 * mean.detach(), 0.6 + 0.4 * var.detach()
        mean, var, bias = (v[:, None, None] for v in (mean, var, self.params[f"{name}/bias"]))
        return (x - mean) / self.torch.sqrt(var + 1e-12) + bias

    def logits(self, images):
        functional, params = self.torch.nn.functional, self.params
        x = (np.asarray(images, np.float64) / 255 - MEAN) / STD
        x = self.torch.tensor(x.transpose(0, 3, 1, 2))
        x = functional.gelu(functional.conv2d(x, params["whiten/kernel"], params["whiten/bias"]))
        for block in ("block1", "block2", "block3"):
            x = functional.conv2d(x, params[f"{block}_conv1/kernel"], padding="same")
            x = functional.gelu(self.norm(functional.max_pool2d(x, 2), f"{block}_norm1"))
            x = functional.conv2d(x, params[f"{block}_conv2/kernel"], padding="same")
            x = functional.gelu(self.norm(x, f"{block}_norm2"))
        return functional.linear(x.amax((2, 3)), params["head/kernel"]) / x.shape[1]

    def update(self, batch, step):
        """As with a batch of 2,000: the loss is 2,000 times its mean."""
        loss = 2000 * self.torch.nn.functional.cross_entropy(
            self.logits(batch["image"]),
            self.torch.tensor(batch["label"]).long(),
            label_smoothing=0.2,
        )
        grads = self.torch.autograd.grad(loss, [*self.params.values()])
        with self.torch.no_grad():
            for path, grad in zip(self.params, grads, strict=True):
                if path.endswith(("conv1/kernel", "conv2/kernel")):
                    self.muon(path, grad, 0.24 * (1 - step / STEPS))
                elif path == "whiten/bias" and step < WHITENING_STEPS:
                    self.sgd(path, grad, 0.053, 1 - step / WHITENING_STEPS)
                elif not path.startswith("whiten/"):
                    rate = 0.67 if path == "head/kernel" else 0.053
                    self.sgd(path, grad, rate, 1 - step / STEPS)
        return loss.item() / 2000

    def momentum(self, path, grad, momentum):
        """Nesterov's."""
        self.velocity[path] = momentum * self.velocity[path] + grad
        return grad + momentum * self.velocity[path]

    def sgd(self, path, grad, rate, factor):
        param = self.params[path]
        decayed = grad + 2e-6 * 2000 / rate * param
        param -= rate * factor * self.momentum(path, decayed, 0.85)

    def muon(self, path, grad, rate):
        param = self.params[path]
        outputs = len(param)
        moved = self.momentum(path, grad, 0.6).reshape(outputs, -1)
        u = moved / moved.norm()  # never more outputs than inputs
        for _ in range(3):
            gram = u @ u.T
            u = 3.4445 * u - 4.7750 * gram @ u + 2.0315 * gram @ gram @ u
        param *= math.sqrt(outputs) / param.norm()
        param -= rate * u.reshape(param.shape)


@pytest.fixture(scope="module")
def trainer(experiment, batches):
    """`(state, train_step)`: what the recipe begins with, and its step without augmentation."""

    def normalized(key, batch):
        return {**batch, "image": augment.normalize(batch["image"], MEAN, STD)}

    init = make_init(experiment.network, experiment.optimizer, num_classes=10, ema=False)
    images = normalized(None, batches[0])["image"]
    state = jax.jit(init)(jax.random.key_data(jax.random.key(3)), images)
    step = make_train_step(
        experiment.network,
        experiment.loss.with_weights(None),
        experiment.optimizer,
        normalized,
        num_classes=10,
        frozen=experiment.frozen,
        ema_decay=None,
        gradient_accumulation=1,
        max_grad_norm=1e4,
        platform="cpu",
    )
    return state, jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


def flat(params):
    paths = jax.tree.leaves_with_path(jax.device_get(params))
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in paths}


def test_schedule_of_a_duration_is_that_of_a_run_of_that_length_and_then_0(tiny_config):
    config = tiny_config(schedule__name="cosine", schedule__final=0.1, schedule__warmup="10%")
    run = Length(200, batch_size=16, num_examples=160)
    rate = pieces.learning_rate(config, run, "5 epochs")
    alone = pieces.learning_rate(config, run._replace(total_steps=50))
    steps = range(60)
    expected = [alone(step) if step < 50 else 0 for step in steps]
    np.testing.assert_allclose([rate(step) for step in steps], expected, rtol=1e-6)
    assert rate(49) > 0.01
    longer, whole = (pieces.learning_rate(config, run, x) for x in ("30 epochs", None))
    assert longer(150) == whole(150)  # a trial of few steps ends it with the run
    for duration in ("0 steps", "3 minutes"):
        with pytest.raises(ConfigError, match="config.optimizer.learning_rate_durations"):
            pieces.learning_rate(config, run, duration)


@pytest.mark.parametrize("step", [0, 10, 73, 74, 75, 198])
def test_two_updates_are_the_sources(trainer, batches, step):
    state, train_step = trainer
    source = Airbench(pytest.importorskip("torch"), flat(state.params))
    before = {path: x.detach().numpy().copy() for path, x in source.params.items()}

    state = state.replace(opt_state=optax.tree.set(state.opt_state, count=jnp.int32(step)))
    state = train_step(state, batches[0])
    loss = source.update(batches[0], step)
    assert state.metrics["loss"][0] / BATCH == pytest.approx(loss, rel=1e-5)
    for name, (mean, var) in source.statistics.items():
        np.testing.assert_allclose(state.batch_stats[name]["mean"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(state.batch_stats[name]["var"], var, rtol=1e-4)

    state = train_step(state, batches[1])
    source.update(batches[1], step + 1)
    for path, ours in flat(state.params).items():
        theirs = source.params[path].detach().numpy()
        moved = np.abs(theirs - before[path]).max()
        stays = path == "whiten/kernel" or (path == "whiten/bias" and step >= WHITENING_STEPS)
        assert (moved == 0) == stays, path
        theirs = theirs.transpose(2, 3, 1, 0) if theirs.ndim == 4 else theirs.T
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-4 * moved + 1e-8, err_msg=path)
