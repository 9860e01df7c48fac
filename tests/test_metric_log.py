import json
import os
import pty

from flaxcls.runs import metric_log
from flaxcls.runs.metric_log import MetricLog, describe

ROW = {"loss": 0.5, "accuracy": 0.75, "learning_rate": 0.1}


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_rows_after_the_restart_are_cut(tmp_path):
    with MetricLog(tmp_path, 0, 40, 8) as log:
        for step in (10, 20, 30):
            log.training(step, step / 10, ROW, (100.0, 0.1))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write('{"step": 40, "tra')  # torn off by a kill
    with MetricLog(tmp_path, 20, 40, 8) as log:
        assert steps_in(path) == [10, 20]
        log.training(30, 3.0, ROW, (50.0, 0.2))
    assert path.read_bytes() == whole


def test_rows_hold_nothing_that_depends_on_the_clock(tmp_path):
    with MetricLog(tmp_path, 0, 40, 8) as log:
        log.training(10, 1.0, ROW, (123.4, 0.5))
        log.evaluation(10, 1.0, {"eval": {"accuracy": 0.5, "loss": 1.0, "count": 4}})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 10, "epoch": 1.0, "train": ROW},
        {"step": 10, "epoch": 1.0, "eval": {"accuracy": 0.5, "loss": 1.0, "count": 4}},
    ]


def test_lines_are_plain_when_not_a_terminal(tmp_path, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: now[0])
    with MetricLog(tmp_path, 0, 40, 8) as log:
        log.say("[bold]a line[/bold] that is longer than any terminal " + "x" * 200)
        log.training(10, 2.5, ROW, (100.0, 0.25))
        now[0] = 2000.0  # with evaluations and all: what is left takes as long
        log.training(20, 5.0, ROW, (0.01, 0.25))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("[bold]a line[/bold]") and lines[0].endswith("x" * 200)
    assert lines[1:] == [
        "step 10/40  epoch 2.50  loss 0.5000  accuracy 75.00 %  lr 0.1  800 images/s  "
        "data wait 25 %  ETA 0:00",
        "step 20/40  epoch 5.00  loss 0.5000  accuracy 75.00 %  lr 0.1  0 images/s  "
        "data wait 25 %  ETA 33:20",
    ]


def test_terminal_shows_one_live_line(recipe, tmp_path, start_main):
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    process = start_main(
        f"--config={recipe}", f"--workdir={tmp_path / 'run'}", stdout=slave, stderr=slave,
        env=environment,
    )  # fmt: skip
    os.close(slave)
    output = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # what Linux says at the end
            break
        if not part:
            break
        output += part
    os.close(master)
    assert process.wait(60) == 0, output
    text = output.decode()
    assert (
        "\x1b[?25l" in text and "\x1b[?25h" in text
    )  # the cursor hidden while it is live, and back
    assert "\x1b[2K" in text  # the line is erased and drawn again
    assert "step 12/12" in text and "images/s" in text and "ETA" in text
    assert "eval: accuracy" in text and "Traceback" not in text


def test_description_says_how_many_were_right():
    row = {"accuracy": 355 / 360, "loss": 0.0512, "count": 360, "accuracy_top5": 1.0}
    assert describe(row) == (
        "accuracy 98.61 % (355 of 360), top-5 accuracy 100.00 % (360 of 360), loss 0.0512"
    )


def test_speed_and_length_are_said_once_before_the_first_row(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: now[0])
    with MetricLog(tmp_path, 0, 1000, 64) as log:
        for step in range(1, 30):
            now[0] += 0.25
            log.stepped(step, step / 10)
        said = capsys.readouterr().out.splitlines()
        # 3 s after the first step, which ended after 0.25 s: at step 13.
        assert not log.is_silent
        assert said == ["step 13/1000  epoch 1.30  256 images/s  about 4 minutes to go"]

        log.begin(29)  # after a rollback
        now[0] += 100
        log.stepped(30, 3.0)  # a step that takes long is enough
        assert capsys.readouterr().out == (
            "step 30/1000  epoch 3.00  1 images/s  about 26.9 hours to go\n"
        )
        log.begin(29)
        now[0] += 5  # for the first data, perhaps
        log.stepped(30, 3.0)
        now[0] += 3
        log.stepped(31, 3.1)
        assert "21 images/s  about 48 minutes to go" in capsys.readouterr().out
    assert not (tmp_path / "metrics.jsonl").read_text()


def test_nothing_is_said_where_rows_come_soon_or_the_run_is_over(tmp_path, capsys):
    with MetricLog(tmp_path, 0, 3, 64) as log:
        log.stepped(1, 0.1)
        row = {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1}
        log.training(1, 0.1, row, (10.0, 0.0))
        capsys.readouterr()
        log.stepped(2, 0.2)
        log.stepped(3, 0.3)
    assert not capsys.readouterr().out


def test_end_names_the_best_result_where_it_is_not_the_last():
    row = {"accuracy": 0.5, "loss": 1.25, "count": 10}
    best = {"step": 40, "weights": "ema", "accuracy": 0.7, "loss": 1.0, "count": 10}
    text = metric_log.describe_end({"step": 50, "eval": row, "best": best})
    assert text == (
        "accuracy 50.00 % (5 of 10), loss 1.2500\n"
        "The best was after step 40, averaged parameters: accuracy 70.00 % (7 of 10), loss 1.0000"
    )
    same = {**row, "step": 50, "weights": "eval"}
    for best in ({}, same):
        assert "best" not in metric_log.describe_end({"step": 50, "eval": row, "best": best})
