"""The mean of several checkpoints is a run like any other, with statistics of its own."""

import json
import shutil

import jax
import numpy as np
import pytest

import flaxcls
from flaxcls import augment
from flaxcls.config import default
from flaxcls.data.loader import materialize
from flaxcls.errors import ConfigError
from flaxcls.inference.averaging import average_runs, greedy_choice
from flaxcls.inference.batch_statistics import batch_statistics
from flaxcls.inference.evaluator import evaluate_run
from flaxcls.inference.restored import restore
from flaxcls.training.train import train_config


def config_of(**changes):
    """A dense network on 200 digits, whose checkpoints are those of the steps 8, 16 and 24."""
    config = default()
    config.batch_size, config.duration, config.ema_decay = 32, "24 steps", 0.8
    config.log_every = config.eval.every = config.checkpoint.every = "8 steps"
    config.checkpoint.keep = 3
    config.data.train_split, config.data.eval_split = "train[:200]", "test[:100]"
    config.model.name, config.model.widths = "dense", (16,)
    config.optimizer.learning_rate, config.optimizer.momentum = 0.02, 0.9
    for name, value in changes.items():
        config[name] = value
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of one recipe from the same first weights, the second one shorter."""
    folder = tmp_path_factory.mktemp("runs")
    train_config(config_of(), folder / "a")
    train_config(config_of(init_from=f"{folder}/a@8", seed=1, duration="16 steps"), folder / "b")
    return folder / "a", folder / "b"


def test_mean_of_the_kept_checkpoints_is_a_run(runs, tmp_path, saved_arrays):
    run, _ = runs
    averaged = average_runs([run], tmp_path / "mean")
    assert [(m.run, m.step) for m in averaged.members] == [(run, 8), (run, 16), (run, 24)]
    members = [saved_arrays(run, step) for step in (8, 16, 24)]
    actual = saved_arrays(tmp_path / "mean", 24)
    assert actual.keys() == {name for name in members[0] if name.startswith("params/")}
    for name, array in actual.items():
        expected = np.mean([np.float64(member[name]) for member in members], axis=0)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-8)

    assert evaluate_run(tmp_path / "mean") == (24, "test[:100]", averaged.results)
    assert evaluate_run(tmp_path / "mean", checkpoint="best")[2] == averaged.results
    assert averaged.results["eval"]["count"] == 100
    assert json.loads((tmp_path / "mean/summary.json").read_text())["eval"]["count"] == 100
    content = json.loads((tmp_path / "mean/config.json").read_text())
    assert content["averaged"] == [[str(run), step] for step in (8, 16, 24)]
    classifier = flaxcls.load(tmp_path / "mean")
    assert classifier.class_names == flaxcls.load(run).class_names
    again = config_of(init_from=str(tmp_path / "mean"), duration="0 steps", ema_decay=None)
    summary = train_config(again, tmp_path / "again")
    assert summary["eval"]["accuracy"] == averaged.results["eval"]["accuracy"]


def test_mean_of_several_runs_is_of_their_last_checkpoints(runs, tmp_path, saved_arrays):
    found = flaxcls.average(list(runs), tmp_path / "mean")
    assert found["members"] == [(str(runs[0]), 24), (str(runs[1]), 16)]
    name = "params/head/kernel"
    expected = (saved_arrays(runs[0], 24)[name] + saved_arrays(runs[1], 16)[name]) / 2
    np.testing.assert_allclose(saved_arrays(tmp_path / "mean", 24)[name], expected, rtol=1e-5)
    some = flaxcls.average(runs[0], tmp_path / "some", checkpoint="8,last")["members"]
    assert [step for _, step in some] == [8, 24]
    best = flaxcls.average(runs, tmp_path / "best", checkpoint="best")["members"]
    assert best[0][1] == json.loads((runs[0] / "summary.json").read_text())["best"]["step"]


def test_greedy_soup_is_not_worse_than_its_best_member_where_it_was_chosen(runs, tmp_path, capsys):
    split = "train[200:400]"
    averaged = average_runs(
        list(runs), tmp_path / "soup", checkpoint="all", greedy=True, split=split
    )
    alone = [
        evaluate_run(run, checkpoint=str(step), split=split)[2]["eval"]["accuracy"]
        for run, steps in zip(runs, ((8, 16, 24), (8, 16)), strict=True)
        for step in steps
    ]
    chosen = evaluate_run(tmp_path / "soup", split=split)[2]["eval"]["accuracy"]
    assert chosen >= max(alone) and len(averaged.members) < 5
    said = capsys.readouterr().err
    assert f"a@8: accuracy {alone[0]:.4f}" in said and f" + {runs[0]}@" in said.replace("b@", "a@")


def test_greedy_choice_takes_what_does_not_make_it_worse():
    scores = {"a": 5, "b": 9, "c": 7, "d": 7, "bc": 8, "bd": 9, "bda": 10}
    asked = []

    def score(members):
        asked.append("".join(members))
        return scores[asked[-1]]

    assert greedy_choice("abcd", score) == ["b", "d", "a"]
    assert asked == ["a", "b", "c", "d", "bc", "bd", "bda"]


def momentless(run, images):
    """What the network's own BatchNorm makes of one batch, by Flax's moving average alone.

    It moves from r to m r + (1 - m) b: from 0 and from 1 tell b.
    """

    @jax.jit
    def move(batch_stats):
        variables = {**run.variables, "batch_stats": batch_stats}
        given = augment.normalize(images, run.metadata["mean"], run.metadata["std"])
        _, updates = run.experiment.network.apply(
            variables, given, train=True, mutable=["batch_stats"]
        )
        return updates["batch_stats"]

    starts = [jax.tree.map(f, run.variables["batch_stats"]) for f in (np.zeros_like, np.ones_like)]
    moved = [jax.tree.map(np.float64, move(start)) for start in starts]
    return jax.tree.map(lambda zero, one: zero / (1 - (one - zero)), *moved)


def test_batch_statistics_are_those_of_all_examples(digits_run):
    run = restore(digits_run)
    pipeline = run.experiment.evaluation("train[:300]", None)
    images, _ = materialize(pipeline.source)
    expected = momentless(run, images)

    def statistics(batch_size):
        experiment = run.experiment._replace(eval_batch_size=batch_size)
        return batch_statistics(run._replace(experiment=experiment), run.variables, pipeline)

    whole, parts = statistics(300), statistics(128)  # the latter's last one is of 44
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5), whole, expected
    )
    names = [*whole]
    for name in ("mean", "var"):  # of the first one, whatever the size of the batches
        np.testing.assert_allclose(
            parts[names[0]][name], expected[names[0]][name], rtol=2e-4, atol=1e-5
        )
    old = run.variables["batch_stats"][names[0]]["mean"]
    assert np.abs(old - whole[names[0]]["mean"]).max() > 1e-3  # it is no copy


def test_mean_with_batch_norm_has_statistics_of_its_own(digits_run, tmp_path, saved_arrays):
    shutil.copytree(digits_run, tmp_path / "copy")  # the mean of the same weights is these weights
    averaged = average_runs([digits_run, tmp_path / "copy"], tmp_path / "mean")
    before, after = (
        saved_arrays(digits_run, averaged.step),
        saved_arrays(tmp_path / "mean", averaged.step),
    )
    for name, array in after.items():
        same = np.array_equal(array, before[name])
        assert same == name.startswith("params/"), name
    assert averaged.results["eval"]["accuracy"] > 0.9
    run = restore(tmp_path / "mean")
    pipeline = run.experiment.evaluation("train", None)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        run.variables["batch_stats"],
        batch_statistics(run, run.variables, pipeline),
    )


def test_what_can_not_be_averaged_is_refused_in_one_sentence(runs, digits_run, tmp_path, capsys):
    def refused(message, runs, out="new", **options):
        with pytest.raises(ConfigError, match=message):
            average_runs(list(runs), tmp_path / out, **options)
        assert not (tmp_path / "new").exists()

    a, _ = runs
    refused(
        "are different networks: config.model.name is 'dense' and 'digits_cnn'", [a, digits_run]
    )
    refused("one checkpoint to average, .*a@24: name more runs", [a], checkpoint="last")
    refused("there is no run in", [a, tmp_path])
    refused("there is no checkpoint '7'", runs, checkpoint="7")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    refused("full is there already; name a new folder", runs, "full")
    refused("--split is missing: what a greedy soup takes", runs, greedy=True)
    refused(
        "'test\\[:50%\\]' must not choose: on the test split", runs, greedy=True, split="test[:50%]"
    )
    refused("the runs were trained on some of it", runs, greedy=True, split="train[190:]")
    other = tmp_path / "other"
    shutil.copytree(a, other)
    path = other / "checkpoints/24/facts/metadata"
    metadata = json.loads(path.read_text())
    metadata["class_names"] = metadata["class_names"][::-1]
    path.write_text(json.dumps(metadata))
    (other / "checkpoints/24/manifest.json").unlink()
    refused("tell different classes apart: their weights have no mean", [a, other])


@pytest.mark.slow
def test_command_says_what_it_has_averaged(runs, tmp_path, run_main):
    arguments = [f"--run={run}" for run in runs] + [f"--out={tmp_path}/mean"]
    result = run_main(*arguments, module="flaxcls.average")
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == f"the mean of 2: {runs[0]}@24, {runs[1]}@16"
    assert second.startswith(f"{tmp_path}/mean, step 24, test[:100]: accuracy ")
