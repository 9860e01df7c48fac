import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flaxcls.runs import goodput
from flaxcls.runs.goodput import NAMES, Goodput, process_age

ROOT = Path(__file__).parent.parent
DAY = 86400.0


class Time:
    """Stands for the module `time`: it advances only when asked to."""

    def __init__(self):
        self.monotonic_seconds, self.unix_seconds = 1000.0, 1.7e9

    def sleep(self, seconds):
        self.monotonic_seconds += seconds
        self.unix_seconds += seconds

    def perf_counter(self):
        return self.monotonic_seconds

    def time(self):
        return self.unix_seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


@pytest.fixture
def path(tmp_path):
    return tmp_path / "goodput.json"


def spent(run):
    """The categories that are not zero, to the microsecond."""
    return {name: round(s, 6) for name, s in run.totals.items() if round(s, 6)}


def begin(clock, path, saved, startup=5, age=0.0):
    """A process that has started, taking `startup` seconds besides its `age`."""
    run = Goodput(age)
    clock.sleep(startup)
    run.resume(path, saved)
    return run


def test_every_second_is_in_one_category_and_the_inner_stretch_has_it(clock):
    run = Goodput(age=2.0)
    clock.sleep(1)
    with run.spending("compile"):
        clock.sleep(10)
    with run.spending("step"):
        clock.sleep(100)
        with run.spending("data_wait"):
            clock.sleep(20)
        with run.spending("evaluate"):
            clock.sleep(30)
            with run.spending("data_wait"):
                clock.sleep(4)
            clock.sleep(1)
        clock.sleep(50)
    clock.sleep(3)
    assert spent(run) == {
        "startup": 6, "compile": 10, "step": 150, "data_wait": 24, "evaluate": 31
    }  # fmt: skip


def test_an_error_ends_the_stretch_that_it_leaves(clock):
    run = Goodput()
    with pytest.raises(OSError), run.spending("save"):
        clock.sleep(1)
        raise OSError
    clock.sleep(2)
    assert spent(run) == {"save": 1, "startup": 2}


def test_lap_leaves_out_what_is_not_training_and_shares_the_wait(clock):
    run = Goodput()
    clock.sleep(50)
    with run.spending("step"):
        clock.sleep(6)
        with run.spending("data_wait"):
            clock.sleep(2)
        with run.spending("save"):
            clock.sleep(1000)
        assert run.lap(16) == (2.0, 0.25)
        clock.sleep(2)
        assert run.lap(10) == (5.0, 0.0)
    assert run.rate(26) == (2.6, 0.2)


def test_restart_counts_on_from_the_checkpoint_and_the_rest_is_lost(clock, path):
    first = begin(clock, path, {})
    with first.spending("step"):
        clock.sleep(100)
        saved = json.loads(json.dumps(first.totals))  # goes into a checkpoint
        clock.sleep(40)
        with first.spending("evaluate"):
            clock.sleep(2)
        first.write()
    clock.sleep(60)  # killed

    second = begin(clock, path, saved, startup=1, age=3)
    assert spent(second) == {"startup": 9, "step": 100, "lost": 42, "down": 57}
    with second.spending("step"):
        clock.sleep(7)
    second.write()
    clock.sleep(10)  # killed again, before anything was saved

    third = begin(clock, path, saved, startup=5)
    assert spent(third) == {"startup": 10, "step": 100, "lost": 42 + 4 + 7, "down": 57 + 10}
    third.write()
    content = json.loads(path.read_text())
    assert content["restarts"] == 2
    assert content["seconds"].keys() == NAMES.keys()
    assert content["goodput"] == pytest.approx(100 / 230)
    assert content["last_sign_of_life"] == clock.time()


def test_seconds_add_up_to_the_time_since_the_first_start(clock, path):
    began, saved = clock.time(), {}
    for attempt in range(5):
        run = begin(clock, path, saved, startup=3)
        with run.spending("step"):
            for _ in range(4):
                clock.sleep(10)
                if attempt % 2:
                    saved = run.totals
                run.write()
        assert sum(run.totals.values()) == pytest.approx(clock.time() - began)
        clock.sleep(17)
    assert run.totals["down"] == pytest.approx(4 * 17)
    assert run.totals["step"] == pytest.approx(3 * 40)


def test_rollback_loses_what_came_after_the_checkpoint(clock, path):
    run = begin(clock, path, {})
    with run.spending("step"):
        clock.sleep(100)
        saved = run.totals
        clock.sleep(30)
        with run.spending("save"):
            clock.sleep(4)
        with run.spending("lost"):
            clock.sleep(1)  # reading the checkpoint
            run.roll_back(saved)
        clock.sleep(20)
        assert run.lap(10) == (0.5, 0.0)
        assert spent(run) == {"startup": 5, "step": 120, "lost": 35}
        run.roll_back(saved)  # to the same one
    assert spent(run) == {"startup": 5, "step": 100, "lost": 55}
    assert "restart" not in run.describe()


def test_rollback_to_a_checkpoint_of_an_earlier_process_keeps_the_time_that_it_was_down(
    clock, path
):
    first = begin(clock, path, {})
    saved = first.totals
    first.write()
    clock.sleep(60)
    second = begin(clock, path, saved)
    with second.spending("step"):
        clock.sleep(10)
    second.roll_back(saved)
    assert spent(second) == {"startup": 5, "lost": 15, "down": 60}


def test_file_that_is_older_than_the_checkpoint_takes_nothing_away(clock, path):
    first = begin(clock, path, {})
    first.write()
    with first.spending("step"):
        clock.sleep(100)
    second = begin(clock, path, first.totals)
    assert spent(second) == {"startup": 10, "step": 100, "down": 100}


BROKEN = {
    "missing": None,
    "empty": "",
    "torn": '{"goodput": 0.9, "seconds": {"st',
    "bytes": b"\xff\xfe\x00",
    "list": "[1, 2]",
    "nothing in it": "{}",
    "text": '{"seconds": {"step": "many"}, "restarts": 1, "last_sign_of_life": 1}',
    "negative": '{"seconds": {"step": -1}, "restarts": 1, "last_sign_of_life": 1}',
    "not finite": '{"seconds": {"step": NaN}, "restarts": 1, "last_sign_of_life": 1}',
    "huge": '{"seconds": {"step": 1}, "restarts": 1e999, "last_sign_of_life": 1}',
    "null": '{"seconds": null, "restarts": null, "last_sign_of_life": null}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_file_that_cannot_be_used_does_not_stop_a_run(clock, path, content):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    run = begin(clock, path, {"step": 100.0})
    assert spent(run) == {"startup": 5, "step": 100}
    run.write()
    assert json.loads(path.read_text())["restarts"] == 1


def test_folder_in_the_place_of_the_file_does_not_stop_a_run(clock, path):
    path.mkdir()
    run = begin(clock, path, {})
    run.write()
    assert spent(run) == {"startup": 5}


@pytest.mark.parametrize("jump", [-DAY, math.inf])
def test_clock_that_was_set_back_makes_no_negative_time(clock, path, jump):
    first = begin(clock, path, {})
    first.write()
    if jump == math.inf:  # the file says so
        path.write_text(path.read_text().replace(str(clock.time()), "Infinity"))
    else:
        clock.unix_seconds += jump
    second = begin(clock, path, first.totals)
    assert spent(second) == {"startup": 10}


def test_seconds_of_a_run_from_before_the_categories_are_its_steps(clock, path):
    run = begin(clock, path, 123.5)
    assert spent(run) == {"startup": 5, "step": 123.5}


def test_file_is_not_written_more_often_than_said(clock, path):
    run = begin(clock, path, {})
    run.write(every=10)
    before = path.read_bytes()
    clock.sleep(9)
    run.write(every=10)
    assert path.read_bytes() == before
    clock.sleep(1)
    run.write(every=10)
    assert path.read_bytes() != before


def test_other_processes_write_nothing(clock, tmp_path):
    run = Goodput()
    run.write()
    run.resume(None, {"step": 1.0})
    run.write()
    assert list(tmp_path.iterdir()) == []


def test_description_is_one_line_with_the_largest_first(clock, path):
    run = begin(clock, path, {"step": 931.0, "compile": 12.0, "save": 0.2, "lost": 51.8}, startup=5)
    assert run.describe() == (
        "goodput 93.1 %: stepping 931 s, lost 52 s, compiling and initialising 12 s, starting 5 s; "
        "1 restart"
    )
    assert Goodput().describe() == "goodput 0.0 %: less than a second"


def test_process_age_is_the_time_since_it_was_started():
    program = "import time; time.sleep(0.5); from flaxcls.runs.goodput import process_age; "
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", program + "print(process_age())"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 0.5 <= float(result.stdout) <= time.monotonic() - began + 0.02  # a tick is 0.01 s
    assert 0 < process_age() < time.monotonic()


def test_process_age_without_a_proc_file_system_is_its_processor_time(monkeypatch):
    monkeypatch.setattr(goodput.os, "sysconf", lambda name: int("no such thing"))
    assert 0 < process_age() <= time.process_time()


def test_file_is_whole_whenever_the_process_is_killed(path):
    program = (
        "import sys; from pathlib import Path; from flaxcls.runs.goodput import Goodput\n"
        "run = Goodput(); run.resume(Path(sys.argv[1]), {})\n"
        "while True: run.write(); sys.stdout.write('.'); sys.stdout.flush()"
    )
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        process.stdout.read(20 + attempt)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert json.loads(path.read_text())["restarts"] == attempt


def test_stages_of_a_start_are_counted_from_the_beginning_of_the_process(clock, path):
    run = begin(clock, path, {}, startup=2, age=3.0)
    run.reach("read")
    clock.sleep(4)
    run.reach("first_step")
    clock.sleep(100)
    run.reach("first_step")  # of the next step
    run.write()
    assert json.loads(path.read_text())["start"] == {"imported": 3, "read": 5, "first_step": 9}
