"""What is no file, or far too large, is never read: no command waits for it or fills the memory."""

import json
import os
import socket

import cv2
import numpy as np
import pytest

from flaxcls.data import open_source, storage
from flaxcls.data.storage import open_regular, read_picture
from flaxcls.errors import ConfigError, DataError


def write_hostile(folder):
    """A pipe, an endless device, 4 GB of nothing and an endless file without a size, as .jpg."""
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    with (folder / "sparse.jpg").open("wb") as file:
        file.truncate(2**32)
    (folder / "endless.jpg").symlink_to("/proc/self/pagemap")


REFUSED = {
    "pipe.jpg": "cannot be read: it is a pipe, not a file",
    "zero.jpg": "cannot be read: it is a device, not a file",
    "sparse.jpg": "has 4,294,967,296 bytes, more than the 268,435,456 that config.input.max_bytes "
    "allows",
}


def test_what_is_no_file_or_too_large_is_refused_before_it_is_read(tmp_path):
    write_hostile(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.jpg"))
    for name, message in {
        **REFUSED,
        "socket.jpg": "cannot be read: it is a socket, not a file",
        ".": "cannot be read: Is a directory",
        "none.jpg": "cannot be read: No such file or directory",
    }.items():
        with pytest.raises(DataError) as caught:
            read_picture(tmp_path / name, "it's picture")
        assert str(caught.value) == f"it's picture {message}"
    assert read_picture(tmp_path / "endless.jpg", "") == b""


def test_a_pipe_that_takes_a_files_place_is_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "picture.jpg"
    os.mkfifo(path)
    (tmp_path / "file").touch()
    looked_at = os.stat(tmp_path / "file")
    monkeypatch.setattr(storage.os, "stat", lambda _: looked_at)
    with pytest.raises(OSError, match="it is a pipe, not a file"):
        open_regular(path)


def test_a_file_of_the_largest_size_is_read_whole(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "picture.jpg").write_bytes(content)
    assert read_picture(tmp_path / "picture.jpg", "", len(content)) == content
    with pytest.raises(DataError, match="has 3,000,000 bytes, more than the 2,999,999 that"):
        read_picture(tmp_path / "picture.jpg", "it", len(content) - 1)


def test_the_limit_is_that_of_the_source_that_was_opened(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x" * 100)
    (tmp_path / "list.csv").write_text("ant/1.jpg,ant\nbee/1.jpg,bee\n")
    for name, path in (("folder", tmp_path), ("list", tmp_path / "list.csv")):
        assert open_source(name, "train", path=str(path), max_bytes=100)[0].image == b"x" * 100
        with pytest.raises(DataError, match="1.jpg has 100 bytes, more than the 99 that"):
            open_source(name, "train", path=str(path), max_bytes=99)[0]


def test_a_list_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "list.csv")
    with pytest.raises(ConfigError, match="list.csv cannot be read: it is a pipe, not a file"):
        open_source("list", "train", path=str(tmp_path / "list.csv"))


RECIPE = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size, config.duration, config.image_size = 8, "3 steps", 8
    config.data.name, config.data.path, config.data.eval_split = "folder", {path!r}, "val"
    config.input.max_broken = 0.5
    config.model.name, config.model.widths = "dense", (4,)
    config.mesh.cpu_devices = 1
    return config
"""


@pytest.mark.slow
def test_every_command_names_what_is_no_picture_and_ends(tmp_path, run_main):
    pixels = np.random.default_rng(0).integers(0, 256, (18, 9, 9, 3), np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / ("train" if number < 12 else "val") / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{number}.png"), image)
    hostile = tmp_path / "train/ant"
    write_hostile(hostile)
    recipe, report = tmp_path / "recipe.py", tmp_path / "report.json"
    recipe.write_text(RECIPE.format(path=str(tmp_path)))
    sentences = [f"{hostile}/{name} {message}" for name, message in REFUSED.items()]

    run, limit = tmp_path / "run", {"timeout": 100}
    result = run_main(f"--config={recipe}", f"--workdir={run}", **limit)
    assert result.returncode == 0
    assert all(f"flaxcls: {sentence}; another" in result.stderr for sentence in sentences)

    data = {"module": "flaxcls.data", **limit}
    result = run_main("check", f"--config={recipe}", f"--json={report}", **data)
    assert result.returncode == 0  # as many as config.input.max_broken allows
    assert {*sentences} < {*json.loads(report.read_text())["problems"][0]["examples"]}
    result = run_main("prepare", f"--config={recipe}", f"--out={tmp_path}/prepared", **data)
    assert result.returncode == 0
    assert all(f"skipped: {sentence}\n" in result.stdout for sentence in sentences)

    files = [hostile / name for name in REFUSED] + [tmp_path / "val/bee/13.png"]
    result = run_main(f"--run={run}", *files, module="flaxcls.predict", **limit)
    assert result.returncode == 45 and result.stdout.count("bee/13.png\t") == 2
    assert all(f"flaxcls: {sentence}\n" in result.stderr for sentence in sentences)
