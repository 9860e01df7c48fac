"""Evaluation in depth by `evaluate`: of a run, of other data, of several runs, and as files."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from flaxcls.config import default
from flaxcls.data import open_source
from flaxcls.data.matched import Matched, read_class_map
from flaxcls.data.source import Example, Source
from flaxcls.errors import ConfigError
from flaxcls.evaluate import FLAGS, main
from flaxcls.inference.ensemble import averaged, check_alike
from flaxcls.inference.evaluator import evaluate_run
from flaxcls.inference.predictions import predict_split, probabilities_of
from flaxcls.inference.restored import open_evaluation, restore
from flaxcls.insight.detailed import evaluate_in_depth
from flaxcls.training.train import train_config


@pytest.fixture
def command(digits_run, capsys):
    """Runs the command on digits, or on the runs that are given: what it printed."""

    def runner(*arguments, runs=(digits_run,)):
        for name in FLAGS:
            FLAGS[name].unparse()
        main(["evaluate", *(f"--run={run}" for run in runs), *map(str, arguments)])
        return capsys.readouterr().out

    yield runner
    for name in FLAGS:
        FLAGS[name].unparse()


@pytest.fixture(scope="module")
def predictions(digits_run):
    run = restore(digits_run)
    return predict_split(run, run.experiment.evaluation(None, None), run.variables)


@pytest.fixture(scope="module")
def other_run(tmp_path_factory):
    """A run on the same digits of another network, at another image size."""
    config = default()
    config.batch_size, config.duration, config.eval.every = 64, "2 epochs", "2 epochs"
    config.data.name, config.image_size = "digits", 12
    config.model.name, config.model.widths = "dense", (24,)
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 5e-3
    workdir = tmp_path_factory.mktemp("other") / "run"
    train_config(config, workdir)
    return workdir


def draw(folder, names):
    """Digits of the test split as files, in folders by what `names` calls them; their labels."""
    source, labels = open_source("digits", "test"), []
    for number in range(100):
        image, label = source[number]
        if label in names:
            path = folder / names[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path)
            labels.append(label)
    return labels


def test_details_come_after_the_line_that_was_always_there(command, digits_run):
    line = command()
    assert line.count("\n") == 1
    out = command("--detailed")
    assert out.startswith(line)
    for text in (
        "digits 'test': 360 examples of 10 classes",
        "Temperature ",
        "the other 180",
        "Classes, the worst first",
        "The most confident of the",
    ):
        assert text in out
    rows = [row.split() for row in out[out.index("Classes,") :].splitlines()]
    recalls = [float(row[2]) for row in rows if len(row) > 9 and row[0].isdigit()]
    assert len(recalls) == 10 and recalls == sorted(recalls)


def test_files_hold_every_prediction_and_metric(command, digits_run, predictions, tmp_path):
    out = command(f"--out={tmp_path}/all")
    assert out.endswith("/all is written\n") and "Classes" not in out
    assert os.listdir(tmp_path) == ["all"]
    with np.load(tmp_path / "all/predictions.npz") as stored:
        np.testing.assert_array_equal(stored["logits"], predictions.logits)
        np.testing.assert_array_equal(stored["probabilities"], predictions.probabilities)
        np.testing.assert_array_equal(stored["labels"], predictions.labels)
        assert stored["class_names"].tolist() == list("0123456789")
    rows = list(csv.DictReader((tmp_path / "all/predictions.csv").open(newline="")))
    assert [int(row["label"]) for row in rows] == predictions.labels.tolist()
    assert [int(row["prediction"]) for row in rows] == predictions.logits.argmax(axis=1).tolist()
    right = sum(row["rank"] == "1" for row in rows)
    found = json.loads((tmp_path / "all/metrics.json").read_text())
    accuracy = evaluate_run(digits_run)[2]["eval"]["accuracy"]
    assert found["metrics"]["accuracy"] == pytest.approx(accuracy) == right / 360
    with (tmp_path / "all/confusion.csv").open(newline="") as file:
        header, *pairs = csv.reader(file)
    assert header[1:] == [row[0] for row in pairs] == list("0123456789")
    assert sum(int(row[k + 1]) for k, row in enumerate(pairs)) == right
    classes = list(csv.DictReader((tmp_path / "all/classes.csv").open(newline="")))
    assert sum(int(row["right"]) for row in classes) == right
    with pytest.raises(ConfigError, match="all is there already; name a new folder"):
        command(f"--out={tmp_path}/all")


def test_temperature_is_judged_on_what_it_was_not_fitted_on(digits_run, command):
    half = evaluate_in_depth([digits_run]).scaling
    assert half.temperature > 0 and half.after["nll"] != half.before["nll"]
    other = evaluate_in_depth([digits_run], split="test[:50%]", fit_split="test[50%:]")
    assert other.scaling.fitted_on == "the 180 examples of 'test[50%:]'"
    assert other.scaling.before["nll"] == pytest.approx(other.metrics["nll"])
    with pytest.raises(
        ConfigError, match="1,437 of the 1,437 examples of 'train' are what the net"
    ):
        command("--detailed", "--fit_split=train")
    with pytest.raises(ConfigError, match="180 of the 180 examples of 'test.:50%.' are evaluated"):
        command("--detailed", "--fit_split=test[:50%]")


def test_other_data_is_matched_by_the_names_of_its_classes(
    command, digits_run, predictions, tmp_path
):
    labels = draw(tmp_path / "some", {7: "7", 0: "0", 3: "3"})
    places = np.flatnonzero(np.isin(predictions.labels[:100], (0, 3, 7)))
    right = np.count_nonzero(predictions.logits.argmax(axis=1)[places] == labels)
    out = command(f"--source={tmp_path}/some")
    assert (
        f"some, all: accuracy {100 * right / len(labels):.2f} % ({right} of {len(labels)})" in out
    )
    assert "of 3 of the 10 classes" in command(f"--source={tmp_path}/some", "--detailed")

    run = restore(digits_run)
    found = predict_split(run, open_evaluation(run, source=f"{tmp_path}/some"), run.variables)
    order = np.argsort(found.logits[:, 0])
    np.testing.assert_allclose(
        found.logits[order],
        predictions.logits[places][np.argsort(predictions.logits[places][:, 0])],
        rtol=1e-4,
        atol=1e-4,
    )


def test_classes_that_are_called_otherwise_need_a_file(command, digits_run, tmp_path):
    labels = draw(tmp_path / "words", {0: "zero", 1: "1", 2: "other zero", 3: "junk"})
    source = f"--source={tmp_path}/words"
    with pytest.raises(
        ConfigError,
        match="does not know 3 of the 4 classes of folder: 'junk', 'other zero', 'zero'",
    ):
        command(source)
    (tmp_path / "m.csv").write_text("name,class\nzero,0\nother zero,2\njunk,\n")
    out = command(source, f"--classes={tmp_path}/m.csv")
    count = sum(label != 3 for label in labels)
    assert f" of {count})" in out and float(out.split("accuracy ")[1].split()[0]) > 80
    for text, sentence in {
        "zero,0\nzer,1\n": "names 'zer', which folder does not have, did you mean 'zero'",
        "zero,O\n": "has 'O' for 'zero', which the network does not know",
        "zero\n": "line 1: must be name,class, got zero",
        "zero,0\nzero,1\n": "line 2: 'zero' is there twice",
        "": "has no rows",
    }.items():
        (tmp_path / "m.csv").write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            command(source, f"--classes={tmp_path}/m.csv")
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        read_class_map(f"{tmp_path}/none.csv")


class Names(Source):
    """Two examples of each class, in order."""

    def __init__(self, class_names):
        super().__init__(
            name="names", split="s", class_names=class_names, image_shape=(1, 1, 1), fingerprint="f"
        )

    def __len__(self):
        return 2 * len(self.class_names)

    def __getitem__(self, index):
        return Example(np.full((1, 1, 1), index, np.uint8), index // 2)


def test_labels_are_those_of_the_network_whatever_the_order():
    source = Names(["e\u0301t", "b", "x\ny"])  # an accent as macOS has it
    matched = Matched(source, ["x\ny", "\u00e9t", "c", "b"])
    assert matched.labels().tolist() == [1, 1, 3, 3, 0, 0] == [matched[i].label for i in range(6)]
    assert matched.class_names == ("x\ny", "\u00e9t", "c", "b")
    some = Matched(source, ["c", "d"], {"b": "c", "\u00e9t": "", "x\\ny": "d"})
    assert some.labels().tolist() == [0, 0, 1, 1] == [some[i].label for i in range(4)]
    assert [int(some[i].image[0, 0, 0]) for i in range(4)] == [2, 3, 4, 5]
    assert some.where(0) == "example 2 of names 's'"
    with pytest.raises(ConfigError, match="every class of names 's' is left out"):
        Matched(source, ["b"], {"b": "", "\u00e9t": "", "x\\ny": ""})


def test_other_data_must_fit_the_network(command, digits_run, tmp_path):
    with pytest.raises(
        ConfigError, match="pictures of fake have 3 channels, and the network takes 1"
    ):
        command("--source=fake")
    with pytest.raises(ConfigError, match="--data_dir is for the run's own data"):
        command("--source=digits", "--data_dir=x")
    with pytest.raises(ConfigError, match="--classes is for --source"):
        command("--classes=x.csv")
    with pytest.raises(ConfigError, match="--knn is of one run and its own data"):
        command("--source=digits", "--knn=3")
    assert "digits, test: accuracy" in command("--source=digits")


@pytest.mark.parametrize(
    "outputs", ["softmax_cross_entropy", "sigmoid_cross_entropy", "squared_error"]
)
def test_average_is_that_of_probabilities_or_of_logits(outputs):
    random = np.random.default_rng(0)
    logits = random.normal(scale=3, size=(3, 50, 4)).astype(np.float32)
    each = [probabilities_of(part, outputs) for part in logits]
    mean, probabilities = averaged(list(logits), outputs)
    np.testing.assert_allclose(probabilities, np.mean(each, axis=0), atol=2e-6)
    np.testing.assert_allclose(probabilities_of(mean, outputs), probabilities, atol=1e-6)
    mean, probabilities = averaged(list(logits), outputs, "logits")
    np.testing.assert_allclose(mean, logits.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(probabilities, probabilities_of(mean, outputs), atol=1e-6)


def test_average_is_finite_where_probabilities_are_rounded_to_0():
    logits = np.array([[[300.0, 0, -300]], [[0, 300, -300]]], np.float32)
    mean, probabilities = averaged(list(logits), "softmax_cross_entropy")
    np.testing.assert_allclose(probabilities[0], [0.5, 0.5, 0], atol=1e-6)
    assert np.isfinite(mean).all()


def test_ensemble_is_better_informed_than_its_members(command, digits_run, other_run, predictions):
    out = command(runs=(digits_run, other_run))
    lines = out.splitlines()
    assert lines[0].startswith("A: ") and lines[1].startswith("B: ")
    assert "A + B, probabilities averaged, test: accuracy" in lines[2]
    assert "A - B" in out and "Classes" not in out
    found = evaluate_in_depth([digits_run, other_run])
    one, other = (member.predictions[0].probabilities for member in found.members)
    np.testing.assert_allclose(found.predictions.probabilities, (one + other) / 2, atol=1e-6)
    alone = [row["nll"] for row in found.member_metrics]
    assert found.metrics["nll"] < np.mean(alone)  # as the logarithm is concave
    assert found.differences["nll"].value == pytest.approx(alone[0] - alone[1])
    assert found.differences["accuracy"].is_clear  # a network of one layer after two epochs
    by_logits = evaluate_in_depth([digits_run, other_run], average="logits")
    assert by_logits.metrics["nll"] != found.metrics["nll"]


def test_runs_that_do_not_fit_together_are_refused(command, digits_run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(digits_run, moved)
    content = json.loads((moved / "config.json").read_text())
    content["config"]["data"]["eval_split"] = "test[:50]"
    (moved / "config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="which are not the same examples: name them by --split"):
        command(runs=(digits_run, moved))
    assert "A + B, logits averaged, test[:50]" in command(
        "--split=test[:50]", "--average=logits", runs=(digits_run, moved)
    )
    with pytest.raises(ConfigError, match="b has other classes than a"):
        check_alike(["a", "b"], [["x", "y"], ["y", "x"]], ["softmax_cross_entropy"] * 2)
    with pytest.raises(ConfigError, match="b gives outputs of squared_error and a of softmax"):
        check_alike(["a", "b"], [["x"]] * 2, ["softmax_cross_entropy", "squared_error"])
