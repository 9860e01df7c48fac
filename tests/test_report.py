"""The page of a run: right, self-contained and safe, of any run and also of what is left of one."""

import base64
import dataclasses
import hashlib
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

import flaxcls
from flaxcls.errors import ConfigError, OutputError
from flaxcls.inference.predictions import SplitPredictions
from flaxcls.insight.scores import judge
from flaxcls.report import __main__ as command
from flaxcls.report import page, run_data
from flaxcls.report.answers import Answers, Example
from flaxcls.report.blocks import Matrix, Table
from flaxcls.report.comparison_sections import config_differences, names_of
from flaxcls.report.figures import span
from flaxcls.report.pictures import data_uri
from flaxcls.report.robustness_sections import robustness
from flaxcls.report.run_data import RunData, load_run
from flaxcls.report.run_files import read_run, training_examples
from flaxcls.runs import robustness_log
from flaxcls.runs.metric_log import MetricLog

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}'
VOID = {"meta", "img"}


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text; tags have to be balanced."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def made_up(num_classes=3, names=None, count=60):
    """What a network might say of a split; each class is taken for the next one now and then."""
    random = np.random.default_rng(0)
    labels = np.arange(count, dtype=np.int32) % num_classes
    logits = random.normal(size=(count, num_classes)).astype(np.float32)
    logits[np.arange(count), labels] += 2
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    judged = judge(SplitPredictions(logits, shares, labels), "softmax_cross_entropy")
    picture = data_uri(random.integers(0, 255, (224, 300, 3), dtype=np.uint8))
    mistakes = [
        Example(f"{HOSTILE}.png", picture, int(judged.labels[i]), int(judged.best[i]), 0.9, 0.05)
        for i in np.flatnonzero(judged.rank)[:24]
    ]
    names = names or [f"class {number}" for number in range(num_classes)]
    return Answers(
        5, "ema", "data", "test", names, judged, 1234, mistakes, mistakes[:2], "a method"
    )


def sections_of(run):
    return [section for make in page.OF_A_RUN if (section := make(run))]


def page_of(run):
    return page.render("title", "lead", sections_of(run))


@pytest.fixture(scope="module")
def run(digits_run):
    return load_run(digits_run)


@pytest.fixture
def copied(digits_run, tmp_path):
    """A copy of the run without its checkpoints, to be changed."""
    ignored = shutil.ignore_patterns("checkpoints")
    return Path(shutil.copytree(digits_run, tmp_path / "run", ignore=ignored))


def test_page_has_the_results_of_the_run_and_of_every_example(run, digits_run, tmp_path):
    summary = json.loads((digits_run / "summary.json").read_text())
    out = flaxcls.write_report([digits_run], tmp_path / "page.html")
    assert out == tmp_path / "page.html" and out.stat().st_size < 300_000
    shown = Page(out.read_text())
    accuracy = summary["eval"]["accuracy"]
    assert f"digits_cnn on digits, 4 epochs: {100 * accuracy:.2f} % of the 360 images" in shown.text
    for words in ("1,437 images", "Learning rate", "Config", "optimizer.name", '"adamw"'):
        assert words in shown.text
    matrices = [b for each in sections_of(run) for b in each.blocks if isinstance(b, Matrix)]
    counts = np.array(matrices[0].counts)
    assert counts.sum() == 360
    assert np.trace(counts) / 360 == pytest.approx(accuracy)
    wrong = 360 - np.trace(counts)
    assert len(shown.all("img")) == min(wrong, 24) + 8 and "by Grad-CAM" in shown.text
    assert run.answers.mistakes[0].confidence == max(m.confidence for m in run.answers.mistakes)


def test_classes_are_in_order_of_recall_and_sum_to_the_split(run):
    (section,) = (each for each in sections_of(run) if each.title == "Classes")
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    recalls = [row[2].value for row in table.rows]
    assert recalls == sorted(recalls) and sum(row[1].value for row in table.rows) == 360
    right = sum(row[1].value * row[2].value for row in table.rows)
    assert right / 360 == pytest.approx(run.files.summary["eval"]["accuracy"])


def test_page_needs_nothing_besides_itself(run):
    shown = Page(page_of(run))
    for tag, attributes in shown.elements:
        assert tag not in ("link", "iframe", "object", "base", "form")
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    ids = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert len(ids) == len({*ids})
    assert {a["href"][1:] for a in shown.all("a")} <= {*ids}


def test_browser_is_told_to_run_the_one_script_and_fetch_nothing(run):
    text = page_of(run)
    (policy,) = (m["content"] for m in Page(text).all("meta") if "http-equiv" in m)
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}'" in policy


def test_names_that_are_html_are_shown_as_they_are(run):
    names = [HOSTILE, "a\u202eb\x1b[31m", "</title><base href=//x>"]
    files = dataclasses.replace(
        run.files,
        path=Path("/runs") / HOSTILE.replace("/", ""),
        config={**run.files.config, "init_from": HOSTILE, "duration": HOSTILE},
        record={**run.files.record, "device": {"kind": HOSTILE}, "versions": {HOSTILE: HOSTILE}},
        problems=[HOSTILE],
    )
    answers = made_up(names=names)
    sections = sections_of(RunData(files, answers, HOSTILE))
    shown = Page(page.render(HOSTILE, HOSTILE, sections))
    assert len(shown.all("script")) == 1 and not shown.all("base")
    assert all(image["src"].startswith("data:") for image in shown.all("img"))
    assert not any(name.startswith("on") for _, each in shown.elements for name in each)
    assert shown.text.count("<img src=x onerror=alert(1)>{{ 7*7 }}") > 10
    assert "\u202e" not in shown.text and "\x1b" not in shown.text and "a\\u202eb" in shown.text


def test_thousand_classes_are_readable_and_small(run):
    answers = made_up(1000, count=5000)
    text = page_of(RunData(run.files, answers))
    assert len(text) < 2_000_000
    shown = Page(text)
    assert "Mistakes among 1,000 classes in their order" in shown.text
    assert "a dot is 4 × 4 classes" in shown.text and "class 999" in shown.text
    assert len(shown.all("td")) < 10_000  # no grid of a million cells


def test_what_is_left_of_a_run_is_shown_and_what_is_missing_said(copied):
    for name in ("summary.json", "goodput.json"):
        (copied / name).write_text('{"seconds": [')
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "epoch": NaN, "train": 3, "eval": {"accuracy": "x"}}\n{"ste')
    text = Page(flaxcls.write_report([copied]).read_text()).text
    assert "This run has not finished; it has come to step 99" in text
    assert "1 line of " in text and "summary.json is not readable as JSON" in text
    assert "Predictions are left out: " in text and "Learning curves" in text
    (copied / "config.json").write_text("[]")
    text = Page(flaxcls.write_report([copied]).read_text()).text
    assert "config.json holds list instead of an object" in text and "Learning curves" in text


def test_folder_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="--run=DIR is missing"):
        command.main(["report"])
    with pytest.raises(ConfigError, match="there is no run in .*: it holds no config.json"):
        command.main(["report", f"--run={tmp_path}"])
    with pytest.raises(ConfigError, match="is in a folder that does not exist"):
        command.main(["report", f"--run={tmp_path}", f"--out={tmp_path}/none/page.html"])


def test_page_that_cannot_be_written_is_an_error(copied, tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputError, match="page.html can't be written: Is a directory"):
        flaxcls.write_report([copied], tmp_path / "page.html")


def test_slow_predictions_are_left_out_at_the_end_of_a_run(copied, monkeypatch):
    goodput = json.loads((copied / "goodput.json").read_text())
    goodput["seconds"]["evaluate"] = 100.0  # of one evaluation
    (copied / "goodput.json").write_text(json.dumps(goodput))
    monkeypatch.setattr(run_data, "answers_of", lambda *_, **__: pytest.fail("they were made"))
    assert page.report_at_the_end(copied) == f"Report: {copied / 'report.html'}"
    text = Page((copied / "report.html").read_text()).text
    assert "left out, a pass takes about 100 s" in text
    assert f"python -m flaxcls.report --run={copied}" in text
    none = load_run(copied, max_seconds=0).left_out  # of several processes, whatever it takes
    assert none.startswith("Predictions of the evaluation split are left out")


def test_report_that_fails_is_a_sentence_at_the_end_of_a_run(copied, tmp_path, monkeypatch):
    said = page.report_at_the_end(tmp_path / "none")
    assert said.startswith("There is no report: there is no run in")
    monkeypatch.setattr(page, "render", lambda *_: 1 / 0)
    said = page.report_at_the_end(copied)
    assert said == "There is no report: division by zero"


def test_several_runs_are_compared(digits_run, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    config["config"]["optimizer"]["learning_rate"] = 0.125
    config["versions"]["jax"] = "0.0.1"
    (copied / "config.json").write_text(json.dumps(config))
    runs = [read_run(digits_run), read_run(copied)]
    assert names_of(runs) == ["run (1)", "run (2)"]
    (table,) = config_differences(runs).blocks
    assert table.rows == [("optimizer.learning_rate", "0.003", "0.125")]
    out = flaxcls.write_report([digits_run, copied], tmp_path / "both.html")
    shown = Page(out.read_text())
    assert "0.0.1" in shown.text and "Accuracy in evaluation" in shown.text
    styles = [each["class"] for each in shown.all("circle")]
    assert {"dot c0", "dot c1"} <= {*styles}


def test_names_of_compared_runs_lead_to_their_pages(copied, tmp_path):
    odd = copied.rename(tmp_path / "rate=0.1 & <b>50%")
    (odd / "report.html").write_text("")
    plain = Path(shutil.copytree(odd, tmp_path / "plain"))
    (plain / "report.html").unlink()
    out = flaxcls.write_report([odd, plain], tmp_path / "pages.html")
    links = [each["href"] for each in Page(out.read_text()).all("a") if each["href"][0] != "#"]
    assert [(tmp_path / unquote(link)).exists() for link in links] == [True]
    assert "<b>50%" not in out.read_text()


def test_speed_is_that_of_steps_that_count_and_restarts_are_seen(tmp_path):
    row = {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1}
    for start, rates in ((0, (10, 20, 30)), (4, (50, 60))):
        with MetricLog(tmp_path, start, 10, batch_size=1) as log:
            for place, rate in enumerate(rates, start=1):
                log.training(start + 2 * place, 0.1, row, (float(rate), 0.25))
    files = read_run(tmp_path)
    assert [(each.step, each.images_per_second) for each in files.speed] == [
        (2, 10), (4, 20), (6, 50), (8, 60),
    ]  # fmt: skip
    assert files.starts == [0, 4] and files.speed[0].data_wait == 0.25


def test_training_examples_follow_from_the_epochs(run):
    assert training_examples(run.files) == 1437
    rounded = dataclasses.replace(run.files, rows=[{"step": 1, "epoch": 0.0445}])
    assert training_examples(rounded) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.4, "59 s"), (60, "1 min"), (200.2, "3 min 20 s"),
     (3599.9, "1 h"), (7260, "2 h 1 min"), (200000, "2 d 8 h")],
)  # fmt: skip
def test_spans_of_time(seconds, text):
    assert span(seconds) == text


@pytest.mark.slow
def test_run_ends_with_where_its_page_is(run_main, recipe, tmp_path):
    result = run_main(f"--config={recipe}", f"--workdir={tmp_path}/run", "--report")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"Report: {tmp_path}/run/report.html"
    text = Page((tmp_path / "run" / "report.html").read_text()).text
    assert "50 images of digits 'test[:50]' after step 12" in text


def test_attacks_and_corruptions_are_shown_once_there_are_some(copied):
    files = read_run(copied)
    assert robustness(RunData(files, None)) is None
    for eps, robust in ((0.2, 0.1), (0.1, 0.9), (0.1, 0.7)):
        accuracies = {"clean": 0.95, "pgd": robust}
        found = {"norm": "linf", "eps": eps, "robust": robust, "count": 100}
        robustness_log.keep(copied, {**found, "accuracies": accuracies})
    robustness_log.keep(copied, {"corruptions": {"fog": [0.9, 0.5], "snow": [0.4, 0.2], "x": None}})
    with (copied / "robustness.jsonl").open("a") as file:
        file.write('[]\n{"norm": []}\n{"eps')
    section = robustness(RunData(files, None))
    attacks, corrupted = (block for block in section.blocks if isinstance(block, Table))
    assert [(row[1].value, row[5].value) for row in attacks.rows] == [(0.1, 0.7), (0.2, 0.1)]
    assert [(row[0], row[3].text) for row in corrupted.rows] == [
        ("snow", "30.0 %"),
        ("fog", "70.0 %"),
    ]
    shown = Page(page.render("title", "lead", [section]))
    assert shown.all("svg")[0]["aria-label"] == (
        "Under attack, linf by eps: linf from 95 % to 10 %"
    )
