"""k nearest neighbours against NumPy and scikit-learn, and by `evaluate --knn`."""

import jax
import numpy as np
import pytest

import flaxcls
from flaxcls import build
from flaxcls.core.metrics import rank_of_label
from flaxcls.errors import ConfigError
from flaxcls.inference.features import split_features
from flaxcls.inference.neighbors import TEMPERATURE, knn, knn_run, make_votes
from flaxcls.runtime import sharding
from flaxcls.training.train import train_config as train

RNG = np.random.default_rng(0)
CLASSES = 12
CENTERS = RNG.normal(size=(CLASSES, 16))


def made_up(count):
    """Features around a centre for each class, that overlap, and labels."""
    labels = RNG.integers(0, CLASSES, count).astype(np.int32)
    scale = RNG.uniform(0.1, 10, (count, 1))  # the length must not count
    features = scale * (CENTERS[labels] + 1.5 * RNG.normal(size=(count, 16)))
    return features.astype(np.float32), labels


KNOWN, ASKED = made_up(300), made_up(77)


def votes_in_float64(neighbors):
    known, asked = (
        features.astype(np.float64) / np.linalg.norm(features.astype(np.float64), axis=1)[:, None]
        for features, _ in (KNOWN, ASKED)
    )
    similarity = asked @ known.T
    votes = np.zeros((len(asked), CLASSES))
    for row, index in enumerate(np.argsort(-similarity, axis=1)[:, :neighbors]):
        np.add.at(votes[row], KNOWN[1][index], np.exp((similarity[row, index] - 1) / TEMPERATURE))
    return votes


@pytest.mark.parametrize("neighbors", [1, 5, 20, 300])
def test_votes_equal_numpys_in_float64(neighbors):
    units = [
        (features / np.linalg.norm(features, axis=1)[:, None]).astype(np.float32)
        for features, _ in (KNOWN, ASKED)
    ]
    votes = jax.jit(make_votes(neighbors, CLASSES))(units[0], KNOWN[1], units[1])
    np.testing.assert_allclose(votes, votes_in_float64(neighbors), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("batch_size", [7, 77, 1000])
def test_every_example_counts_once_for_any_batch_size(batch_size):
    rank = np.asarray(rank_of_label(votes_in_float64(20), ASKED[1]))
    result = knn(sharding.make_mesh(), KNOWN, ASKED, 20, CLASSES, batch_size=batch_size)
    assert result == {
        "accuracy": np.mean(rank == 0),
        "accuracy_top5": np.mean(rank < 5),
        "count": 77,
    }
    assert 0.3 < result["accuracy"] < 0.95 < result["accuracy_top5"] + 0.2


def test_accuracy_is_scikit_learns():
    neighbors = pytest.importorskip("sklearn.neighbors")
    unit = [f / np.linalg.norm(f.astype(np.float64), axis=1)[:, None] for f, _ in (KNOWN, ASKED)]
    classifier = neighbors.KNeighborsClassifier(
        20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp(-distance / TEMPERATURE),
    )
    expected = classifier.fit(unit[0], KNOWN[1]).score(unit[1], ASKED[1])
    assert knn(sharding.make_mesh(), KNOWN, ASKED, 20, CLASSES)["accuracy"] == expected


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_features_of_a_split_come_once_each_in_order(tiny_config, mode):
    config = tiny_config(input__mode=mode)
    experiment = build.make_experiment(config, sharding.make_mesh())
    pipeline = experiment.evaluation
    images = pipeline.sample(24)
    with_bias = lambda bias, x: x.reshape(len(x), -1)[:, :3] + bias  # noqa: E731
    features, labels = split_features(experiment.mesh, with_bias, 2.0, pipeline.open(), 7)
    np.testing.assert_array_equal(features, images.reshape(24, -1)[:, :3] + np.float32(2))
    np.testing.assert_array_equal(labels, pipeline.source.labels())


@pytest.fixture
def digits(tiny_config, tmp_path):
    """The folder of a run of some steps on real pictures."""
    config = tiny_config(ema_decay=0.9)
    del config.data.image_shape, config.data.num_classes, config.data.num_examples
    config.data.name = "digits"
    config.data.train_split, config.data.eval_split = "train[:300]", "test[:100]"
    train(config, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_is_evaluated_by_neighbors(digits, capfd):
    step, split, results = knn_run(digits, 5)
    assert (step, split, set(results)) == (12, "test[:100]", {"eval", "ema"})
    assert results["eval"]["accuracy"] > 0.6 and results["eval"]["count"] == 100
    assert flaxcls.evaluate(digits, knn=5) == {"step": step, "split": split, **results}
    assert "note" not in capfd.readouterr().err
    _, _, own = knn_run(digits, 1, split="train[:300]")
    assert own["eval"] == {"accuracy": 1.0, "count": 300}
    assert "every picture is its own nearest neighbour" in capfd.readouterr().err


@pytest.mark.parametrize("neighbors", [0, -3, 301])
def test_more_neighbors_than_there_are_is_refused(digits, neighbors):
    with pytest.raises(ConfigError, match=r"--knn must be from 1 to 300, .*'train\[:300\]', got"):
        knn_run(digits, neighbors)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"detailed": True}, "--knn is of one run and its own data, and has no details"),
        ({"out": "folder"}, "--knn is of one run and its own data, and has no details"),
        ({"source": "digits"}, "--knn is of one run and its own data, and has no details"),
        ({"tta": "flip"}, "--tta averages logits, of which --knn has none"),
    ],
)
def test_what_neighbors_do_not_tell_is_refused(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        flaxcls.evaluate("run", knn=3, **options)
    with pytest.raises(ConfigError, match="--knn is of one run"):
        flaxcls.evaluate(["run", "other"], knn=3)


@pytest.mark.slow
def test_the_command_prints_the_accuracy(digits, run_main):
    result = run_main(f"--run={digits}", "--knn=5", module="flaxcls.evaluate")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2 and "loss" not in result.stdout
    assert ", step 12, test[:100], 5 nearest neighbors: accuracy " in lines[0]
    assert ", step 12, test[:100], ema, 5 nearest neighbors: accuracy " in lines[1]
    result = run_main(f"--run={digits}", "--knn=0", module="flaxcls.evaluate")
    assert result.returncode == 2 and "--knn must be from 1" in result.stderr
