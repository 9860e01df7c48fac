"""One job trains in a folder: who holds lease.json, who gets it next, and who has lost it."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import pytest

from flaxcls.errors import ConfigError, FlaxclsError, RunTakenError
from flaxcls.runs import lease, lease_file
from flaxcls.runs.broken_images import broken_images_log
from flaxcls.runs.checkpoint import UNFINISHED, Checkpoints
from flaxcls.runs.metric_log import MetricLog
from flaxcls.runtime import machine
from flaxcls.training.hooks import Hooks
from flaxcls.training.train import train_config

DEAD = 2**22 + 1  # no process has this number: the most that Linux gives is 2**22


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(lease, "ENDING_SECONDS", 0.6)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.02)


def write(folder, name="lease.json", **changes):
    """A lease of this process, which it does not hold, but for the changes; its token."""
    content = {**lease.Holder.this(folder, time.time())._asdict(), **changes}
    del content["renewed"]
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return content["token"]


def read(folder):
    return json.loads((folder / "lease.json").read_text())


def never(text):
    raise AssertionError(text)


def test_second_job_of_any_thread_is_told_who_has_the_run(tmp_path):
    with lease.hold(tmp_path / "run", never):
        before = read(tmp_path / "run")
        with pytest.raises(RunTakenError) as refused, lease.hold(tmp_path / "run", never):
            pass
        assert refused.value.exit_code == 2
        assert str(refused.value).startswith(
            f"another job trains in {tmp_path}/run: process {os.getpid()} on {before['host']}, "
            f"since {time.strftime('%Y-')}"
        )
        with lease.hold(tmp_path / "other", never):
            pass
        assert read(tmp_path / "run") == before
    with lease.hold(tmp_path / "run", never):
        assert read(tmp_path / "run")["token"] != before["token"]


def test_lease_leaves_nothing_behind(tmp_path):
    with lease.hold(tmp_path / "runs" / "run", never):
        assert (tmp_path / "runs" / "run" / "lease.json").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    with pytest.raises(ConfigError), lease.hold(tmp_path / "old", never):
        raise ConfigError("a mistake")
    assert list(tmp_path.rglob("*")) == [tmp_path / "old"]
    with lease.hold(tmp_path / "new", never):
        (tmp_path / "new" / "config.json").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.json"]


def test_job_that_was_killed_here_has_no_lease_any_more(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    born = machine.began(killed.pid)
    assert machine.state_of(killed.pid, born) == "running"
    killed.kill()
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
    assert machine.state_of(killed.pid, born) == "gone"  # though none has asked for its exit code
    others = {"pid": os.getppid(), "began": 1}  # its number is another one's by now
    for holder in ({"pid": killed.pid, "began": born}, {"pid": DEAD}, others, {}):
        write(tmp_path, **holder)
        with lease.hold(tmp_path, never) as held:
            held.check()
    killed.communicate()


def test_process_of_another_machine_is_dead_when_it_was_silent_for_long_enough(tmp_path):
    said = []
    write(tmp_path, host="far\x1baway", machine="another", since=1e9)
    for when in (time.time() + 1e6, 1.0):  # its clock is wrong
        os.utime(tmp_path / "lease.json", (when, when))
    began = time.monotonic()
    with lease.hold(tmp_path, said.append):
        assert time.monotonic() - began >= 0.3
    waits, takes = said
    assert "process" in waits and "on far\\x1baway, since 2001-09-09" in waits
    assert "waiting until it has ended, or for 0.3 s without a sign of life" in waits
    assert takes == "no sign of life for 0.3 s: this job takes the run over"


def test_process_of_another_machine_that_renews_its_lease_is_alive(tmp_path, monkeypatch):
    with lease.hold(tmp_path, never):
        monkeypatch.setattr(machine, "identity", lambda: "another")
        with pytest.raises(RunTakenError), lease.hold(tmp_path, lambda text: None):
            pass


def test_copied_folder_is_not_that_of_the_job_which_trains_in_the_first_one(tmp_path):
    said = []
    with lease.hold(tmp_path / "run", never):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        (tmp_path / "link").symlink_to(tmp_path / "run")
        with pytest.raises(RunTakenError):
            lease.hold(tmp_path / "link", never).__enter__()
        with lease.hold(tmp_path / "copy", said.append):
            assert said[-1].startswith("no sign of life")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"token": "../x"}', "[" * 10**5, None])
def test_lease_that_is_damaged_is_that_of_an_unknown_process(tmp_path, content):
    write(tmp_path, pid=-1)  # which os.kill takes for all processes
    if content is not None:
        (tmp_path / "lease.json").write_text(content)
    said = []
    with lease.hold(tmp_path, said.append) as held:
        held.check()
    assert "belongs to an unknown process" in said[0] and len(said) == 2
    assert list(tmp_path.iterdir()) == []


def test_job_that_was_asked_to_end_is_waited_for(tmp_path):
    order = []

    def end():
        time.sleep(0.4)
        order.append("saved")
        first.release()

    context = lease.hold(tmp_path, never)
    first = context.__enter__()
    first.announce_end()
    first.check()
    saving = threading.Thread(target=end)
    saving.start()
    with lease.hold(tmp_path, order.append):
        saving.join()
        assert order[1:] == ["saved"] and "is about to end" in order[0]
        with pytest.raises(RunTakenError):
            first.check()
    context.__exit__(None, None, None)


def test_job_that_does_not_come_to_its_end_is_not_waited_for_longer(tmp_path):
    with lease.hold(tmp_path, never) as held:
        held.announce_end()
        began = time.monotonic()
        with pytest.raises(RunTakenError), lease.hold(tmp_path, lambda text: None):
            pass
        assert time.monotonic() - began > 0.6


def test_taking_over_that_was_cut_off_is_finished_by_the_next_job(tmp_path):
    token = write(tmp_path, pid=DEAD)
    write(tmp_path, f"lease.{token}.json", pid=DEAD)
    with lease.hold(tmp_path, never) as held:
        held.check()
        assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]
    token = write(tmp_path, pid=DEAD)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write(tmp_path, f"lease.{token}.json", pid=other.pid, began=machine.began(other.pid))
    with pytest.raises(RunTakenError, match=f"process {other.pid} on"), lease.hold(tmp_path, never):
        pass
    other.communicate(b"\n")


def test_who_has_lost_the_lease_is_told_and_leaves_that_of_the_other(tmp_path, monkeypatch):
    with lease.hold(tmp_path, never) as held:
        write(tmp_path, pid=77, host="faraway")
        assert not held.is_held()
        with pytest.raises(RunTakenError, match=r"taken over: .* process 77 on faraway, since"):
            held.check()
        held.announce_end()
    assert read(tmp_path)["pid"] == 77
    (tmp_path / "lease.json").unlink()
    with lease.hold(tmp_path, never) as held:
        (tmp_path / "lease.json").unlink()
        with pytest.raises(RunTakenError, match=r"its lease\.json is gone"):
            held.check()


def test_file_that_can_not_be_read_for_a_moment_does_not_end_the_job(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    with lease.hold(tmp_path, never) as held:
        with monkeypatch.context() as patch:
            patch.setattr(lease_file, "_read", fail)
            held.check()
            with pytest.raises(FlaxclsError, match=r"lease\.json can't be read: Input"):
                lease.hold(tmp_path, never).__enter__()
        held.check()
    assert list(tmp_path.iterdir()) == []


def test_wait_for_a_file_that_can_not_be_read_any_more_ends_with_a_sentence(tmp_path, monkeypatch):
    def fail(text):
        monkeypatch.setattr(lease_file, "_read", lambda path: os.stat(f"{path}/below"))

    write(tmp_path, machine="another")
    with pytest.raises(FlaxclsError, match=r"lease\.json can't be read: Not a directory"):
        lease.hold(tmp_path, fail).__enter__()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_folder_that_can_not_be_written_has_no_lease_and_a_full_disk_ends_the_run(
    tmp_path, monkeypatch, code
):
    def fail(path, holder):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lease_file, "_create", fail)
    if code == errno.EROFS:
        with lease.hold(tmp_path, never) as held:
            held.check()
    else:
        with pytest.raises(FlaxclsError, match="No space left") as raised:
            lease.hold(tmp_path, never).__enter__()
        assert raised.value.exit_code == 1  # restarted


def contents(folder):
    """All files of a run with what tells whether they were written.

    Not those of a checkpoint under way, which is in the background, and never committed.
    """
    files = {p: p.stat() for p in folder.rglob("*") if UNFINISHED not in str(p)}
    return {path: (s.st_size, s.st_mtime_ns) for path, s in files.items() if path.is_file()}


@pytest.mark.parametrize("moment", ["on_log", "on_evaluation"])
def test_run_that_has_lost_its_folder_writes_nothing_more(tmp_path, tiny_config, moment, capsys):
    seen = []

    def lose(row):
        write(tmp_path / "run", pid=77)
        seen.append(contents(tmp_path / "run"))

    with pytest.raises(RunTakenError, match="process 77"):
        # Nothing is saved in the background at that moment.
        config = tiny_config(checkpoint__every="12 steps")
        train_config(config, tmp_path / "run", hooks=Hooks(**{moment: lose}))
    assert seen == [contents(tmp_path / "run")]
    assert "not saved" not in capsys.readouterr().out


def test_logs_of_a_job_that_has_lost_its_folder_stay_as_they_are(tmp_path):
    row = {"loss": 1.0, "accuracy": 0.5, "count": 8}
    with lease.hold(tmp_path, never) as held:
        report = broken_images_log(tmp_path, held)
        with pytest.raises(RunTakenError), MetricLog(tmp_path, 0, 9, 8, held.check) as log:
            report("a.png is broken")
            log.evaluation(1, 0.1, {"eval": row})
            write(tmp_path, pid=77)
            before = contents(tmp_path)
            report("b.png is broken")
            with pytest.raises(RunTakenError):
                log.cut(0)
            log.evaluation(2, 0.2, {"eval": row})
    assert contents(tmp_path) == before
    assert (tmp_path / "broken_images.log").read_text() == "a.png is broken\n"


def test_checkpoint_of_a_job_that_has_lost_its_folder_is_not_committed(tmp_path):
    lost = []

    def check():
        if lost:
            raise RunTakenError("another one trains")

    checkpoints = Checkpoints(tmp_path / "checkpoints", check=check)
    metadata = {"progress": {"best": {}}}
    checkpoints.save(1, {"a": jnp.zeros(3)}, metadata)
    checkpoints.wait()
    checkpoints.save(2, {"a": jnp.zeros(3)}, metadata)
    lost.append(True)
    with pytest.raises(RunTakenError):
        checkpoints.wait()
    steps = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert steps == ["1"]


TAKERS = 8
TAKER = """
import sys
from flaxcls.errors import RunTakenError
from flaxcls.runs import lease, lease_file
from pathlib import Path

lease._POLL_SECONDS = 0.02
for folder in sys.stdin:
    try:
        with lease.hold(Path(folder.strip()), len) as held:
            print("mine", flush=True)
            sys.stdin.readline()
            held.check()
    except RunTakenError as error:
        print("refused", flush=True)
        sys.stdin.readline()
    print("ended", flush=True)
"""


def test_one_of_many_who_want_a_run_gets_it(tmp_path, start_python):
    takers = [start_python("-c", TAKER, stdin=subprocess.PIPE) for _ in range(TAKERS)]

    def each(text):
        for taker in takers:
            taker.stdin.write(text + "\n")
            taker.stdin.flush()
        return [taker.stdout.readline().strip() for taker in takers]

    for number in range(20):
        folder = tmp_path / str(number)
        if number % 3:
            token = write(folder, pid=DEAD)
            if number % 3 == 2:
                write(folder, f"lease.{token}.json", pid=DEAD)
        assert sorted(each(str(folder))) == ["mine", *["refused"] * (TAKERS - 1)]
        assert each("") == ["ended"] * TAKERS
        assert not folder.exists() or list(folder.iterdir()) == []
