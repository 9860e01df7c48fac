"""Classes of different sizes: long tails made on purpose, and what balances them in training."""

import json
import shutil

import numpy as np
import pytest

from flaxcls import build
from flaxcls.config.recipes import load_recipe
from flaxcls.core.losses import balanced_weights
from flaxcls.data import open_source
from flaxcls.data.loader import materialize
from flaxcls.data.long_tail import long_tailed, profile
from flaxcls.errors import ConfigError
from flaxcls.inference.evaluator import evaluate_run
from flaxcls.inference.predictions import predict_split
from flaxcls.inference.restored import restore
from flaxcls.runtime import sharding
from flaxcls.training.train import train_config


def test_profile_is_that_of_cifar10_lt():
    # https://github.com/kaidic/LDAM-DRW has these for an imbalance of 100.
    assert profile(5000, 100, 10) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert profile(3, 1, 4) == [3, 3, 3, 3] and profile(7, 1, 1) == [7]
    assert [profile(1000, factor, 2)[1] for factor in (8, 10, 1000)] == [125, 100, 1]


def test_long_tail_is_the_first_examples_of_each_class_in_the_order_of_the_data():
    whole = open_source("digits", "train")
    part = long_tailed(whole, 20)
    labels, counts = whole.labels(), profile(int(np.bincount(whole.labels()).min()), 20, 10)
    assert counts[0] == 20 * counts[-1] + counts[0] % 20 and len(part) == sum(counts)
    np.testing.assert_array_equal(np.bincount(part.labels()), counts)
    rank = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
    chosen = np.flatnonzero(rank < np.array(counts)[labels])
    images, read = materialize(part)
    expected, expected_labels = materialize(whole, indices=chosen)
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(read, expected_labels)
    np.testing.assert_array_equal(part.labels(), expected_labels)
    assert part.where(5) == whole.where(int(chosen[5]))
    prints = {whole.fingerprint, part.fingerprint, long_tailed(whole, 10).fingerprint}
    assert len(prints) == 3 and long_tailed(whole, 20.0).fingerprint == part.fingerprint


def test_long_tail_of_data_that_are_elsewhere_has_its_size(tmp_path):
    config = load_recipe("cifar10_lt", [f"data.dir={tmp_path}"]).config
    described = [build.source_or_description(config, split) for split in ("train", "test")]
    assert [len(source) for source in described] == [12_406, 10_000]


def test_long_tail_is_of_the_split_to_train_on_alone(tiny_config):
    config = tiny_config(data__long_tail=4, data__eval_split="train[:50%]")
    experiment = build.make_experiment(config, sharding.make_mesh())
    sizes = [len(experiment.train.source), len(experiment.evaluation.source)]
    assert sizes == [sum(profile(19, 4, 5)), 48]
    assert any("trained on as well" in note for note in experiment.notes)
    config.data.long_tail = 20
    with pytest.raises(ConfigError, match="long_tail must be at most 19, the examples of the sma"):
        build.make_experiment(config, sharding.make_mesh())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__long_tail": 0.5}, "config.data.long_tail must be at least 1, got 0.5"),
        ({"data__long_tail": "a"}, "config.data.long_tail must be at least 1, got 'a'"),
        ({"sampling": "alike"}, "config.sampling must be shuffle or balanced or square_root, got"),
        ({"loss__effective_number_beta": 1.0}, "effective_number_beta must be at least 0 and belo"),
        ({"loss__effective_number_beta": 0.9}, "needs config.loss.class_weights = 'effective_num"),
        ({"loss__class_weights": "equal"}, "must be 'balanced', 'effective_number' or 5 numbers"),
        ({"loss__name": "logit_adjusted", "loss__class_counts": (1, 2)}, "must be 5 numbers"),
        ({"loss__name": "logit_adjusted", "loss__tau": -1.0}, "tau must be float at least 0"),
        ({"loss__tau": 1.0}, "config.loss.tau is not used by softmax_cross_entropy"),
    ],
)
def test_what_can_not_balance_is_refused_in_one_sentence(tiny_config, changes, message):
    config = tiny_config(**changes)
    with pytest.raises(ConfigError, match=message):
        build.check(config)
        build.make_experiment(config, sharding.make_mesh())


@pytest.mark.parametrize(
    "changes", [{"loss__class_weights": "balanced"}, {"loss__name": "logit_adjusted"}]
)
def test_balancing_twice_is_noted(tiny_config, changes):
    for sampling, noted in (("shuffle", 0), ("balanced", 1), ("square_root", 1)):
        config = tiny_config(sampling=sampling, **changes)
        notes = build.make_experiment(config, sharding.make_mesh()).notes
        assert sum("one of the two balances" in note for note in notes) == noted


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_hosts_hold_disjoint_parts_of_the_same_balanced_batches(tiny_config, mode):
    config = tiny_config(data__long_tail=6, sampling="balanced", input__mode=mode, seed=3)
    pipeline = build.make_experiment(config, sharding.make_mesh()).train
    labels = pipeline.source.labels()

    def batches(rows=None, start=0):
        data = pipeline.open(rows=rows)
        try:
            return [batch["index"] for batch in data.batches(start, 12)]
        finally:
            data.close()

    whole = batches()
    parts = [batches(lambda size, host=host: np.arange(size)[host::2]) for host in range(2)]
    for step, index in enumerate(whole):
        np.testing.assert_array_equal(np.stack([part[step] for part in parts], 1).ravel(), index)
    for start in (1, 7):
        np.testing.assert_array_equal(batches(start=start), whole[start:])
    drawn = np.bincount(labels[np.concatenate(whole)[: len(labels)]])
    assert drawn.max() - drawn.min() <= 1 < np.ptp(np.bincount(labels))


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    """A streamed run whose sampling, loss and choice of the best follow from the classes."""
    from flaxcls.config import default

    config = default()
    config.batch_size, config.duration, config.seed = 32, "12 steps", 1
    config.log_every = config.eval.every = config.checkpoint.every = "4 steps"
    config.checkpoint.keep, config.checkpoint.best_metric = 3, "balanced_accuracy"
    config.data.name, config.data.eval_split, config.data.long_tail = "digits", "test[:100]", 30
    config.input.mode, config.sampling = "stream", "square_root"
    config.model.name, config.model.widths = "dense", (16,)
    config.optimizer.momentum = 0.9
    config.loss.name, config.loss.tau = "logit_adjusted", 0.7
    config.loss.class_weights, config.loss.effective_number_beta = "effective_number", 0.99
    workdir = tmp_path_factory.mktemp("balanced") / "run"
    return config, workdir, train_config(config, workdir)


@pytest.mark.parametrize("step", [4, 8])
def test_balanced_run_resumes_to_the_same_arrays(
    balanced, tmp_path, saved_arrays, assert_same_arrays, step
):
    config, workdir, summary = balanced
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    for later in range(step + 4, 13, 4):
        shutil.rmtree(tmp_path / f"run/checkpoints/{later}")
    again = train_config(config, tmp_path / "run")
    assert again["eval"] == summary["eval"]
    assert_same_arrays(saved_arrays(tmp_path / "run", 12), saved_arrays(workdir, 12))


def test_saved_run_knows_its_classes_and_is_evaluated_without_adjustment(balanced):
    _, workdir, summary = balanced
    content = json.loads((workdir / "config.json").read_text())
    counts = np.array(content["class_counts"])
    assert counts.tolist() == profile(counts[0], 30, 10)
    weights = (1 - 0.99) / (1 - 0.99**counts)
    np.testing.assert_allclose(content["class_weights"], weights * 10 / weights.sum(), rtol=1e-12)

    _, _, results = evaluate_run(workdir)
    assert results == {"eval": summary["eval"]}
    run = restore(workdir)
    predictions = predict_split(run, run.experiment.evaluation(None, None), run.variables)
    x, labels = predictions.logits.astype(np.float64), predictions.labels
    rows = np.arange(len(labels))

    def cross_entropy(logits):
        return np.log(np.exp(logits).sum(axis=1)) - logits[rows, labels]

    assert results["eval"]["loss"] == pytest.approx(cross_entropy(x).mean(), rel=1e-5)
    adjusted = cross_entropy(x + 0.7 * np.log(counts / counts.sum()))
    objective = np.average(adjusted, weights=np.array(content["class_weights"])[labels])
    assert results["eval"]["objective"] == pytest.approx(objective, rel=1e-5)
    right = x.argmax(axis=1) == labels
    recalls = [right[labels == label].mean() for label in range(10)]
    assert results["eval"]["balanced_accuracy"] == pytest.approx(np.mean(recalls), rel=1e-9)
    assert summary["best"]["balanced_accuracy"] >= results["eval"]["balanced_accuracy"]
    np.testing.assert_allclose(
        predictions.probabilities, np.exp(x) / np.exp(x).sum(axis=1, keepdims=True), rtol=1e-5
    )
    trained_on = run.experiment.evaluation("train", None).source
    np.testing.assert_array_equal(np.bincount(trained_on.labels()), counts)


def test_own_loss_gets_the_class_counts_of_the_training_split(tiny_config, tmp_path, monkeypatch):
    (tmp_path / "margins.py").write_text(
        "import jax.numpy as jnp\n"
        "from flaxcls.core.losses import softmax_cross_entropy\n\n"
        "def ldam(logits, targets, /, *, most: float = 0.5, class_counts=None):\n"
        "    margins = jnp.asarray(class_counts, jnp.float32) ** -0.25\n"
        "    margins *= most / margins.max()\n"
        "    return softmax_cross_entropy(logits - targets * margins, targets)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny_config(loss__name="margins:ldam", loss__most=0.3, data__long_tail=4)
    config.duration = "2 steps"
    summary = train_config(config, tmp_path / "run")
    content = json.loads((tmp_path / "run/config.json").read_text())
    assert content["class_counts"] == profile(19, 4, 5)
    assert summary["eval"]["objective"] > summary["eval"]["loss"]  # margins make it harder


def test_balanced_sampling_draws_an_example_as_often_as_balanced_weights_weigh_it(tiny_config):
    config = tiny_config(data__long_tail=19, sampling="balanced", batch_size=5)
    pipeline = build.make_experiment(config, sharding.make_mesh()).train
    labels = pipeline.source.labels()
    steps = len(labels) * 19 * 12  # after which all permutations have ended
    times = np.zeros(len(labels))
    for step in range(steps // 5):
        np.add.at(times, pipeline.order.batch(step)["index"], 1)
    counts = np.bincount(labels)
    np.testing.assert_allclose(times / times.mean(), balanced_weights(counts)[labels], rtol=0.05)
