"""Cross-validation: every fold is evaluated by a run that has not seen it, however often killed."""

import csv
import json

import numpy as np
import pytest

from flaxcls import build, crossval
from flaxcls.config.recipes import load_recipe
from flaxcls.errors import ConfigError, DataError, DivergedError, Interrupted
from flaxcls.inference.evaluator import evaluate_run
from flaxcls.studies import crossval as study
from flaxcls.studies.crossval import cross_validate
from flaxcls.training.hooks import Hooks, StopTraining
from flaxcls.training.train import train_config

FOLDS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The config, the folder and the results of a study."""
    path = tmp_path_factory.mktemp("study") / "recipe.py"
    path.write_text(RECIPE)
    config = load_recipe(str(path)).config
    return config, path.parent / "study", cross_validate(config, path.parent / "study", FOLDS)


RECIPE = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size, config.duration, config.eval.every = 16, "8 steps", "4 steps"
    config.log_every = config.checkpoint.every = "4 steps"
    config.data.train_split, config.data.eval_split = "train[:100]", "test[:50]"
    config.model.name, config.model.widths, config.ema_decay = "dense", (16,), 0.9
    config.optimizer.momentum = 0.9
    return config
"""


def predictions(workdir):
    with np.load(workdir / "predictions.npz") as arrays:
        return dict(arrays)


def test_study_is_told_by_its_files(finished):
    config, workdir, results = finished
    assert json.loads((workdir / "crossval.json").read_text()) == results
    accuracies = [run["ema"]["accuracy"] for run in results["runs"]]
    counts = [run["ema"]["count"] for run in results["runs"]]
    assert sum(counts) == 100 and {run["step"] for run in results["runs"]} == {8}
    assert results["mean"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert results["std"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    pooled = np.dot(accuracies, counts) / 100
    assert results["out_of_fold"] == {"accuracy": pytest.approx(pooled), "count": 100}
    with (workdir / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["index"]) for row in rows] == [*range(100)]
    assert np.mean([row["label"] == row["prediction"] for row in rows]) == pytest.approx(pooled)
    arrays = predictions(workdir)
    np.testing.assert_array_equal(arrays["labels"], build.source(config, "train[:100]").labels())
    np.testing.assert_array_equal(arrays["folds"], [int(row["fold"]) for row in rows])
    np.testing.assert_allclose(arrays["probabilities"].sum(1), 1, atol=1e-5)
    assert f"mean and standard deviation of {FOLDS} folds: accuracy" in study.describe(results)


def test_each_run_is_evaluated_on_the_fold_that_it_has_not_seen(finished):
    config, workdir, results = finished
    for run in results["runs"]:
        number = run["fold"]
        step, split, found = evaluate_run(workdir / f"fold_{number}")
        assert (step, split) == (8, f"train[:100], fold {number} of {FOLDS}")
        assert found["ema"]["accuracy"] == pytest.approx(run["ema"]["accuracy"])
        recorded = json.loads((workdir / f"fold_{number}" / "config.json").read_text())
        rest = build.source(config, f"train[:100], all but fold {number} of {FOLDS}")
        assert recorded["fingerprint"] == rest.fingerprint
        held_out = np.flatnonzero(predictions(workdir)["folds"] == number)
        assert not {*held_out} & {*rest.indices} and len(held_out) + len(rest.indices) == 100


def test_fold_that_was_interrupted_resumes_bitwise_and_finished_ones_are_left(
    finished, tmp_path, monkeypatch
):
    config, workdir, results = finished

    def stop(row):
        raise StopTraining

    parts = [study.Fold("train[:100]", number, FOLDS) for number in range(FOLDS)]
    train_config(study._config_of(config, parts[0]), tmp_path / "fold_0")
    second = study._config_of(config, parts[1])
    summary = train_config(second, tmp_path / "fold_1", hooks=Hooks(on_evaluation=stop))
    assert summary["step"] == 4
    before = (tmp_path / "fold_0" / "summary.json").stat()
    assert cross_validate(config, tmp_path, FOLDS)["mean"] == results["mean"]
    assert (tmp_path / "fold_0" / "summary.json").stat().st_mtime_ns == before.st_mtime_ns
    for name, array in predictions(workdir).items():
        np.testing.assert_array_equal(predictions(tmp_path)[name], array)
    again = (tmp_path / "predictions.csv").read_bytes()
    assert again == (workdir / "predictions.csv").read_bytes()


def test_other_folds_than_those_of_the_study_are_refused(finished):
    config, workdir, _ = finished
    with pytest.raises(ConfigError, match=r"fold 0 of 4: .* has config.data.eval_split = 'train"):
        cross_validate(config, workdir, 4)


def test_fold_that_is_not_what_was_held_out_is_refused(finished, tmp_path):
    _, workdir, _ = finished
    content = json.loads((workdir / "fold_0" / "config.json").read_text())
    content["config"]["data"]["fold_seed"] = 7
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(content))
    (copy / "checkpoints").symlink_to(workdir / "fold_0" / "checkpoints")
    with pytest.raises(DataError, match="is not what the run has held out"):
        evaluate_run(copy)
    assert evaluate_run(copy, split="test[:50]")[1] == "test[:50]"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DivergedError("too large"), "fold 1 of 3: too large"),
        (Interrupted("stopped", 42), r"stopped in fold 1 of 3 and saved; .* --workdir=.* resumes"),
    ],
)
def test_error_of_a_fold_keeps_its_kind_and_names_the_fold(
    finished, tmp_path, monkeypatch, error, sentence
):
    def train(config, workdir, *arguments, **options):
        if workdir.name == "fold_1":
            raise error
        return {"step": 8, "eval": {"accuracy": 1.0, "loss": 0.0, "count": 1}}

    monkeypatch.setattr(study, "train_config", train)
    with pytest.raises(type(error), match=sentence) as raised:
        cross_validate(finished[0], tmp_path, FOLDS)
    assert raised.value.exit_code == error.exit_code


def test_what_cannot_be_divided_or_is_no_study_is_refused_before_training(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="no class has 30 examples, one for each fold; .* has 20"):
        cross_validate(tiny_config(), tmp_path / "new", 30)
    assert not (tmp_path / "new").exists()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds config.json, which is not of a cross-validation"):
        cross_validate(tiny_config(), tmp_path, 3)


def test_rare_classes_are_told(tiny_config, capsys):
    config = tiny_config(data__num_examples=16)  # 4 of the first class, 3 of the others
    study._say_rare(build.source(config, "train"), 4)
    assert "note: 4 of the 5 classes have fewer examples than there are folds" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_command_cross_validates(recipe, tmp_path, capsys):
    flags = [f"--config={recipe}", f"--workdir={tmp_path}/study", "--folds=2"]
    (tmp_path / "groups.csv").write_text(
        "index,group\n" + "".join(f"{i},{i // 4}\n" for i in range(96))
    )
    flags += [f"--groups={tmp_path}/groups.csv", "--config.duration=3 steps"]
    crossval.main(["crossval", *flags])
    assert "mean and standard deviation of 2 folds" in capsys.readouterr().out
    folds = predictions(tmp_path / "study")["folds"].reshape(24, 4)
    assert (folds == folds[:, :1]).all() and set(folds.flat) == {0, 1}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--config=digits_cnn --folds=1", "folds"),
        ("--config=digits_cnn --config.batch_sise=4", "config.batch_sise is not a config field"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        crossval.main(["crossval", *flags.split()])
