"""A calibration keeps its promises on data that it was not fitted to, and is used as it says."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from scipy.stats import betabinom, binom

from flaxcls.calibrate import FLAGS, main
from flaxcls.data import open_source
from flaxcls.errors import ConfigError
from flaxcls.inference import exporter
from flaxcls.inference.calibration import NAME, Calibration, Checkpoint, load
from flaxcls.inference.predictions import SplitPredictions, probabilities_of
from flaxcls.inference.predictor import Predictor
from flaxcls.insight.calibrate import (
    LEVELS,
    answer_threshold,
    calibrate_run,
    conformal_thresholds,
    fit,
)
from flaxcls.insight.scores import Judged

SOFTMAX = "softmax_cross_entropy"
HERE = Checkpoint(1, "eval", None, None)
RARELY = 1e-5  # how often a test fails that should not, for other seeds


@pytest.fixture(scope="module")
def calibrated(digits_run, tmp_path_factory):
    """A run with a calibration by the first half of the test split."""
    run = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(digits_run, run)
    return run, calibrate_run(run, split="test[:60%]", coverage=0.95, risk=0.1)


def overconfident(count, seed):
    """Predictions of labels that are drawn from them, but for a factor of 3 in the logits."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=1.5, size=(count, 5)).astype(np.float32)
    logits[:, 4] -= 2  # a rare class
    labels = (logits + random.gumbel(size=logits.shape)).argmax(axis=1).astype(np.int32)
    logits *= 3
    return SplitPredictions(logits, probabilities_of(logits, SOFTMAX), labels)


def coverage_of(calibration, predictions):
    """Whether the set of each example holds its label."""
    probabilities = probabilities_of(predictions.logits / calibration.temperature, SOFTMAX)
    sets = calibration.sets(probabilities, probabilities.argmax(axis=1))
    return sets[np.arange(len(sets)), predictions.labels]


@pytest.mark.parametrize("coverage", [0.8, 0.95])
@pytest.mark.parametrize("per_class", [False, True])
def test_sets_of_other_examples_are_covered_as_promised(coverage, per_class):
    """Given n examples to fit to, the covered ones among others follow a beta-binomial."""
    fitted, others = overconfident(4000, 0), overconfident(4000, 1)
    calibration, measured, sizes = fit(
        fitted, SOFTMAX, HERE, coverage=coverage, per_class=per_class, risk=None
    )
    assert sizes == (1000, 2000, 1000) and calibration.temperature == pytest.approx(3, rel=0.1)
    right, counts = coverage_of(calibration, others), np.bincount(fitted.labels) // 2
    groups = [(others.labels == k, counts[k]) for k in range(5)] if per_class else [(..., 2000)]
    for examples, count in groups:
        number, n = np.size(right[examples]), int(count)
        rank = np.ceil((n + 1) * coverage)
        expected = betabinom(number, rank, n + 1 - rank)
        covered = right[examples].sum()
        assert covered >= expected.ppf(RARELY)
        if coverage == 0.95 and not per_class:  # where the best class alone is not enough
            assert covered <= expected.ppf(1 - RARELY)
    assert measured["coverage"] == pytest.approx(right.mean(), abs=0.05)
    assert measured["calibrated"]["ece"] < 0.05 < measured["as_it_is"]["ece"]


@pytest.mark.parametrize("count", [9, 19, 100, 101])
@pytest.mark.parametrize("coverage", [0.9, 0.75])
def test_finite_sample_has_at_least_the_coverage_on_average(count, coverage):
    """The probability of the label is uniform here: a threshold t covers 1 - t exactly."""
    random = np.random.default_rng(count)
    covered = [
        1 - conformal_thresholds(with_labels_probability(own), coverage, False)[0]
        for own in random.uniform(size=(3000, count))
    ]
    error = 4.5 * np.std(covered) / np.sqrt(3000)
    assert coverage - error <= np.mean(covered) <= coverage + 1 / (count + 1) + error


def with_labels_probability(own):
    zeros = np.zeros(len(own), np.int64)
    return Judged(2, zeros, zeros, zeros, own, own, own, own)


def test_class_with_too_few_examples_is_in_every_set():
    own = np.array([0.5] * 8 + [0.6] * 9)
    labels = np.repeat([0, 1], [8, 9])
    judged = Judged(3, labels, labels, labels, own, own, own, own)
    assert conformal_thresholds(judged, 0.9, True).tolist() == [0, 0.6, 0]
    assert conformal_thresholds(judged, 0.9, False).tolist() == [0.5] * 3


def test_risk_is_kept_as_often_as_was_promised():
    """Answers of confidence c are wrong with 0.405 (1 - c): from 0.5 on hardly more than 0.1."""
    random, risk, given, broken = np.random.default_rng(0), 0.1, 0, 0
    for _ in range(400):
        confidence = random.uniform(size=3000)
        rank = (random.uniform(size=3000) < 0.405 * (1 - confidence)).astype(np.int64)
        level, _ = answer_threshold(
            with_labels_probability(confidence)._replace(rank=rank), risk, 0.95
        )
        given += level is not None
        broken += level is not None and 0.405 * (1 - level) / 2 > risk
    assert given > 390 and broken <= binom(400, 0.05).ppf(1 - RARELY)


def test_network_that_is_never_wrong_may_always_answer():
    judged = with_labels_probability(np.linspace(0.1, 1, 200))
    assert answer_threshold(judged, 0.05, 0.95)[0] == LEVELS[0] == 0
    wrong = judged._replace(rank=np.ones(200, np.int64))
    assert answer_threshold(wrong, 0.05, 0.95) == (None, 1.0)


def test_risk_that_cannot_be_promised_is_refused_or_not_promised():
    few = overconfident(100, 2)
    with pytest.raises(ConfigError, match="--risk=0.01 can't be promised: by these 50 examples"):
        fit(few, SOFTMAX, HERE, coverage=0.9, per_class=False, risk=0.01)
    calibration, measured, _ = fit(few, SOFTMAX, HERE, coverage=0.9, per_class=False, risk=None)
    assert (calibration.risk, calibration.answer_from, measured["answered"]) == (None, 0, 1)


def test_squared_error_has_no_temperature_but_sets():
    predictions = overconfident(4000, 3)
    predictions = predictions._replace(logits=predictions.probabilities)
    calibration, measured, _ = fit(
        predictions, "squared_error", HERE, coverage=0.9, per_class=False, risk=None
    )
    assert calibration.temperature == 1 and 0.87 < measured["coverage"] < 0.95


def digits(split):
    source = open_source("digits", split)
    return np.stack([source[i].image for i in range(len(source))]), source.labels()


def test_predictor_gives_calibrated_probabilities_sets_and_answers(calibrated):
    run, found = calibrated
    predictor, plain = Predictor(run), Predictor(run, calibrated=False)
    calibration = predictor.calibration
    assert calibration == found.calibration and plain.calibration is None
    images, labels = digits("test[60%:]")
    said, raw = predictor(images), plain(images)
    np.testing.assert_array_equal(said.logits, raw.logits)
    expected = probabilities_of(raw.logits / calibration.temperature, SOFTMAX)
    np.testing.assert_allclose(said.probabilities, expected, atol=1e-6)
    answers = predictor.answers(said)
    covered = sum(str(label) in a.classes for label, a in zip(labels, answers, strict=True))
    n = found.examples[1]
    rank = np.ceil((n + 1) * 0.95)
    assert covered >= betabinom(len(labels), rank, n + 1 - rank).ppf(RARELY)
    wrong = [
        a.classes[0] != str(label)
        for label, a in zip(labels, answers, strict=True)
        if not a.none_of_these
    ]
    assert np.sum(wrong) <= binom(len(wrong), 0.1).ppf(1 - RARELY)
    noise = np.full((8, 8), 77, np.uint8)
    prediction = predictor.predict(noise)
    assert prediction.classes[0] == prediction.name == plain.predict(noise).name
    assert prediction.none_of_these == (prediction.probability < calibration.answer_from)
    assert plain.predict(noise).classes == ()


def test_command_says_what_it_has_measured_and_predict_shows_it(calibrated, tmp_path, capsys):
    from PIL import Image

    from flaxcls import predict

    run = tmp_path / "run"
    shutil.copytree(calibrated[0], run)
    for name in FLAGS:
        FLAGS[name].unparse()
    main(["calibrate", f"--run={run}", "--per_class", "--coverage=0.8"])
    out = capsys.readouterr().out
    assert "by digits 'test': 90 examples for the temperature, 180 for the thresholds" in out
    assert "promised 0.8 of each class" in out and out.endswith("predict and export use it\n")
    content = json.loads((run / NAME).read_text())
    assert len(content["thresholds"]) == 10 and content["measured"]["examples"] == 90
    content |= {"answer_from": 0.9, "thresholds": 0.01}
    (run / NAME).write_text(json.dumps(content))
    Image.fromarray(digits("test")[0][0, ..., 0]).save(tmp_path / "digit.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "nothing.png")

    def table(*arguments):
        for name in predict.FLAGS:
            predict.FLAGS[name].unparse()
        pictures = (str(tmp_path / name) for name in ("digit.png", "nothing.png"))
        predict.main(["predict", f"--run={run}", *pictures, *arguments])
        return capsys.readouterr().out

    digit, nothing = map(json.loads, table("--format=jsonl").splitlines())
    assert digit["answer"] == digit["predictions"][0]["class"] == digit["set"][0]
    assert nothing["answer"] is None and len(nothing["set"]) > 1
    shares = {row["class"]: row["probability"] for row in nothing["predictions"]}
    assert {name for name, share in shares.items() if share >= 0.01} == {*nothing["set"]} & {
        *shares
    }
    rows = list(csv.DictReader(io.StringIO(table("--format=csv", "--topk=1"))))
    assert [row["answer"] for row in rows] == [digit["answer"], ""]
    assert [json.loads(row["set"]) for row in rows] == [digit["set"], nothing["set"]]
    lines = [line.split("\t")[1:] for line in table("--topk=2").splitlines()]
    assert lines[0][0] == digit["answer"] and lines[0][2] == "in the set"
    assert lines[2] == ["none of these", "", ""]
    assert "set" not in table("--format=csv", "--nocalibrated")


def test_calibration_of_another_checkpoint_is_not_used_and_that_is_said(
    calibrated, tmp_path, capsys
):
    run = tmp_path / "run"
    run.mkdir()
    content = json.loads((calibrated[0] / NAME).read_text())
    (run / NAME).write_text(json.dumps(content))
    same = Checkpoint(*(content[name] for name in Checkpoint._fields))
    assert isinstance(load(run, same, 10), Calibration) and capsys.readouterr().err == ""
    for other, words in (
        (same._replace(step=7), f"belongs to step {same.step}, parameters, and is not used for"),
        (same._replace(weights="ema"), "for step 90, averaged parameters: probabilities are as"),
        (same._replace(tta="flip"), "for step 90, parameters, views of flip: probabilities are as"),
        (same._replace(digest="x"), "for step 90, parameters, which was saved anew: prob"),
    ):
        assert load(run, other, 10) is None
        said = capsys.readouterr().err
        assert words.replace("90", str(same.step)) in said and said.count("\n") == 1
    assert load(tmp_path, same, 10) is None and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "change",
    [{"temperature": 0}, {"temperature": "x"}, {"thresholds": ["a"]}, {"step": None}, {"risk": ""}],
)
def test_damaged_calibration_is_no_calibration(calibrated, tmp_path, change):
    content = json.loads((calibrated[0] / NAME).read_text()) | change
    (tmp_path / NAME).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="is no calibration: delete it, or make it anew"):
        load(tmp_path, HERE, 10)
    (tmp_path / NAME).write_text("{")
    with pytest.raises(ConfigError, match="is not readable as JSON"):
        load(tmp_path, HERE, 10)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"split": "train"}, "1,437 of the 1,437 examples of 'train' are what the network"),
        ({"split": "test[:70]"}, "has 70 examples: a calibration needs 80 at least"),
        ({"coverage": 1.0}, "--coverage must be between 0 and 1, got 1"),
        ({"risk": 0.0}, "--risk must be between 0 and 1, got 0"),
    ],
)
def test_what_can_not_be_calibrated_is_refused(digits_run, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        calibrate_run(digits_run, **options)
    assert not (digits_run / NAME).exists()


@pytest.mark.slow
def test_export_has_the_temperature_inside_and_is_certified(calibrated, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    run, found = calibrated
    certificate = exporter.export_run(run, format="onnx", out=tmp_path / "out", pictures=32)
    assert certificate["evaluate"]["top1_identical"] == 32
    session = runtime.InferenceSession(tmp_path / "out/model.onnx")
    stored = json.loads(session.get_modelmeta().custom_metadata_map["calibration"])
    assert stored == json.loads(json.dumps(found.calibration.as_json()))
    images = digits("test[:40]")[0]
    logits, probabilities = session.run(["logits", "probabilities"], {"image": images})
    expected = probabilities_of(logits / stored["temperature"], SOFTMAX)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert np.abs(probabilities - probabilities_of(logits, SOFTMAX)).max() > 1e-3
