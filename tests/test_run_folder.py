"""Files of a run's folder that are damaged: one sentence, and made anew where they can be."""

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from flaxcls import config as configs
from flaxcls.config import fields
from flaxcls.errors import ConfigError, FlaxclsError
from flaxcls.inference.evaluator import evaluate_run
from flaxcls.runs import broken_images, goodput, manifest, run_folder
from flaxcls.runs.metric_log import MetricLog, describe
from flaxcls.training.train import train_config as train

NESTED = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished run on digits, and its config."""
    config = configs.default()
    config.batch_size, config.duration = 32, "8 steps"
    config.data.train_split, config.data.eval_split = "train[:96]", "test[:50]"
    config.log_every, config.eval.every = "2 steps", "4 steps"
    config.checkpoint.every = "4 steps"
    workdir = tmp_path_factory.mktemp("whole") / "run"
    train(config, workdir)
    return config, workdir


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    return tmp_path / "run"


CONFIGS = ["[1]", "{}", '{"config": {"model": "dense"}}', '{"config": {"batch_size": "many"}}',
           '{"config": 3}', NESTED, "", "\x00", '{"config": {"a.b": 1}}', None]  # fmt: skip


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_config_is_restored_from_the_newest_checkpoint_that_is_whole(folder, text, capsys):
    path, before = folder / "config.json", run_folder.load_config(folder)
    path.unlink() if text is None else path.write_text(text)
    damaged = next((folder / "checkpoints/8").glob("facts/metadata"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert run_folder.load_config(folder) == before
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.endswith("it is restored from step 4") and str(folder) in sentence
    assert run_folder.load_config(folder) == before and not capsys.readouterr().err


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_damaged_config_without_a_checkpoint_is_told_in_a_sentence(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=str(tmp_path)) as error:
        run_folder.load_config(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_run_whose_derived_files_are_damaged_goes_on(whole, folder, capsys):
    config, _ = whole
    rows = (folder / "metrics.jsonl").read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    shutil.rmtree(folder / "checkpoints/8")
    (folder / "summary.json").write_text('{"step": 1}')
    (folder / "goodput.json").write_text('{"seconds": [1], "restarts": null}')
    lines = rows.splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([*lines[:3], b"\xff\xfe\n", *lines[3:]]))
    again = train(config, folder)
    assert again["eval"] == summary["eval"] and again["step"] == 8
    assert f"{folder}/metrics.jsonl, line 4 is damaged" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == rows
    assert train(config, folder) == again  # as summary.json has it


def test_summary_alone_is_made_anew(whole, folder, capsys):
    for text in ('{"finished": true}', "[1]"):
        (folder / "summary.json").write_text(text)
        assert train(whole[0], folder)["eval"]["count"] == 50
        assert "summary.json" in capsys.readouterr().err
        assert json.loads((folder / "summary.json").read_text())["step"] == 8


@pytest.mark.parametrize(
    ("prepare", "name", "sentence"),
    [
        (lambda path: path.write_text(""), "run", "Not a directory"),
        (lambda path: None, "x" * 300, "File name too long"),
        (lambda path: None, "run", "there is no run in"),
        (lambda path: (path / "config.json").mkdir(parents=True), "run", "Is a directory"),
    ],
)
def test_what_is_no_folder_of_a_run_is_told(whole, tmp_path, prepare, name, sentence):
    path = tmp_path / name
    prepare(path)
    with pytest.raises(ConfigError, match=sentence):
        evaluate_run(path)
    if sentence != "there is no run in":
        with pytest.raises(ConfigError, match=sentence):
            train(whole[0], path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folder_that_cannot_be_read_is_told(folder, whole):
    folder.chmod(0)
    try:
        with pytest.raises(ConfigError, match="Permission denied"):
            evaluate_run(folder)
        with pytest.raises(ConfigError, match="Permission denied"):
            train(whole[0], folder)
    finally:
        folder.chmod(0o700)


# Arbitrary content: it works, or it is an error of one sentence.

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
PLAIN = fields.plain(configs.default())
SUMMARY = {"finished": True, "step": 3, "seconds": 1.0, "goodput": "", "best": {},
           "eval": {"accuracy": 0.5, "loss": 1.0, "count": 2}}  # fmt: skip
CONTENTS = {
    "config.json": {"config": PLAIN},
    "summary.json": SUMMARY,
    "metrics.jsonl": {"step": 1, "epoch": 0.1, "train": {}},
    "goodput.json": {"seconds": {"step": 1.0}, "restarts": 1, "last_sign_of_life": 1.0},
    "manifest.json": {"files": {"a": {"size": 1, "sha256": "00"}}},
}


@st.composite
def changed(draw, content):
    """The content with something else at one place, or something else altogether."""
    content = json.loads(json.dumps(content))
    place = content
    while draw(st.booleans()) and isinstance(place, dict) and place:
        key = draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or draw(st.booleans()):
            if draw(st.booleans()):
                place[key] = draw(JSON)
            else:
                del place[key]
            break
        place = place[key]
    return json.dumps(content).encode()


def files(name):
    return st.binary(max_size=40) | JSON.map(json.dumps).map(str.encode) | changed(CONTENTS[name])


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("name", CONTENTS)
def test_any_content_is_read_or_told_in_a_sentence(name, tmp_path):
    @FUZZ
    @given(files(name))
    def check(content):
        (tmp_path / name).write_bytes(content)
        try:
            if name == "config.json":
                config = run_folder.load_config(tmp_path)
                for section, values in PLAIN.items():
                    assert isinstance(config[section], ConfigDict) == isinstance(values, dict)
            elif name == "summary.json":
                summary = run_folder.read_summary(tmp_path)
                if summary:  # as main tells it
                    assert describe(summary["eval"]) and f"{summary['step']:,}"
                    assert f"{summary['seconds']:.0f}" and summary["goodput"] is not None
            elif name == "metrics.jsonl":
                with MetricLog(tmp_path, 5, 10, 8):
                    pass
                for line in (tmp_path / name).read_bytes().splitlines():
                    assert json.loads(line)["step"] <= 5
            elif name == "goodput.json":
                clock = goodput.Goodput()
                clock.resume(tmp_path / name, {})
                assert clock.describe() and all(
                    0 <= spent < 1e12 for spent in clock.totals.values()
                )
            else:
                manifest.verify(tmp_path)
        except FlaxclsError as error:
            assert "\n" not in str(error) and len(str(error)) < 300 + len(str(tmp_path))

    (tmp_path / "a").write_text("b")
    check()


def test_log_of_broken_images_does_not_grow_for_ever_and_says_where_it_ends(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(broken_images, "MOST_BYTES", 100)
    for _ in range(3):  # restarts, each of which meets the same images
        report = broken_images.broken_images_log(tmp_path)
        for number in range(4):
            report(f"{number}.jpg is no picture: another image replaces it")
    path = tmp_path / "broken_images.log"
    *noted, last = path.read_text().splitlines()
    assert [line[:5] for line in noted] == ["0.jpg", "1.jpg", "2.jpg"]
    assert last == f"{path} has 0.0001 MB and is full: more is said on standard error only"
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 13 and said.count(f"flaxcls: {last}") == 1
