"""Evaluation is exact: against NumPy, for any size, batch and number of devices."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image

from flaxcls import models
from flaxcls.config import tree
from flaxcls.core import losses
from flaxcls.data import open_source
from flaxcls.data.loader import Loader, materialize
from flaxcls.data.resident import Resident
from flaxcls.data.stream import Stream, Workers
from flaxcls.errors import ConfigError
from flaxcls.inference import evaluator
from flaxcls.inference.predictions import predict_split
from flaxcls.inference.restored import restore
from flaxcls.training.train import train_config as train

MEAN, STD = (0.3,), (0.35,)


def mesh_of(devices):
    types = (AxisType.Auto, AxisType.Auto)
    devices = jax.devices()[:devices]
    return jax.make_mesh((len(devices), 1), ("data", "fsdp"), axis_types=types, devices=devices)


@pytest.fixture(scope="module")
def digits():
    return materialize(open_source("digits", "test+train[:1]"))


@pytest.fixture(scope="module")
def network():
    """A dense network of one layer, its variables, and the logits of images by NumPy."""
    module = models.build("dense", num_classes=10, widths=(12,))
    variables = jax.device_get(module.init(jax.random.key(1), np.zeros((1, 8, 8, 1)), train=False))

    def logits(images):
        x = (images.reshape(len(images), -1) / 255 - MEAN[0]) / STD[0]
        hidden, head = (variables["params"][name] for name in ("hidden1", "head"))
        x = np.maximum(x @ hidden["kernel"] + hidden["bias"], 0)
        return x @ head["kernel"] + head["bias"]

    return module, variables, logits


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("batch_size", [1, 5, 64, 1000])
@pytest.mark.parametrize("size", [1, 7, 360, 361])
def test_every_example_counts_once(digits, network, size, batch_size, devices):
    images, labels = (array[:size] for array in digits)
    assert len(images) == size
    module, variables, logits_of = network
    weights = np.linspace(0.5, 2, 10)
    loss = losses.build("softmax_cross_entropy", class_weights=weights)
    data = Resident(images, labels)
    evaluate = evaluator.Evaluator(
        mesh_of(devices), module, loss, data, batch_size=batch_size, mean=MEAN, std=STD
    )
    with jax.transfer_guard("disallow"):
        row = evaluate(jax.device_put(variables, jax.NamedSharding(mesh_of(devices), jax.P())))
    logits = logits_of(images.astype(float))
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -(log_p[np.arange(size), labels] * weights[labels]).sum() / weights[labels].sum()
    assert row["count"] == size
    assert row["accuracy"] * size == pytest.approx(
        (logits.argmax(axis=1) == labels).sum(), abs=1e-6
    )
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("devices, batch_size", [(1, 5), (8, 64), (8, 1000)])
def test_streamed_split_evaluates_to_the_same(network, devices, batch_size):
    module, variables, _ = network
    mesh, source = mesh_of(devices), open_source("digits", "test")
    stream = Stream(Loader(source), image_size=lambda step: None, workers=Workers(2, 0, 3))
    variables = jax.device_put(variables, jax.NamedSharding(mesh, jax.P()))
    rows = []
    for data in (Resident(*materialize(source)), stream):
        evaluate = evaluator.Evaluator(
            mesh,
            module,
            losses.build("softmax_cross_entropy"),
            data,
            batch_size=batch_size,
            mean=MEAN,
            std=STD,
        )
        with jax.transfer_guard("disallow"):
            rows.append([evaluate(variables) for _ in range(2)])
        evaluate.close()
    assert rows[0] == rows[1] and rows[0][0] == rows[0][1]
    assert rows[0][0]["count"] == 360


@pytest.fixture(scope="module")
def trained(tmp_path_factory, request):
    """A finished run with an average of its parameters, on digits."""
    from flaxcls.config import default

    config = default()
    config.batch_size, config.duration, config.ema_decay = 32, "20 steps", 0.8
    config.data.train_split, config.data.eval_split = "train[:200]", "test[:77]"
    config.eval.every = config.checkpoint.every = "4 steps"
    config.checkpoint.keep = 2
    config.optimizer.learning_rate, config.optimizer.momentum = 0.02, 0.9
    config.loss.class_weights = "balanced"
    workdir = tmp_path_factory.mktemp("evaluate") / "run"
    return config, workdir, train(config, workdir)


def test_saved_run_evaluates_to_what_training_said(trained):
    _, workdir, summary = trained
    step, split, results = evaluator.evaluate_run(workdir)
    assert (step, split) == (20, "test[:77]")
    assert results == {"eval": summary["eval"], "ema": summary["ema"]}
    assert summary["eval"]["count"] == 77


def test_predictions_of_a_split_have_the_metrics_of_its_evaluation(digits_run):
    _, _, results = evaluator.evaluate_run(digits_run)
    run = restore(digits_run)
    pipeline = run.experiment.evaluation(None, None)
    predictions = predict_split(run, pipeline, run.variables)
    assert predictions.logits.shape == predictions.probabilities.shape == (360, 10)
    np.testing.assert_array_equal(predictions.labels, pipeline.source.labels())
    np.testing.assert_allclose(predictions.probabilities.sum(axis=1), 1, rtol=1e-5)
    accuracy = np.mean(predictions.logits.argmax(axis=1) == predictions.labels)
    assert accuracy == pytest.approx(results["eval"]["accuracy"], abs=1e-9) and accuracy > 0.9


def test_best_checkpoint_evaluates_to_the_best_result(trained):
    _, workdir, summary = trained
    best = dict(summary["best"])
    step, _, results = evaluator.evaluate_run(workdir, checkpoint="best")
    assert step == best.pop("step")
    assert results[best.pop("weights")] == best


def test_older_checkpoint_and_other_split_can_be_evaluated(trained):
    _, workdir, _ = trained
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row["step"] == 16 and "eval" in row)
    assert evaluator.evaluate_run(workdir, checkpoint="16")[2]["eval"] == row["eval"]
    assert evaluator.evaluate_run(workdir, split="test")[2]["eval"]["count"] == 360
    with pytest.raises(ConfigError, match="no checkpoint '3'"):
        evaluator.evaluate_run(workdir, checkpoint="3")
    with pytest.raises(ConfigError, match="there is train, test"):
        evaluator.evaluate_run(workdir, split="validation")


def test_folder_of_a_run_is_enough_wherever_it_is(trained, tmp_path, run_main):
    _, workdir, summary = trained
    moved = tmp_path / "elsewhere"
    shutil.copytree(workdir, moved)
    for name in ("metrics.jsonl", "summary.json", "tensorboard"):
        path = moved / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = run_main(f"--run={moved}", "--config.x=1", module="flaxcls.evaluate")
    assert result.returncode == 2
    result = run_main(f"--run={moved}", module="flaxcls.evaluate")
    assert result.returncode == 0, result.stderr
    right = round(summary["eval"]["accuracy"] * 77)
    assert f"({right} of 77), loss {summary['eval']['loss']:.4f}" in result.stdout
    assert "step 20, test[:77], ema:" in result.stdout


def test_other_classes_than_the_run_was_trained_on_are_refused(trained, tmp_path):
    _, workdir, _ = trained
    moved = tmp_path / "run"
    shutil.copytree(workdir, moved)
    content = json.loads((moved / "config.json").read_text())
    content["config"]["data"] |= {"name": "fake", "num_classes": 10, "image_shape": [8, 8, 1]}
    (moved / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="classes of fake are not the 10 that"):
        evaluator.evaluate_run(moved, split="test")
    assert tree.get(trained[0], "data.name") == "digits"


@pytest.fixture
def picture_folder(tmp_path):
    """A folder with train/ and val/ of three classes and test/ of two of them; its path."""
    random = np.random.default_rng(0)
    for split, names in (("train", "abc"), ("val", "abc"), ("test", "ca")):
        for name, number in ((name, number) for name in names for number in range(4)):
            path = tmp_path / "pictures" / split / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = 40 + 80 * "abc".index(name)
            pixels = random.integers(shade, shade + 40, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(path)
    return tmp_path / "pictures"


def test_split_with_some_of_the_classes_is_evaluated(tmp_path, tiny_config, picture_folder, capfd):
    config = tiny_config(
        data__name="folder",
        data__path=str(picture_folder),
        data__eval_split="val",
        data__image_shape=None,
        data__num_classes=None,
        data__num_examples=None,
        image_size=8,
        batch_size=8,
        crop__name="resize",
    )
    train(config, tmp_path / "run")
    capfd.readouterr()
    _, _, results = evaluator.evaluate_run(tmp_path / "run", split="test")
    assert results["eval"]["count"] == 8
    assert "note: 'test' has 2 of the 3 classes: 'a', 'c'" in capfd.readouterr().err
    shutil.rmtree(picture_folder / "test" / "c")  # labels stay those of the network
    _, _, one = evaluator.evaluate_run(tmp_path / "run", split="test")
    assert one["eval"]["count"] == 4
    assert one["eval"]["loss"] != pytest.approx(results["eval"]["loss"])

    (picture_folder / "test" / "zebra").mkdir()
    shutil.copy(picture_folder / "val" / "a" / "0.png", picture_folder / "test" / "zebra")
    with pytest.raises(ConfigError, match="'zebra'"):
        evaluator.evaluate_run(tmp_path / "run", split="test")
