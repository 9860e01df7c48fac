"""What may change when a run is resumed, and which folders a run does not begin in."""

import json
import os
import shutil

import cv2
import numpy as np
import pytest

from flaxcls.config import fields
from flaxcls.errors import ConfigError
from flaxcls.files import write_json
from flaxcls.runs import run_folder
from flaxcls.training import program
from flaxcls.training.train import train_config as train


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_finished_run_is_made_longer_and_the_schedule_is_said(tmp_path, tiny_config, capfd):
    workdir = tmp_path / "run"
    assert train(tiny_config(), workdir)["step"] == 12
    before = rows(workdir)
    capfd.readouterr()
    assert train(tiny_config(), workdir)["step"] == 12  # nothing to do, nothing is said
    assert "note:" not in capfd.readouterr().out

    longer = {"duration": "20 steps", "log_every": "5 steps", "divergence__max_skipped": 3}
    summary = train(tiny_config(**longer), workdir)
    said = capfd.readouterr().out
    assert summary["step"] == 20 and summary["finished"]
    assert "note: config.duration was '12 steps' until now, and is '20 steps' from now on" in said
    assert "config.divergence.max_skipped was 10 until now, and is 3" in said
    # Cosine over 20 steps instead of 12: step 12 is the first one that is made anew.
    assert "note: after step 12 the learning rate would have been 0 and is 0.0345" in said
    assert rows(workdir)[: len(before)] == before
    assert [row["step"] for row in rows(workdir)[len(before) :] if "train" in row] == [15, 18, 20]

    content = json.loads((workdir / "config.json").read_text())
    assert content["config"]["duration"] == "20 steps"
    (change,) = content["changes"]
    assert change["fields"]["duration"] == ["12 steps", "20 steps"]
    assert train(tiny_config(**longer), workdir)["step"] == 20


@pytest.mark.slow
def test_pictures_that_were_changed_since_the_run_began_are_said(tmp_path, tiny_config, capfd):
    pictures, workdir = tmp_path / "pictures", tmp_path / "run"
    for name in ("train/ant", "train/bee", "val/ant", "val/bee"):
        (pictures / name).mkdir(parents=True)
        for number in range(8):
            pixels = np.full((8, 8, 3), number, np.uint8)
            cv2.imwrite(str(pictures / name / f"{number}.bmp"), pixels)

    def go_on(steps, **changes):
        options = {"data__name": "folder", "data__path": str(pictures), "image_size": 8}
        unset = {f"data__{name}": None for name in ("image_shape", "num_classes", "num_examples")}
        config = tiny_config(duration=f"{steps} steps", **unset, **options, **changes)
        assert train(config, workdir)["step"] == steps
        said = capfd.readouterr().out
        return [line for line in said.splitlines() if "were written after" in line]

    assert go_on(2) == []
    recorded = json.loads((workdir / "config.json").read_text())["data_modified"]
    files = [*pictures.glob("train/*/*")]
    assert recorded == max(path.stat().st_mtime_ns for path in files) / 1e9
    assert go_on(4) == []
    changed = pictures / "train/bee/3.bmp"
    changed.write_bytes(changed.read_bytes()[:-4] + b"1234")
    os.utime(pictures / "val/ant/0.bmp", (recorded + 99, recorded + 99))
    os.utime(changed, (recorded + 3, recorded + 3))
    (line,) = go_on(6)
    assert line.startswith(
        f"note: files to train on were written after the run began, such as {changed}: "
    )
    content = json.loads((workdir / "config.json").read_text())
    assert content["data_modified"] == recorded and len(content["changes"]) == 2


def test_run_is_not_made_shorter_than_it_is(tmp_path, tiny_config):
    train(tiny_config(), tmp_path)
    with pytest.raises(ConfigError, match="has made 12 steps already, more than config.duration"):
        train(tiny_config(duration="6 steps"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["config"]["duration"] == "12 steps"


def test_run_under_way_does_not_end_where_it_is(tmp_path, tiny_config):
    config = {"eval__every": "100%"}
    train(tiny_config(**config), tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/12")
    (tmp_path / "summary.json").unlink()
    with pytest.raises(ConfigError, match="has made 8 steps already, as many as config.duration"):
        train(tiny_config(**config, duration="8 steps"), tmp_path)  # it was not evaluated there
    assert train(tiny_config(**config, duration="10 steps"), tmp_path)["eval"]["count"] == 24


def test_longer_run_that_ends_early_is_not_taken_for_finished(tmp_path, tiny_config, monkeypatch):
    train(tiny_config(), tmp_path)

    def crash(*arguments):
        raise RuntimeError("a crash")

    with monkeypatch.context() as patched:
        patched.setattr(program.Program, "update", crash)
        with pytest.raises(RuntimeError, match="a crash"):
            train(tiny_config(duration="16 steps"), tmp_path)
    assert not (tmp_path / "summary.json").exists()
    assert train(tiny_config(duration="16 steps"), tmp_path)["step"] == 16


def test_streamed_or_resident_a_run_keeps_its_normalization(tmp_path, tiny_config):
    config = {"data__num_examples": 2000, "eval__every": "100%"}
    train(tiny_config(**config), tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()

    def mean(workdir):
        return json.loads((workdir / "config.json").read_text())["mean"]

    before = mean(tmp_path / "run")
    train(tiny_config(**config, duration="14 steps", input__mode="stream"), tmp_path / "run")
    assert mean(tmp_path / "run") == before
    train(tiny_config(**config, input__mode="stream"), tmp_path / "other")
    assert mean(tmp_path / "other") != before  # by 1,000 of the 2,000 images


@pytest.mark.parametrize(
    "changes",
    [
        {"input__max_broken": 0.5},
        {"input__mode": "stream"},
        {"hang_after": "1 hours"},
        {"profile__start": "3 steps"},
        {"eval__every": "2 steps"},
        {"divergence__max_grad_norm": 1.0},
    ],
)
def test_what_changes_no_number_computed_before_may_change(tmp_path, tiny_config, changes):
    write_json(tmp_path / "config.json", {"config": fields.plain(tiny_config())})
    before, finished = run_folder.claim(tmp_path, tiny_config(**changes))
    assert len(fields.changes(before, tiny_config(**changes))) == 1 and finished is None


@pytest.mark.parametrize("field", ["seed", "batch_size", "ema_decay", "repeats"])
def test_what_would_change_numbers_computed_before_may_not(tmp_path, tiny_config, field):
    write_json(tmp_path / "config.json", {"config": fields.plain(tiny_config())})
    with pytest.raises(ConfigError, match=f"config.{field} = .*; give another --workdir"):
        run_folder.claim(tmp_path, tiny_config(**{field: 0.5 if field == "ema_decay" else 3}))


def test_folder_with_something_else_in_it_is_refused(tmp_path, tiny_config):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run, but thesis.tex: give a"):
        run_folder.claim(tmp_path, tiny_config())


def test_what_a_run_left_that_died_early_is_no_obstacle(tmp_path, tiny_config):
    for name in ("broken_images.log", "broken_images.1.log", "goodput.json", "config.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    assert run_folder.claim(tmp_path, tiny_config()) == (None, None)
    assert run_folder.claim(tmp_path / "new", tiny_config()) == (None, None)
