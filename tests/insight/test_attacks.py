"""Attacks: equal to their references, in the ball, and never weaker than what they contain."""

import csv
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from PIL import Image

import flaxcls
from flaxcls.core.perturbation import Ball, distance
from flaxcls.errors import ConfigError
from flaxcls.insight import robustness
from flaxcls.insight.attacks import Apgd, Targets, chain, make_runner
from flaxcls.insight.intervals import wilson
from flaxcls.insight.victim import load_victim, sample

RNG = np.random.default_rng(0)
COUNT, PIXELS, HIDDEN, CLASSES = 40, 27, 16, 6
FIRST = RNG.normal(size=(PIXELS, HIDDEN)) * 1.2
SECOND = RNG.normal(size=(HIDDEN, CLASSES))
IMAGES = RNG.uniform(size=(COUNT, 3, 3, 3))


def logits_of(_, images):
    return jnp.tanh((images.reshape(len(images), -1) - 0.5) @ FIRST) @ SECOND


LABELS = np.asarray(np.tanh((IMAGES.reshape(COUNT, -1) - 0.5) @ FIRST) @ SECOND).argmax(1)


class Reference:
    """AutoAttack's APGD as its public code has it, written anew in NumPy, float64, image by image.

    The gradient is worked out by hand.
    """

    def __init__(self, norm, eps, steps, loss):
        self.norm, self.eps, self.steps, self.loss = norm, eps, steps, loss

    def look(self, x, label, aim):
        hidden = np.tanh((x.ravel() - 0.5) @ FIRST)
        z = hidden @ SECOND
        by_z = np.zeros(CLASSES)
        if self.loss == "ce":
            p = np.exp(z - z.max())
            p /= p.sum()
            loss, by_z = -np.log(p[label]), p - np.eye(CLASSES)[label]
        else:
            order = np.argsort(z)
            top, third, fourth = order[-1], order[-3], order[-4]
            scale = z[top] - 0.5 * (z[third] + z[fourth]) + 1e-12
            loss = -(z[label] - z[aim]) / scale
            by_z[aim] += 1 / scale
            by_z[label] -= 1 / scale
            by_z[[top, third, fourth]] -= loss / scale * np.array([1, -0.5, -0.5])
        gradient = FIRST @ ((SECOND @ by_z) * (1 - hidden**2))
        return loss, gradient.reshape(x.shape), z.argmax() == label

    def inside(self, x, z):
        if self.norm == "linf":
            return np.clip(np.clip(z, x - self.eps, x + self.eps), 0, 1)
        length = np.sqrt(np.sum((z - x) ** 2))
        return np.clip(x + (z - x) / (length + 1e-12) * min(self.eps, length), 0, 1)

    def run(self, x, label, aim, start):
        z = self.inside(x, start)
        loss, gradient, right = self.look(z, label, aim)
        best, best_gradient, best_loss, adversarial = z, gradient, loss, None if right else z
        step, old, checked, halved_before = 2 * self.eps, z, loss, True
        losses, path = np.zeros(self.steps), []
        window, since = max(int(0.22 * self.steps), 1), 0
        for i in range(self.steps):
            momentum, z_before, z_old = 0.75 if i else 1.0, z, old
            unit = np.sign(gradient)
            if self.norm == "l2":
                unit = gradient / (np.sqrt(np.sum(gradient**2)) + 1e-12)
            new = self.inside(x, z + step * unit)
            z = self.inside(x, z + momentum * (new - z) + (1 - momentum) * (z - z_old))
            old = z_before
            loss, gradient, right = self.look(z, label, aim)
            losses[i] = loss
            adversarial = adversarial if right else z
            if loss > best_loss:
                best, best_gradient, best_loss = z, gradient, loss
            path.append(z)
            since += 1
            if since == window:
                rises = sum(losses[i - j] > losses[i - j - 1] for j in range(window))
                halve = rises <= 0.75 * window or (not halved_before and checked >= best_loss)
                halved_before, checked = halve, best_loss
                if halve:
                    step, z, gradient = step / 2, best, best_gradient
                window = max(
                    window - max(int(0.03 * self.steps), 1), max(int(0.06 * self.steps), 1)
                )
                since = 0
        return np.array(path), best_loss, adversarial


@pytest.mark.parametrize(
    ("norm", "eps", "loss"),
    [("linf", 0.03, "ce"), ("linf", 0.03, "dlr"), ("l2", 0.12, "ce"), ("l2", 0.12, "dlr")],
)
def test_apgd_is_its_reference_step_by_step(norm, eps, loss):
    steps, rank = 33, 2
    noise = np.random.default_rng(1).uniform(-eps, eps, IMAGES.shape)
    attack = Apgd("apgd", Ball(norm, eps), steps, loss)
    network = partial(logits_of, None)
    with jax.enable_x64(True):
        images = jnp.asarray(IMAGES)
        targets = Targets(images, jnp.asarray(LABELS), None, jnp.int32(rank))
        state = attack.start_at(network, targets, images + noise)
        step, path = jax.jit(partial(attack.step, network)), []
        for share, window in zip(*attack.schedule(), strict=True):
            state = step(targets, state, (share, window))
            path.append(state)
        path = jax.device_get(path)
        aims = np.asarray(state.aims)
        network_logits = np.asarray(network(images))
    assert (aims == np.argsort(network_logits, axis=1)[:, -1 - rank]).all() or loss == "ce"
    reference = Reference(norm, eps, steps, loss)
    close = []
    for i in range(COUNT):
        points, best_loss, adversarial = reference.run(
            IMAGES[i], LABELS[i], aims[i], IMAGES[i] + noise[i]
        )
        # The loss at each point of the path, and the points themselves.
        losses = [reference.look(point, LABELS[i], aims[i])[0] for point in points]
        np.testing.assert_allclose([s.last_loss[i] for s in path], losses, rtol=1e-7, atol=1e-9)
        assert path[-1].best_loss[i] == pytest.approx(best_loss, rel=1e-7)
        assert bool(path[-1].seen.is_wrong[i]) == (adversarial is not None)
        if adversarial is not None:
            close.append(np.isclose(path[-1].seen.images[i], adversarial, atol=1e-7))
    assert 3 < len(close) < COUNT - 3
    # Where a derivative is 0 but for rounding its sign is anything.
    assert np.mean(close) > 0.99
    assert len({round(float(s), 9) for s in path[-1].step_size.ravel()}) > 1  # some were halved


def targets_of(seed=0):
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(COUNT))
    return Targets(jnp.float32(IMAGES), jnp.int32(LABELS), keys, jnp.int32(1))


@pytest.mark.parametrize("norm, place", [("l2", 1), ("linf", 3)])
def test_loop_of_one_program_finds_what_single_steps_find(norm, place):
    for attack in chain("apgd", Ball(norm, 0.1), 12, CLASSES)[place : place + 1]:
        found = [make_runner(attack, logits_of, p)(None, targets_of()) for p in ("cpu", "gpu")]
        np.testing.assert_allclose(*found, atol=1e-4)
        lengths = distance(norm, np.asarray(found[0], np.float64) - np.float32(IMAGES))
        assert (lengths <= 0.1).all() and lengths.max() > 0.0999


def test_network_of_three_classes_is_not_attacked_by_what_needs_four():
    names = [attack.name for attack in chain("apgd", Ball("l2", 1.0), None, 3)]
    assert names == ["fgsm", "pgd", "apgd-ce"]


def test_stronger_attack_is_never_withstood_by_more(digits_run):
    results = {
        method: robustness.attack_run(digits_run, eps=0.2, method=method, steps=5, examples=100)
        for method in ("pgd", "apgd")
    }
    for name, accuracy in results["pgd"]["accuracies"].items():
        assert results["apgd"]["accuracies"][name] == accuracy
    assert results["apgd"]["robust"] <= results["pgd"]["robust"]
    accuracies = [*results["apgd"]["accuracies"].values()]
    assert len(accuracies) == 5 and accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > 0.9 and 0 < accuracies[-1] < accuracies[1] - 0.02
    assert results["apgd"]["robust"] == accuracies[-1]


def test_network_that_withstands_nothing_is_not_attacked_further(digits_run):
    result = robustness.attack_run(digits_run, eps=1.0, method="apgd", steps=2, examples=20)
    assert result["robust"] == 0 and len(result["accuracies"]) == 5


def test_images_are_in_the_ball_judged_as_they_are_and_alone(digits_run):
    predictor, victim = load_victim(digits_run, "last", None)
    pipeline = predictor.restored.experiment.evaluation(None, None)
    pixels, labels, indices = sample(pipeline, 60, 3)
    again = sample(pipeline, 60, 3)
    np.testing.assert_array_equal(indices, again[2])
    np.testing.assert_array_equal(labels, pipeline.source.labels()[indices])
    images = pixels.astype(np.float32) / 255
    attacks = chain("pgd", Ball("linf", 0.1), 4, 10)
    result = robustness.attack_images(victim, images, labels, attacks, indices=indices)
    lengths = distance("linf", result.images.astype(np.float64) - images)
    assert (lengths <= 0.1).all() and lengths.max() > 0.0999
    assert result.images.min() >= 0 and result.images.max() <= 1
    np.testing.assert_array_equal(victim.classify(result.images), result.predicted)
    np.testing.assert_array_equal(predictor(pixels).logits.argmax(1), result.clean)
    fooled = (result.clean == labels) & (result.predicted != labels)
    assert [bool(name) for name in result.by] == fooled.tolist() and 5 < fooled.sum() < 55
    few = slice(10, 30)
    other = robustness.attack_images(
        victim, images[few], labels[few], attacks, indices=indices[few]
    )
    np.testing.assert_allclose(other.images, result.images[few], atol=1e-6)


def test_folder_holds_the_images_and_a_table(digits_run, tmp_path):
    out = tmp_path / "out"
    result = flaxcls.attack(
        digits_run, norm="l2", eps=1.5, method="pgd", steps=3, examples=50, out=out
    )
    rows = list(csv.DictReader((out / "attack.csv").open()))
    assert len(rows) == result["count"] == 50
    right = [row["clean"] == row["class"] for row in rows]
    fooled = [row["attack"] != "" for row in rows]
    assert np.mean(right) == pytest.approx(result["accuracies"]["clean"])
    assert np.mean(right) - np.mean(fooled) == pytest.approx(result["robust"]) and any(fooled)
    files = {path.name for path in out.iterdir()} - {"attack.csv"}
    assert files == {row["file"] for row in rows if row["file"]} and len(files) == sum(fooled)
    pictures = [np.asarray(Image.open(out / row["file"])) for row in rows if row["file"]]
    predictions = flaxcls.load(digits_run).predict(pictures)
    said = [row["rounded"] for row in rows if row["file"]]
    assert [prediction.name for prediction in predictions] == said
    rounded = np.mean(
        [
            r and (row["rounded"] or row["class"]) == row["class"]
            for r, row in zip(right, rows, strict=True)
        ]
    )
    assert rounded == pytest.approx(result["rounded"], abs=0.02)
    assert all(float(row["l2"]) <= 1.5 and row["attack"] != "apgd-ce" for row in rows)
    with pytest.raises(ConfigError, match="is there already; name a new folder"):
        flaxcls.attack(digits_run, out=out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"method": "pdg"}, "--method is 'pdg', which is not known, did you mean 'pgd'?"),
        ({"norm": "l1"}, "--norm is 'l1', which is not known"),
        ({"eps": "8/x"}, "--eps must be a number above 0 or text such as '8/255', got '8/x'"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"examples": 0}, "--examples must be at least 1, got 0"),
        ({"ema": True}, "kept no average of its parameters"),
    ],
)
def test_wrong_argument_is_one_sentence(digits_run, arguments, sentence):
    with pytest.raises(ConfigError) as error:
        robustness.attack_run(digits_run, **arguments)
    assert sentence in str(error.value)


@pytest.mark.parametrize("right, count", [(0, 10), (10, 10), (37, 100), (9403, 10_000)])
def test_interval_is_wilsons(right, count):
    known = scipy.stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right, count) == pytest.approx((known.low, known.high), abs=1e-6)


@pytest.mark.slow
def test_command_prints_every_attack(digits_run, run_main):
    arguments = (f"--run={digits_run}", "--eps=0.1", "--method=pgd", "--steps=3", "--examples=40")
    result = run_main(*arguments, module="flaxcls.attack")
    assert result.returncode == 0, result.stderr
    first, *lines = result.stdout.splitlines()
    assert "parameters, test: 40 of 360 examples, linf up to 0.1" in first
    assert [line.split()[0] for line in lines] == ["clean", "fgsm", "pgd", "rounded"]
    assert "% , 95" not in lines[2] and "95 % interval" in lines[2]
