"""Test-time augmentation in training's evaluations, of saved runs, in predictions, in exports."""

import contextlib
import importlib
import io

import jax
import numpy as np
import pytest

from flaxcls import build, models
from flaxcls.augment.views import VIEWS
from flaxcls.config import default
from flaxcls.core import losses
from flaxcls.data import open_source
from flaxcls.data.loader import materialize
from flaxcls.data.resident import Resident
from flaxcls.errors import ConfigError
from flaxcls.inference.evaluator import Evaluator, evaluate_run
from flaxcls.inference.exporter import export_run
from flaxcls.inference.predictions import predict_split
from flaxcls.inference.predictor import Predictor
from flaxcls.inference.restored import restore
from flaxcls.runtime import sharding
from flaxcls.training.train import train_config as train


@pytest.fixture(scope="module")
def digits():
    return materialize(open_source("digits", "test[:77]"))


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    """A run whose evaluations flip, its summary and what it has said."""
    config = default()
    config.batch_size, config.duration, config.eval.tta = 32, "12 steps", "flip"
    config.data.name, config.data.train_split = "digits", "train[:200]"
    config.data.eval_split = "test[:77]"
    config.eval.every = config.checkpoint.every = "12 steps"
    config.model.name, config.model.widths = "dense", (16,)
    workdir = tmp_path_factory.mktemp("tta") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        summary = train(config, workdir)
    return workdir, summary, said.getvalue()


@pytest.fixture
def evaluate(capsys):
    """The command, in this process; returns what it prints on standard output and error."""
    command = importlib.import_module("flaxcls.evaluate")

    def forget():
        for name in command.FLAGS:
            command.FLAGS[name].unparse()

    def run(*arguments):
        forget()  # or the runs would add up
        command.main(["evaluate", *arguments])
        return capsys.readouterr()

    yield run
    forget()


def metrics(logits, labels):
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    loss = -log_p[np.arange(len(labels)), labels].mean()
    return {"accuracy": (logits.argmax(axis=1) == labels).mean(), "loss": loss}


@pytest.mark.parametrize("devices, batch_size", [(1, 10), (8, 64)])
def test_evaluation_is_that_of_the_mean_logits_and_counts_every_example_once(
    digits, devices, batch_size
):
    images, labels = digits
    module = models.build("dense", num_classes=10, widths=(12,))
    variables = module.init(jax.random.key(1), np.zeros((1, 8, 8, 1)), train=False)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    loss = losses.build("softmax_cross_entropy")
    data = Resident(images, labels)
    evaluator = Evaluator(
        mesh, module, loss, data, batch_size=batch_size, mean=(0.3,), std=(0.35,), tta="flip_shift"
    )
    row = evaluator(sharding.replicate(mesh, variables))

    def logits(view):
        return module.apply(variables, (np.asarray(view) / 255 - 0.3) / 0.35, train=False)

    expected = sum(weight * logits(view) for weight, view in VIEWS["flip_shift"](images))
    assert row == pytest.approx({**metrics(np.asarray(expected), labels), "count": 77}, rel=1e-5)


def test_training_evaluates_by_views_and_a_saved_run_with_or_without(flipped, digits):
    workdir, summary, said = flipped
    images, labels = digits
    assert "77 to evaluate on (test[:77], by flip's views of each)" in said
    plain, both = Predictor(workdir, tta="none"), Predictor(workdir)
    direct, mirrored = plain(images), plain(images[:, :, ::-1])
    mean = (direct.logits + mirrored.logits) / 2
    np.testing.assert_allclose(both(images).logits, mean, rtol=1e-4, atol=1e-5)
    features = (direct.features + mirrored.features) / 2
    np.testing.assert_allclose(both(images).features, features, rtol=1e-4, atol=1e-5)
    assert "mean over the views of flip" in both.describe()
    assert "views" not in plain.describe()

    for tta, logits in ((None, mean), ("none", direct.logits)):
        _, _, results = evaluate_run(workdir, tta=tta)
        expected = {**metrics(logits, labels), "count": 77}
        assert results["eval"] == pytest.approx(expected, rel=1e-5)
        run = restore(workdir, tta=tta)
        predictions = predict_split(run, run.experiment.evaluation(None, None), run.variables)
        np.testing.assert_allclose(predictions.logits, logits, rtol=1e-4, atol=1e-5)
    assert evaluate_run(workdir)[2]["eval"] == summary["eval"]


def test_command_overrides_the_runs_own(flipped, evaluate):
    printed = {}
    for tta in ("flip", "none", "flip_shift"):
        printed[tta], error = evaluate(f"--run={flipped[0]}", f"--tta={tta}")
        assert ("note: logits are the mean over the views" in error) == (tta != "none")
    assert len({*printed.values()}) == 3


def test_export_is_of_the_network_alone_and_says_so(flipped, tmp_path, capsys):
    pytest.importorskip("safetensors")
    out = tmp_path / "out"
    certificate = export_run(flipped[0], out=out, format="safetensors", pictures=20)
    assert certificate["evaluate"]["top1_identical"] == 20 and (out / "parity.json").is_file()
    assert "without the run's test-time augmentation flip" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"eval__tta": "flap"}, "config.eval.tta is 'flap', which is not known, .*'flip'"),
        ({"eval__tta": "five_crop"}, "dense has other parameters .* are 7 x 7 pixels of 8 x 8"),
    ],
)
def test_views_that_can_not_be_are_told_before_training(tiny_config, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        config = tiny_config(**changes)
        build.check(config)
        build.make_experiment(config, sharding.make_mesh())


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--tta=flip", "--knn=3"], "--tta averages logits, of which --knn has none"),
        (["--tta=flap"], "config.eval.tta is 'flap', which is not known"),
    ],
)
def test_what_the_command_can_not_do_is_one_sentence(flipped, evaluate, flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        evaluate(f"--run={flipped[0]}", *flags)


def test_crops_are_for_networks_of_any_size(tiny_config):
    config = tiny_config(
        eval__tta="five_crop", model__name="cifar_resnet20", model__widths=None,
        data__image_shape=(16, 16, 3),
    )  # fmt: skip
    assert build.make_experiment(config, sharding.make_mesh()).tta == "five_crop"
