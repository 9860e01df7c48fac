"""Runs are logged to Weights & Biases and MLflow, which can't stop or slow them."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import struct
import sys
import time

import pytest

from flaxcls import build
from flaxcls.errors import ConfigError, DivergedError, Interrupted
from flaxcls.runs import metric_log, run_folder, trackers
from flaxcls.runs.metric_log import MetricLog
from flaxcls.runs.trackers import Trackers
from flaxcls.training.train import train_config as train

DEAD = "http://127.0.0.1:9"  # nobody listens: connections are refused


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A client of MLflow's files in a folder, where runs are logged to as well."""
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    return tracking.MlflowClient()


def only_run(store, experiment="flaxcls"):
    found = store.get_experiment_by_name(experiment)
    (run,) = store.search_runs([found.experiment_id]) if found else [None]
    return run


def history(store, name):
    """(step, value) of a metric, in the order in which they came."""
    return [(m.step, m.value) for m in store.get_metric_history(only_run(store).info.run_id, name)]


@pytest.fixture
def silent_server(monkeypatch):
    """Accepts every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def fake_client(tmp_path, monkeypatch):
    """Puts a module `wandb` with a text of our own before the real one."""

    def make(text):
        (tmp_path / "client").mkdir(exist_ok=True)
        (tmp_path / "client/wandb.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "client"))

    return make


def test_run_is_found_in_mlflow_and_resumed_there(tmp_path, tiny_config, store):
    workdir = tmp_path / "run"
    train(tiny_config(log_to=("mlflow",)), workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    run = only_run(store)
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    for group, name in (("train", "loss"), ("train", "learning_rate"), ("eval", "accuracy")):
        expected = [(row["step"], row[group][name]) for row in rows if group in row]
        assert history(store, f"{group}/{name}") == expected
    assert all(rate > 0 for _, rate in history(store, "time/images_per_second"))
    config = dict(run_folder.fields(run_folder.load_config(workdir)))
    assert run.data.params.keys() == config.keys()
    assert run.data.params["optimizer.momentum"] == "0.9"
    assert json.loads((workdir / "trackers.json").read_text()) == {
        "id": run.data.tags["flaxcls.id"]
    }

    train(tiny_config(log_to="mlflow", duration="18 steps"), workdir)
    run = only_run(store)
    assert run.info.status == "FINISHED" and run.data.params["duration"] == "12 steps"
    assert run.data.tags["config.duration"] == "18 steps"
    assert [step for step, _ in history(store, "train/loss")] == [3, 6, 9, 12, 15, 18]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (DivergedError("the loss is not finite"), "FAILED"),
        (Interrupted("stopped after step 3", 42), "KILLED"),
        (KeyboardInterrupt(), "FAILED"),
    ],
)
def test_service_learns_how_the_run_has_ended(tmp_path, store, error, status):
    raised = pytest.raises(type(error)) if error else contextlib.nullcontext()
    with raised, MetricLog(tmp_path, 0, 10, 8) as watch:
        watch.track(("mlflow",), {"seed": 0})
        watch.evaluation(3, 0.5, {"eval": {"accuracy": 0.5, "count": 2, "loss": float("nan")}})
        if error:
            raise error
    assert only_run(store).info.status == status
    assert history(store, "eval/accuracy") == [(3, 0.5)] and not history(store, "eval/loss")


def test_service_learns_that_the_run_was_killed(tmp_path, store, start_python):
    program = f"""
import sys, time
from pathlib import Path
from flaxcls.runs.trackers import Trackers
trackers = Trackers(["mlflow"], Path({str(tmp_path)!r}), {{"seed": 0}}, print)
trackers.add(1, {{"train/loss": 2.0}})
time.sleep(100)
"""
    process = start_python("-c", program)
    wait_until(lambda: only_run(store) and history(store, "train/loss") == [(1, 2.0)])
    assert only_run(store).info.status == "RUNNING"
    process.send_signal(signal.SIGKILL)
    wait_until(lambda: only_run(store).info.status == "FAILED")


def wait_until(condition, seconds=20):
    deadline, is_met = time.monotonic() + seconds, False
    while not is_met and time.monotonic() < deadline:
        time.sleep(0.05)
        with contextlib.suppress(Exception):  # MLflow can't read files that are being written
            is_met = condition()
    assert is_met


@pytest.mark.parametrize("error", [None, Interrupted("stopped after step 3", 42)])
def test_run_is_kept_by_wandb_offline(tmp_path, monkeypatch, error):
    pytest.importorskip("wandb")
    secret = "0123456789abcdef" * 2 + "01234567"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    (tmp_path / "run").mkdir()
    raised = pytest.raises(Interrupted) if error else contextlib.nullcontext()
    with raised, MetricLog(tmp_path / "run", 0, 10, 8) as watch:
        watch.track(("wandb",), {"optimizer.name": "sgd"})
        watch.evaluation(3, 0.5, {"eval": {"accuracy": 0.5, "count": 2, "loss": 1.25}})
        if error:
            raise error
    records = wandb_records(next(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    (run,) = records["run"]
    assert {"id": run.run_id} == json.loads((tmp_path / "run/trackers.json").read_text())
    assert (run.display_name, run.project) == ("run", "flaxcls")
    configs = {u.key: u.value_json for record in records["config"] for u in record.update}
    assert configs["optimizer.name"] == '"sgd"'
    (row,) = records["history"]
    values = {item.key or ".".join(item.nested_key): item.value_json for item in row.item}
    expected = {"step": 3, "eval/accuracy": 0.5, "eval/count": 2, "eval/loss": 1.25}
    assert {name: json.loads(values[name]) for name in expected} == expected
    assert [record.exit_code for record in records["exit"]] == [int(error is not None)]
    assert len(records.get("preempting", [])) == int(error is not None)
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes()


def wandb_records(path):
    """The records of an offline run by kind: blocks of LevelDB's log that hold protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part, records = path.read_bytes(), 7, b"", {}
    while position < len(data):
        if (left := 2**15 - position % 2**15) < 7:
            position += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record, part = Record.FromString(part), b""
            name = record.WhichOneof("record_type")
            records.setdefault(name, []).append(getattr(record, name))
    return records


def test_unreachable_service_is_reported_once_and_stops_nothing(
    tmp_path, tiny_config, monkeypatch, capfd
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", DEAD.replace("//", "//me:secret@"))
    alone = train(tiny_config(), tmp_path / "alone")
    capfd.readouterr()
    summary = train(tiny_config(log_to="mlflow"), tmp_path / "run")
    said = capfd.readouterr()
    assert summary["eval"] == alone["eval"] and summary["finished"]
    (sentence,) = [line for line in said.out.splitlines() if "mlflow" in line.lower()]
    assert sentence.startswith("note: mlflow does not take the metrics") and not said.err
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes()


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_service_that_never_answers_takes_no_time_and_is_reported_once(
    tmp_path, monkeypatch, silent_server, name
):
    pytest.importorskip(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 1)
    said = []
    began = time.perf_counter()
    tracker = Trackers([name], tmp_path, {"seed": 0}, said.append)
    process = tracker._pipes[0]._process
    assert time.perf_counter() - began < 1
    slowest = 0.0
    for step in range(3000):
        began = time.perf_counter()
        tracker.add(step, {"train/loss": 1.0, "train/accuracy": 0.5})
        slowest = max(slowest, time.perf_counter() - began)
    assert slowest < 0.5
    began = time.perf_counter()
    tracker.close("finished")
    assert time.perf_counter() - began < 3 and process.returncode == -signal.SIGKILL
    (sentence,) = said
    assert sentence.startswith(f"note: {name} does not keep up: rows are missing there")


def test_rows_come_when_the_service_does(tmp_path, store, monkeypatch):
    """A file is at first where the store shall be."""
    (tmp_path / "store").rename(tmp_path / "later")
    (tmp_path / "store").write_text("")
    said = []
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    program = tmp_path / "program.py"
    program.write_text(
        "from flaxcls.runs import tracker_process\n"
        "tracker_process.RETRY_SECONDS = 0\n"
        "tracker_process.main()\n"
    )
    monkeypatch.setattr(trackers, "_SCRIPT", program)
    tracker = Trackers(["mlflow"], tmp_path, {"seed": 0}, said.append)
    tracker.add(1, {"train/loss": 2.0})

    def is_told():
        tracker._pipes[0]._listen()
        return bool(said)

    wait_until(is_told)
    (tmp_path / "store").unlink()
    (tmp_path / "later").rename(tmp_path / "store")
    tracker.add(2, {"train/loss": 1.0})
    tracker.close("finished")
    assert history(store, "train/loss") == [(1, 2.0), (2, 1.0)] and len(said) == 1
    assert said[0].startswith("note: mlflow does not take the metrics")


def test_what_mlflow_lacks_without_an_address_is_reported(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    if importlib.util.find_spec("sqlalchemy"):
        pytest.skip("all of MLflow is installed, whose default needs no address")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    said = []
    Trackers(["mlflow"], tmp_path, {"seed": 0}, said.append).close("finished")
    (sentence,) = said
    assert "training continues (OSError: set MLFLOW_TRACKING_URI, such as http://" in sentence


CLIENTS = {
    "raise SystemExit(3)": "SystemExit: 3",
    "import os; os._exit(3)": "has lost its process",
    "print('hello'); input('your password? ')": "EOFError",
    "import no_such_module": "ModuleNotFoundError: No module named 'no_such_module'",
}


@pytest.mark.parametrize("text", CLIENTS)
def test_client_that_misbehaves_is_reported_in_one_sentence(tmp_path, fake_client, capfd, text):
    fake_client(text)
    said = []
    tracker = Trackers(["wandb"], tmp_path, {"seed": 0}, said.append)
    if "_exit" in text:
        tracker._pipes[0]._process.wait(20)
        for step in range(2):
            tracker.add(step, {"train/loss": 1.0})
    tracker.close("finished")
    (sentence,) = said
    assert sentence.startswith("note: wandb ") and CLIENTS[text] in sentence
    assert capfd.readouterr() == ("", "")


def test_what_hangs_ends_some_time_after_a_killed_run(tmp_path, fake_client, start_python):
    fake_client(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
                "while True: time.sleep(1)")  # fmt: skip
    child = (
        "from flaxcls.runs import tracker_process; tracker_process.LAST_SECONDS = 0.5; "
        "tracker_process.main()"
    )
    process = start_python("-c", child, stdin=-1, start_new_session=True)
    process.stdin.write(
        json.dumps({"service": "wandb", "id": "0", "name": "", "config": {}}) + "\n"
    )
    process.stdin.flush()
    wait_until((tmp_path / "pid").exists)
    assert process.poll() is None
    process.stdin.close()
    process.stdin = None
    assert process.wait(20) == -signal.SIGKILL


def test_signals_to_all_processes_of_a_run_do_not_end_its_services(tmp_path, store):
    tracker = Trackers(["mlflow"], tmp_path, {"seed": 0}, print)
    tracker.add(1, {"train/loss": 2.0})
    wait_until(lambda: only_run(store) and history(store, "train/loss"))
    for number in (signal.SIGTERM, signal.SIGINT):
        tracker._pipes[0]._process.send_signal(number)
    tracker.add(2, {"train/loss": 1.0})
    tracker.close("preempted")
    assert history(store, "train/loss") == [(1, 2.0), (2, 1.0)]
    assert only_run(store).info.status == "KILLED"


@pytest.mark.parametrize("content", [None, "[]", "{", '{"id": "\' OR 1"}', '{"id": 3}'])
def test_id_is_kept_and_a_damaged_one_made_again(tmp_path, content):
    path = tmp_path / "trackers.json"
    if content is not None:
        path.write_text(content)
    first = trackers._run_id(tmp_path, print)
    assert len(first) == 16 and json.loads(path.read_text()) == {"id": first}
    assert trackers._run_id(tmp_path, print) == first


@pytest.mark.parametrize(
    ("log_to", "sentence"),
    [
        ("wandbb", "config.log_to has 'wandbb', did you mean 'wandb'?"),
        (("mlflow", "tensorboard"), "config.log_to has 'tensorboard'; known: mlflow, wandb"),
        (3, "config.log_to must be None or a tuple of names, got 3"),
        ((1,), r"config.log_to must be None or a tuple of names, got \(1,\)"),
        ({"wandb": 1}, "config.log_to must be None or a tuple of names"),
    ],
)
def test_wrong_names_are_reported_early(tiny_config, log_to, sentence):
    with pytest.raises(ConfigError, match=f"^{sentence}".replace("?", r"\?")):
        build.check(tiny_config(log_to=log_to))


def test_missing_package_is_reported_before_anything_is_made(tmp_path, tiny_config, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as W&B itself makes one where it runs
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'flaxcls\[wandb\]'$"):
        train(tiny_config(log_to="wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    build.check(tiny_config(log_to="wandb"))  # evaluating the run needs no package


def test_other_processes_log_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(metric_log, "Trackers", None)  # would be called
    with MetricLog(None, 0, 10, 8) as watch:
        watch.track(("mlflow",), {})
        watch.evaluation(3, 0.5, {"eval": {"accuracy": 0.5, "count": 2, "loss": 1.0}})
