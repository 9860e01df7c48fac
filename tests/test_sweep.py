"""Sweeps: every trial is tried, whatever becomes of the others, and the table tells them all."""

import csv
import json
import os
import signal
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flaxcls import sweep as command
from flaxcls.config.recipes import load_recipe
from flaxcls.errors import ConfigError, Interrupted
from flaxcls.runtime import gpus
from flaxcls.studies import space, sweep
from flaxcls.studies.space import Choice, Span
from flaxcls.studies.trials import Outcome, Process, Runs, Trial
from flaxcls.training.train import train_config

RATE = "optimizer.learning_rate"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("x=0.1,0.3", ("0.1", "0.3")),
        ("config.x= a , b ", ("a", "b")),
        ("x=(64,128),(32,),[1,(2,3)]", ("(64,128)", "(32,)", "[1,(2,3)]")),
        ("x='a,b',\"c]\",d=e", ("'a,b'", '"c]"', "d=e")),
        ("x=({'name': 'flip'},),None", ("({'name': 'flip'},)", "None")),
    ],
)
def test_commas_separate_values_but_within_brackets_or_quotes(text, values):
    assert space.parse_choice(text) == Choice("x", values)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("x", "must be FIELD=VALUE,VALUE"),
        ("x=", "must be FIELD=VALUE,VALUE"),
        ("=1,2", "must be FIELD=VALUE,VALUE"),
        ("x=1,,2", "must be FIELD=VALUE,VALUE"),
        ("x=1,2,1", "has a value twice"),
    ],
)
def test_wrong_grid_is_one_sentence(text, sentence):
    with pytest.raises(ConfigError, match=f"--grid={text} {sentence}"):
        space.parse_choice(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x=1e-3..1e-1:log", Span("x", 0.001, 0.1, is_int=False, is_log=True)),
        ("x=0.5..2", Span("x", 0.5, 2, is_int=False, is_log=False)),
        ("x=-1.5..-.5", Span("x", -1.5, -0.5, is_int=False, is_log=False)),
        ("x=32..256:log", Span("x", 32, 256, is_int=True, is_log=True)),
        ("x=a,b", Choice("x", ("a", "b"))),
    ],
)
def test_search_is_a_span_or_a_choice(text, expected):
    assert space.parse_search(text) == expected


@pytest.mark.parametrize(
    "text", ["x=1..", "x=..1", "x=a..b", "x=1..2:lin", "x=2..1", "x=1..1", "x=0..1:log", "x=1..inf"]
)
def test_wrong_search_is_one_sentence(text):
    with pytest.raises(ConfigError, match=f"--search={text}"):
        space.parse_search(text)


def test_grid_is_the_product_and_corners_have_all_values():
    choices = [Choice("a", ("1", "2")), Choice("b", ("x", "y", "z"))]
    assert [(v["a"], v["b"]) for v in space.grid(choices)] == [(a, b) for a in "12" for b in "xyz"]
    corners = list(space.corners([*choices, Span("c", 1, 4, is_int=True, is_log=False)]))
    assert {v["b"] for v in corners} == {*"xyz"} and {v["c"] for v in corners} == {"1", "4"}
    with pytest.raises(ConfigError, match="config.a is named twice"):
        space.check_fields([choices[0], choices[0]])


def test_trials_are_named_by_their_values():
    assert space.trial_name({RATE: "0.1", "model.name": "a"}) == "learning_rate=0.1,name=a"
    same_end = {"model.name": "a", "loss.name": "b"}
    assert space.trial_name(same_end) == "model.name=a,loss.name=b"


@settings(max_examples=30)
@given(st.lists(st.text(min_size=1), min_size=2, max_size=4, unique=True))
def test_names_of_trials_are_names_of_files_and_differ(texts):
    names = [space.trial_name({"model.name": text}) for text in texts]
    assert len({*names}) == len(names)
    assert all("/" not in name and "\0" not in name and len(name) < 120 for name in names)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"optimizer.learning_rat": "0.1"}, "config.optimizer.learning_rat is not used by adamw"),
        ({"optimiser.learning_rate": "0.1"}, "config.optimiser.learning_rate is not a config fie"),
        ({RATE: "fast"}, "config.optimizer.learning_rate must be float, got 'fast'"),
        ({"model.name": "digits_cmn"}, "config.model.name is 'digits_cmn', which is not known"),
        ({"model.name": "dense", "model.widths": "3"}, "config.model.widths must be"),
        ({"loss.label_smoothing": "2.0"}, "config.loss.label_smoothing must be float at least 0"),
    ],
)
def test_wrong_value_is_found_before_anything_is_trained(values, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        space.check_values("digits_cnn", (), values)
    grid = [f"{field}={value}" for field, value in values.items()]
    with pytest.raises(ConfigError, match=sentence):
        sweep.sweep_grid("digits_cnn", grid, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    space.check_values("digits_cnn", (), {RATE: "0.1", "model.name": "dense"})


# A trial as far as a sweep sees it, without training: it writes its evaluations, and ends.
STUB = """
import json, os, pathlib, signal, sys, time
folder, rate = pathlib.Path(sys.argv[1]), float(sys.argv[2])
folder.mkdir(exist_ok=True)
(folder.parent / "order.txt").open("a").write(f"begin {rate}\\n")
if rate < 0:
    print("flaxcls: it has diverged")
    sys.exit(43)
if rate == 13:
    os.kill(os.getpid(), signal.SIGKILL)
def save(*_):
    (folder / "saved").write_text("")
    sys.exit(42)
signal.signal(signal.SIGTERM, save)
for number in range(3):
    row = {"accuracy": rate * (number + 1) / 4, "loss": 1 - rate, "count": 8}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": number + 1, "eval": row}) + "\\n")
    if rate == 0.99:
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(float(sys.argv[3]))
(folder.parent / "order.txt").open("a").write(f"end {rate}\\n")
"""


@pytest.fixture
def stub(monkeypatch):
    """Trials are STUBs that take three times so many seconds."""
    seconds = [0.0]

    class Stubs(Runs):
        def start(self, trial, environment):
            folder, rate = self.workdir / trial.name, trial.values[RATE]
            program = [sys.executable, "-S", "-c", STUB, str(folder), rate, str(seconds[0])]
            return Process(trial, folder, program, environment)

    monkeypatch.setattr(sweep, "Runs", Stubs)
    monkeypatch.setattr("flaxcls.studies.optuna_search.Runs", Stubs)
    return seconds


def test_failed_trials_end_no_sweep_and_the_table_is_sorted(stub, tmp_path, capfd):
    results = sweep.sweep_grid("digits_cnn", [f"{RATE}=0.2,-1,0.8,13,0.4"], tmp_path)
    rows = results["trials"]
    assert [row["values"][RATE] for row in rows] == ["0.8", "0.4", "0.2", "-1", "13"]
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["failed"] * 2
    assert rows[0]["step"] == 3 and rows[0]["results"]["accuracy"] == pytest.approx(0.6)
    assert (rows[3]["exit_code"], rows[3]["sentence"]) == (43, "it has diverged")
    assert rows[4]["sentence"] == "its process ended with signal 9"
    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(json.dumps(results))
    with (tmp_path / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row[RATE] for row in table] == ["0.8", "0.4", "0.2", "-1", "13"]
    assert [row["why"] for row in table[3:]] == [row["sentence"] for row in rows[3:]]
    sweep.show(results)
    out, err = capfd.readouterr()
    table = out[out.index(f" {RATE}") :]
    assert "failed: it has diverged" in table
    assert table.index("60.00 %") < table.index("15.00 %")
    assert "note: trials are compared by their results on 'test', which is no test then" in err


def test_a_trial_that_has_diverged_is_not_tried_again_but_others_are(stub, tmp_path):
    grid = [f"{RATE}=-1,13"]
    sweep.sweep_grid("digits_cnn", grid, tmp_path)
    results = sweep.sweep_grid("digits_cnn", grid, tmp_path)
    assert {row["exit_code"] for row in results["trials"]} == {43, -9}
    begun = (tmp_path / "order.txt").read_text().splitlines()
    assert begun == ["begin -1.0", "begin 13.0", "begin 13.0"]


def test_as_many_trials_as_jobs_run_at_a_time(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "visible_gpus", lambda: [])
    stub[0] = 0.15
    sweep.sweep_grid("digits_cnn", [f"{RATE}=0.1,0.2,0.3,0.4"], tmp_path, jobs=2)
    lines = (tmp_path / "order.txt").read_text().split()[::2]
    running = [lines[:n].count("begin") - lines[:n].count("end") for n in range(len(lines) + 1)]
    assert max(running) == 2 and running[-1] == 0 and lines.count("end") == 4


def test_signal_ends_all_trials_which_save_themselves(stub, tmp_path, monkeypatch):
    monkeypatch.setattr(gpus, "visible_gpus", lambda: [])
    stub[0] = 20
    with pytest.raises(Interrupted, match=r"the same command with --workdir=.* resumes") as raised:
        sweep.sweep_grid("digits_cnn", [f"{RATE}=0.5,0.99,0.1"], tmp_path, jobs=2)
    assert raised.value.exit_code == 42
    assert {path.parent.name for path in tmp_path.glob("*/saved")} <= {
        "learning_rate=0.5",
        "learning_rate=0.99",
    }
    assert "begin 0.1" not in (tmp_path / "order.txt").read_text()


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((0, 43), 43), ((43, 45), 1), ((43, 42), 42), ((-9,), 1)]
)
def test_exit_code_tells_of_failures(codes, expected):
    trials = [{"status": "failed" if code else "finished", "exit_code": code} for code in codes]
    assert sweep.exit_code({"trials": trials}) == expected


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2, 5,7,GPU-8")
    shares = [share["CUDA_VISIBLE_DEVICES"] for share in gpus.share_gpus(2)]
    assert shares == ["0,2", "5,7,GPU-8"]
    assert gpus.share_gpus(1) == [{}]
    with pytest.raises(ConfigError, match="--jobs=6 is more than the GPUs, of which there are 5"):
        gpus.share_gpus(6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpus.share_gpus(2) == [{}, {}]


def test_finished_trials_are_found_and_those_of_another_config_refused(recipe, tmp_path):
    runs = Runs(str(recipe), ["duration=3 steps"], tmp_path)
    trial = Trial("rate", {RATE: "0.05"})
    assert runs.earlier(trial, Outcome("finished")) is None
    config = load_recipe(str(recipe), ["duration=3 steps", f"{RATE}=0.05"]).config
    summary = train_config(config, tmp_path / "rate")
    found = runs.earlier(trial, None)
    assert (found.status, found.step) == ("finished", 3) and found.results == summary["eval"]
    longer = runs._replace(overrides=["duration=6 steps"])
    assert longer.earlier(trial, found) is None
    other = runs._replace(overrides=["batch_size=8"])
    with pytest.raises(ConfigError, match=r"rate: the run in .* has config.batch_size = 16, got 8"):
        other.earlier(trial, found)


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not empty and holds no sweep"):
        sweep.claim(tmp_path)
    (tmp_path / "sweep.json").write_text('{"trials": [{"name": "a"}]}')
    with pytest.raises(ConfigError, match=r"sweep.json is no table of a sweep"):
        sweep.claim(tmp_path)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--config=digits_cnn", "--grid FIELD=VALUE,VALUE is missing"),
        ("--config=digits_cnn --optuna=3", "--optuna=COUNT and --search FIELD=LOW..HIGH go tog"),
        ("--config=digits_cnn --optuna=3 --search a=1..2 --grid b=1", "go together, without"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, sentence):
    command.FLAGS.unparse_flags()
    for name in ("optuna", "grid", "search"):
        command.FLAGS[name].unparse()
    with pytest.raises(ConfigError, match=sentence):
        command.main(["sweep", *flags.split()])


def optuna_sweep(*arguments, **options):
    pytest.importorskip("optuna", reason="Optuna is an extra")
    from flaxcls.studies.optuna_search import sweep_optuna

    return sweep_optuna("digits_cnn", *arguments, **options)


SEARCH = [f"{RATE}=0.01..0.9"]


def test_optuna_proposes_as_many_trials_as_asked_for_in_all_sessions(stub, tmp_path):
    first = optuna_sweep(SEARCH, tmp_path, 2)
    results = optuna_sweep(SEARCH, tmp_path, 4)
    rates = {row["name"]: float(row["values"][RATE]) for row in results["trials"]}
    assert sorted(rates) == [f"trial_{number:03}" for number in range(4)]
    assert len({*rates.values()}) == 4 and all(0.01 <= rate <= 0.9 for rate in rates.values())
    kept = {row["name"]: row for row in results["trials"]}
    assert all(kept[row["name"]] == row for row in first["trials"])
    assert [*rates.values()] == sorted(rates.values(), reverse=True)
    with pytest.raises(ConfigError, match="is of another --search, of optimizer.learning_rate"):
        optuna_sweep(["batch_size=32,64"], tmp_path, 4)


def test_optuna_resumes_what_was_interrupted_and_prunes_what_others_are_better_than(
    stub, tmp_path, monkeypatch
):
    optuna = pytest.importorskip("optuna", reason="Optuna is an extra")
    monkeypatch.setattr(gpus, "visible_gpus", lambda: [])
    rates = [0.6, 0.7, 0.65, 0.8, 0.75, 0.99, 0.05]
    with monkeypatch.context() as patch:
        patch.setattr(
            optuna.trial.Trial, "suggest_float", lambda self, *_, **__: rates[self.number]
        )
        stub[0] = 0.05
        with pytest.raises(Interrupted):  # 0.99 sends the signal
            optuna_sweep(SEARCH, tmp_path, 7)
        rates[5] = 0.9
        stub[0] = 0.5
        results = optuna_sweep(SEARCH, tmp_path, 7)
    ended = {row["name"]: row["status"] for row in results["trials"]}
    assert ended.pop("trial_006") == "pruned"
    assert {*ended} == {f"trial_{number:03}" for number in range(6)}
    assert {*ended.values()} == {"finished"}
    assert results["trials"][-1]["step"] < 3


@pytest.mark.slow
def test_sweep_that_is_killed_takes_its_trials_along_and_resumes(recipe, tmp_path, start_python):
    folder = tmp_path / "sweep"
    flags = ("-m", "flaxcls.sweep", f"--config={recipe}", f"--workdir={folder}", "--grid")
    long = (*flags, f"{RATE}=0.1", "--config.duration=1000000 steps")
    process = start_python(*long)
    run, log = folder / "learning_rate=0.1", folder / "learning_rate=0.1.log"
    end = time.monotonic() + 120
    while not (run / "checkpoints" / "4").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    while "stopped after step" not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.05)
    stopped = int(log.read_text().rpartition("stopped after step ")[2].split()[0])
    again = start_python(*flags, f"{RATE}=0.1,0.2,-1.0", f"--config.duration={stopped + 3} steps")
    out, err = again.communicate()
    assert again.returncode == 2, err  # of the learning rate below 0
    assert f"resumed from step {stopped}" in log.read_text()
    results = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [row["status"] for row in results] == ["finished", "finished", "failed"], out
    assert {row["step"] for row in results[:2]} == {stopped + 3}
    page = (folder / "report.html").read_text()
    assert 'href="learning_rate%3D0.1/report.html"' in page and f"Report: {folder}" in out
