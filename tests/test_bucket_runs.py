"""The folder of a run in a bucket: leases, checkpoints and logs there, in this process."""

import gc
import json
import os
import tempfile
import time

import jax
import numpy as np
import pytest

import flaxcls
from flaxcls.buckets import ABSENT, BucketPath, Changed, as_path
from flaxcls.errors import CheckpointError, ConfigError, FlaxclsError, RunTakenError
from flaxcls.files import GrowingObject, append_line, atomic_write, read_json, write_json
from flaxcls.runs import lease, lease_file, manifest
from flaxcls.runs.checkpoint import Checkpoints
from flaxcls.runs.metric_log import MetricLog
from flaxcls.runs.recovery import restore_newest
from flaxcls.runs.robustness_log import read as read_rows
from flaxcls.runs.tensorboard import read_events
from flaxcls.runtime import machine, scratch
from flaxcls.training.hooks import Hooks, StopTraining
from flaxcls.training.train import train_config


@pytest.fixture
def folder(bucket):
    """A folder in a bucket in which nothing is yet."""
    return as_path(bucket) / "runs" / "1"


def never(text):
    raise AssertionError(text)


# Paths.


def test_names_are_those_of_pathlib(folder):
    path = folder / "checkpoints" / "12.tmp.json"
    assert str(path) == f"{folder}/checkpoints/12.tmp.json"
    assert path.name == "12.tmp.json" and path.parent.parent == folder
    assert path.with_name("x") == path.parent / "x"
    assert [str(p) for p in path.parents][-1].count("/") == 2  # the bucket
    assert path.match("1*.json") and hash(path) == hash(as_path(str(path)))
    with pytest.raises(TypeError):
        os.fspath(path)


def test_what_is_written_is_there(folder):
    assert not folder.exists() and folder.files() == {} and [*folder.glob("*")] == []
    with pytest.raises(FileNotFoundError, match="No such file"):
        (folder / "a").read_bytes()
    with atomic_write(folder / "a", "w") as file:
        file.write("ä\n")
        assert not (folder / "a").exists()
    with pytest.raises(ZeroDivisionError), atomic_write(folder / "a") as file:
        file.write(b"half")
        raise ZeroDivisionError
    write_json(folder / "b" / "c.json", {"x": 1})
    assert (folder / "a").read_text() == "ä\n" and read_json(folder / "b" / "c.json") == {"x": 1}
    assert folder.is_dir() and not folder.is_file() and (folder / "a").is_file()
    assert [path.name for path in folder.iterdir()] == ["a", "b"]
    assert {name: status.st_size for name, status in folder.files().items()} == {
        "a": 3,
        "b/c.json": len(b'{\n  "x": 1\n}\n'),
    }
    assert abs((folder / "a").stat().st_mtime - time.time()) < 60
    (folder / "b").copy_to(folder / "d")
    (folder / "b").rmtree()
    (folder / "a").unlink()
    (folder / "a").unlink(missing_ok=True)
    assert [*folder.files()] == ["d/c.json"] and not (folder / "b").exists()
    with pytest.raises(FileNotFoundError):
        (folder / "nothing").stat()


def test_an_object_is_replaced_only_where_it_is_the_expected_one(folder):
    path = folder / "x"
    first = path.put(b"1", ABSENT)
    second = path.put(b"2", first)
    assert path.version() == second != first
    for wrong in (ABSENT, first):
        with pytest.raises(Changed, match="another process"):
            path.put(b"3", wrong)
    assert path.put(b"2", first) == second  # the answer to this one was lost
    path.unlink()
    with pytest.raises(Changed):
        path.put(b"3", second)
    assert not path.exists()


def test_files_are_uploaded_once_and_downloaded(folder, tmp_path):
    for name, content in (("a", b"1"), ("b/c", b"22" * 10**5), ("b/d", b"")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folder.upload_folder(tmp_path)
    folder.upload_folder(tmp_path)  # the same once more
    folder.download({name: tmp_path / "again" / name for name in folder.files()})
    for name in ("a", "b/c", "b/d"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    (tmp_path / "a").write_bytes(b"other")
    with pytest.raises(Changed):
        folder.upload({"a": tmp_path / "a"})
    assert (folder / "a").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("ftp://x/run", r"--run=ftp://x/run must be a folder, gs://BUCKET/... or s3://BUCKET/..."),
        ("gs://", r"--run=gs:// must be a folder"),
    ],
)
def test_what_is_no_bucket_is_said(url, sentence):
    with pytest.raises(ConfigError, match=sentence):
        as_path(url, "--run=")


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "cloud"), ("s3", "s3")])
def test_missing_package_is_named(monkeypatch, scheme, extra):
    def unknown(protocol):
        raise ImportError("install it")

    monkeypatch.setattr(pytest.importorskip("fsspec"), "get_filesystem_class", unknown)
    with pytest.raises(ConfigError, match=rf"reached: pip install 'flaxcls\[{extra}\]'"):
        as_path(f"{scheme}://bucket/run", "--workdir=")


def test_missing_bucket_is_said(bucket):
    url = f"{bucket}-which-is-not-there/run"
    with pytest.raises(ConfigError, match=f"there is no bucket for {url}, or no right to see it"):
        lease.hold(as_path(url), never).__enter__()


# Logs.


def test_growing_object_has_what_was_there_and_comes_in_time(folder, monkeypatch):
    path = folder / "log"
    path.write_bytes(b"1")
    grows = GrowingObject(path)
    assert grows.write(b"23") == 2 and path.read_bytes() == b"1"
    monkeypatch.setattr("flaxcls.files.UPLOAD_SECONDS", 0.0)
    grows.write(b"4")
    grows.close()  # waits for what is under way
    assert path.read_bytes() == b"1234"
    grows = GrowingObject(path)
    monkeypatch.setattr("flaxcls.files.UPLOAD_SECONDS", 100.0)
    grows.write(b"5")
    grows.flush()
    assert path.read_bytes() == b"12345"
    path.write_bytes(b"other")  # by a job that has taken the run over
    grows.write(b"6")
    with pytest.raises(Changed):
        grows.flush()
    grows.close()
    assert path.read_bytes() == b"other"


def test_lines_of_several_writers_are_all_there(folder):
    for line in ("a", "b"):
        append_line(folder / "log", line)
    assert append_line(folder / "log", "c") == 6
    assert (folder / "log").read_text() == "a\nb\nc\n"


def test_log_of_metrics_is_cut_where_the_run_resumes(folder):
    row = {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1}
    with MetricLog(folder, 0, 9, 4) as log:
        for step in (3, 6):
            log.training(step, step / 3, row, (1.0, 0.0))
    whole = (folder / "metrics.jsonl").read_bytes()
    with MetricLog(folder, 3, 9, 4) as log:
        log.training(6, 2.0, row, (1.0, 0.0))
        log.flush()
        assert (folder / "metrics.jsonl").read_bytes() == whole
    first, second = sorted((folder / "tensorboard").iterdir(), key=str)
    assert [event.step for event in read_events(first)] == [0, 1, 3, 3, 6, 6]
    assert [event.step for event in read_events(second)] == [0, 4, 6, 6]


# Leases.


def test_second_job_is_told_and_the_lease_is_free_afterwards(folder):
    taken = pytest.raises(RunTakenError, match=f"another job trains in {folder}: process ")
    with lease.hold(folder, never), taken:
        lease.hold(folder, never).__enter__()
    with lease.hold(folder, never) as held:  # at once
        held.check()
    assert (folder / "lease.json").read_bytes() == b"{}\n"


def test_lease_of_a_process_that_is_dead_here_is_taken_over_at_once(folder):
    with lease.hold(folder, never):
        content = read_json(folder / "lease.json")
    (folder / "lease.json").write_text(json.dumps({**content, "pid": 2**22 + 1}))
    with lease.hold(folder, never) as held:
        held.check()


def test_job_elsewhere_is_dead_when_it_is_silent_and_finds_out_when_it_wakes(folder, monkeypatch):
    monkeypatch.setattr(lease, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 100.0)  # suspended
    said = []
    with lease.hold(folder, never) as first:
        monkeypatch.setattr(machine, "identity", lambda: "another")
        with lease.hold(folder, said.append) as second:
            assert not first.is_held() and second.is_held()
            with pytest.raises(RunTakenError, match="it is now that of process"):
                first.check()
    assert "may still train there" in said[0] and "takes the run over" in said[1]


def test_job_elsewhere_that_renews_its_lease_is_alive(folder, monkeypatch):
    monkeypatch.setattr(lease, "SILENT_SECONDS", 5.0)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.2)
    with lease.hold(folder, never):
        monkeypatch.setattr(machine, "identity", lambda: "another")
        with pytest.raises(RunTakenError, match="another job trains in"):
            lease.hold(folder, lambda text: None).__enter__()


def test_renewed_lease_is_not_looked_at_before_each_write(folder, bucket_server):
    with lease.hold(folder, never) as held:
        bucket_server.requests()
        for _ in range(10):
            held.check()
        assert bucket_server.requests() == []


def test_renewing_a_lease_takes_a_request(folder, bucket_server, monkeypatch):
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 100.0)
    with lease.hold(folder, never) as held:
        bucket_server.requests()
        assert held._file.renew(held._holder)
        (request,) = bucket_server.requests()
        assert request.split()[0] in ("PUT", "POST")
        held._file.replace(held._holder, held._holder.another(is_ending=False))
        assert not lease_file.lease_file(folder).renew(held._holder)


def test_free_lease_that_is_copied_to_a_disk_is_free(tmp_path):
    (tmp_path / "lease.json").write_text("{}\n")
    with lease.hold(tmp_path, never) as held:
        held.check()


# Checkpoints.


def state(step):
    return {"w": jax.numpy.arange(1000, dtype=np.float32) + step, "b": jax.numpy.float32(step)}


def progress(best=None):
    return {"progress": {"best": {"step": best} if best else {}}, "config": {}}


def saved(folder, *steps, keep=1, best=None):
    with Checkpoints(folder / "checkpoints", keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), progress(best))
    return checkpoints


SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
SHARDINGS = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), SHAPES)


def newest(folder, say=never):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        return restore_newest(checkpoints, SHAPES, SHARDINGS, say)


def assert_is(found, step):
    assert found[0] == step
    jax.tree.map(np.testing.assert_array_equal, found[1], state(step))


def test_newest_steps_and_the_best_one_are_kept(folder):
    saved(folder, 1, 2, 3, 4, keep=2, best=1)
    with Checkpoints(folder / "checkpoints", 2) as checkpoints:
        assert checkpoints.steps() == [1, 3, 4]
    assert_is(newest(folder), 4)
    names = {name.partition("/")[0] for name in (folder / "checkpoints").files()}
    assert names == {"1", "3", "4"}


def test_step_is_not_there_before_its_manifest(folder, monkeypatch):
    saved(folder, 1)
    seen = []

    def upload(path, files):
        if manifest.NAME in files:
            with Checkpoints(folder / "checkpoints") as others:
                seen.append(others.steps())
        really(path, files)

    really = BucketPath.upload
    monkeypatch.setattr(BucketPath, "upload", upload)
    saved(folder, 2)
    assert seen == [[1]] and [*newest(folder)][0] == 2


def test_what_a_killed_process_has_uploaded_is_removed(folder):
    saved(folder, 1)
    (folder / "checkpoints" / "2" / "state" / "d" / "abc").write_bytes(b"half")
    assert_is(newest(folder), 1)
    saved(folder, 2)
    assert_is(newest(folder), 2)
    assert "2/state/d/abc" not in (folder / "checkpoints").files()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_found_and_moved_to_quarantine(folder, damage):
    saved(folder, 1, 2, keep=2)
    step, said = folder / "checkpoints" / "2", []
    name = max(step.files(), key=lambda name: step.files()[name].st_size)
    content = (step / name).read_bytes()
    changed = {"flip": content[:-1] + bytes([content[-1] ^ 1]), "cut": content[:-1]}
    if damage in changed:
        (step / name).write_bytes(changed[damage])
    else:
        (step / name).unlink()
    assert_is(newest(folder, said.append), 1)
    assert f"it is moved to {folder}/quarantine/2" in said[0] and "damaged" in said[0]
    assert (folder / "quarantine" / "2" / manifest.NAME).exists() and not step.exists()


def test_what_a_job_that_lost_the_run_adds_to_a_step_is_not_read(folder):
    saved(folder, 1)
    (folder / "checkpoints" / "1" / "state" / "d" / "foreign").write_bytes(b"x")
    assert_is(newest(folder), 1)


def test_store_that_can_not_be_reached_is_no_damage(folder, monkeypatch):
    saved(folder, 1)

    def download(self, files):
        raise OSError(5, "503 from the store")

    monkeypatch.setattr(BucketPath, "download", download)
    with pytest.raises(CheckpointError, match="can't be copied from .*: 503 from the store"):
        newest(folder)
    assert (folder / "checkpoints" / "1" / manifest.NAME).exists()


def test_save_that_fails_is_told_and_the_next_one_is_a_try(folder, monkeypatch):
    saved(folder, 1)

    def fail(self, files):
        raise OSError(5, "503 from the store")

    with monkeypatch.context() as context, pytest.raises(CheckpointError) as told:
        context.setattr(BucketPath, "upload", fail)
        saved(folder, 2)
    assert str(told.value) == "checkpoint of step 2 not saved: 503 from the store"
    assert_is(newest(folder), 1)
    saved(folder, 2)
    assert_is(newest(folder), 2)


def test_temporary_folders_go(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    saved(folder, 1)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.metadata(1)
        assert [*tmp_path.rglob("read/1")]
        assert_is(restore_newest(checkpoints, SHAPES, SHARDINGS, never), 1)
        assert not [*tmp_path.rglob("read")]  # while training goes on
    del checkpoints
    gc.collect()
    assert not [*tmp_path.iterdir()]


def test_scratch_of_a_killed_process_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = scratch.scratch_folder()
    (mine / "x").write_bytes(b"x")
    began = machine.began(os.getpid())
    dead = tmp_path / mine.name.replace(f"-{os.getpid()}-{began}-", f"-{os.getpid()}-{began - 1}-")
    other = tmp_path / "flaxcls-00000000-1-1-abc"  # of another machine, with the same disk
    dead.mkdir()
    other.mkdir()
    scratch.scratch_folder()
    assert not dead.exists() and other.exists() and (mine / "x").exists()


# Runs.


def test_run_in_a_bucket_is_the_one_on_a_disk(
    folder, tiny_config, tmp_path, saved_arrays, assert_same_arrays
):
    config = tiny_config()
    on_disk = train_config(config, tmp_path / "run", watched=False)
    there = train_config(config, folder, watched=False)
    assert there["eval"] == on_disk["eval"] and there["best"] == on_disk["best"]
    assert train_config(config, folder, watched=False) == there  # it has finished
    folder.download({name: tmp_path / "copy" / name for name in folder.files()})
    expected = {p.relative_to(tmp_path / "run").parts[0] for p in (tmp_path / "run").rglob("*")}
    assert {name.partition("/")[0] for name in folder.files()} - {"lease.json"} == expected
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "copy" / "metrics.jsonl").read_bytes() == log
    for step in (path.name for path in (tmp_path / "run" / "checkpoints").iterdir()):
        assert_same_arrays(
            saved_arrays(tmp_path / "copy", step), saved_arrays(tmp_path / "run", step)
        )


@pytest.mark.parametrize("bucket", ["gcs"], indirect=True)
def test_run_that_moves_to_a_bucket_and_back_ends_as_if_it_had_stayed(
    folder, tiny_config, tmp_path, saved_arrays, assert_same_arrays
):
    """As `gcloud storage cp -r` moves it."""

    def train_until(step, place):
        def stop(row):
            if row["step"] == step:
                raise StopTraining

        return train_config(tiny_config(), place, hooks=Hooks(on_log=stop), watched=False)

    train_until(None, tmp_path / "stayed")
    train_until(3, tmp_path / "moved")
    folder.upload_folder(tmp_path / "moved")
    train_until(9, folder)
    back = tmp_path / "back"
    folder.download({name: back / name for name in folder.files()})
    assert train_until(None, back)["finished"]
    log = (tmp_path / "stayed" / "metrics.jsonl").read_bytes()
    assert (back / "metrics.jsonl").read_bytes() == log
    assert_same_arrays(saved_arrays(back, 12), saved_arrays(tmp_path / "stayed", 12))


@pytest.fixture
def digits_there(digits_run, bucket):
    """The URL of a copy of a trained run of digits_cnn."""
    as_path(f"{bucket}/digits").upload_folder(digits_run)
    return f"{bucket}/digits"


@pytest.mark.parametrize("bucket", ["gcs"], indirect=True)
def test_commands_take_a_run_in_a_bucket(digits_there, digits_run, tmp_path):
    there = as_path(digits_there)
    pictures = np.full((1, 8, 8, 1), 128, np.uint8)
    assert flaxcls.evaluate(digits_there) == flaxcls.evaluate(digits_run)
    on_disk, in_bucket = flaxcls.Predictor(digits_run), flaxcls.Predictor(digits_there)
    jax.tree.map(np.testing.assert_array_equal, on_disk(pictures), in_bucket(pictures))
    flaxcls.write_report(digits_there)
    assert b"<html" in (there / "report.html").read_bytes()
    flaxcls.calibrate(digits_there)
    assert read_json(there / "calibration.json")["temperature"]
    found = flaxcls.attack(digits_there, method="fgsm", eps="0.1", examples=20)
    assert found and read_rows(there)
    flaxcls.average([digits_there, digits_run], f"{digits_there}-mean")
    assert flaxcls.evaluate(f"{digits_there}-mean")
    out = f"{digits_there}-exported"
    flaxcls.export(digits_there, out, format="safetensors", pictures=5)
    assert "parity.json" in as_path(out).files()
    with pytest.raises(ConfigError, match="is there already"):
        flaxcls.export(digits_there, out, format="safetensors", pictures=5)


def test_failure_of_a_store_that_refuses_everything_is_told_once(folder, bucket_server):
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, state(1), progress())
        checkpoints.wait()
        bucket_server.faults(fail=10**6, status=403)
        with pytest.raises(CheckpointError, match="checkpoint of step 2 not saved: access is deni"):
            checkpoints.save(2, state(2), progress())
            checkpoints.wait()
        bucket_server.faults()
        checkpoints.save(3, state(3), progress())
    assert_is(newest(folder), 3)


def test_job_that_can_not_see_its_lease_for_too_long_writes_nothing(
    folder, bucket_server, monkeypatch
):
    monkeypatch.setattr(lease, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 100.0)
    with lease.hold(folder, never) as held:
        monkeypatch.setattr(BucketPath, "version", fail_to_read)
        held.check()  # nobody can have it yet
        time.sleep(1.1)
        with pytest.raises(FlaxclsError, match=r"lease.json can't be read: the store fails"):
            held.check()


def fail_to_read(path):
    raise OSError(5, "the store fails")
