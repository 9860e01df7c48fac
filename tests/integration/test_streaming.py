"""Training on a folder of pictures of all sizes, in real processes."""

import json
import signal
import time

import cv2
import numpy as np
import pytest

# Pictures of different sizes, random crops, two image sizes, and an average; many checkpoints.
STREAMED = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 12
    config.duration = "24 steps"
    config.ema_decay = 0.9
    config.repeats = 2
    config.log_every = "5 steps"
    config.eval.every = "8 steps"
    config.checkpoint.every = "2 steps"
    config.data.name = "folder"
    config.data.path = {path!r}
    config.data.eval_split = "validation"
    config.image_size = (("0 epochs", 8), ("13 steps", 12))
    config.input.mode = "stream"
    config.input.max_broken = 0.1
    config.augment = ({{"name": "flip"}}, {{"name": "grayscale"}})
    config.model.name = "wrn"
    config.model.depth = 10
    config.model.width = 1
    config.optimizer.momentum = 0.9
    config.mesh.cpu_devices = 2
    return config
"""


def write_pictures(folder, count=45, suffix=".jpg"):
    """Three classes that a colour tells apart, in pictures of 10 to 40 pixels a side."""
    random = np.random.default_rng(0)
    for number in range(count):
        height, width = random.integers(10, 41, 2)
        picture = random.integers(0, 100, (height, width, 3), np.uint8)
        picture[..., number % 3] += 150
        path = folder / "abc"[number % 3] / f"{number:03}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(suffix, picture)[1].tobytes())


@pytest.fixture
def streamed(tmp_path):
    """The recipe and its folder of pictures."""
    write_pictures(tmp_path / "pictures")
    recipe = tmp_path / "streamed.py"
    recipe.write_text(STREAMED.format(path=str(tmp_path / "pictures")))
    return recipe, tmp_path / "pictures"


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_killed_stream_ends_bitwise_the_same(
    tmp_path, streamed, run_main, start_main, saved_arrays, assert_same_arrays
):
    recipe, _ = streamed
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_main(f"--config={recipe}", f"--workdir={whole}").returncode == 0
    for goal in (12, 17):  # at and after the change of the image size
        process = start_main(
            f"--config={recipe}", f"--workdir={killed}", "--config.input.threads=3"
        )
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            steps = [int(p.name) for p in killed.glob("checkpoints/[0-9]*") if p.name.isdigit()]
            if max(steps, default=0) >= goal:
                break
            time.sleep(0.002)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    last = run_main(f"--config={recipe}", f"--workdir={killed}", "--config.input.read_ahead=1")
    assert last.returncode == 0, last.stderr
    assert_same_arrays(saved_arrays(whole, 24), saved_arrays(killed, 24))
    assert (whole / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()


@pytest.mark.torture
def test_processes_give_the_same_run_as_threads(
    tmp_path, streamed, run_main, saved_arrays, assert_same_arrays
):
    recipe, _ = streamed
    arrays = []
    for processes in (0, 2):
        workdir = tmp_path / str(processes)
        result = run_main(
            f"--config={recipe}",
            f"--workdir={workdir}",
            f"--config.input.processes={processes}",
            "--config.duration=16 steps",
        )
        assert result.returncode == 0, result.stderr
        arrays.append(saved_arrays(workdir, 16))
    assert_same_arrays(*arrays)


def test_broken_images_are_replaced_named_and_counted(tmp_path, streamed, run_main):
    recipe, pictures = streamed
    from flaxcls.data import open_source

    train = open_source("folder", "train", path=str(pictures))
    broken = [train.where(0), train.where(1)]
    for name in broken:
        path = next(p for p in pictures.rglob("*.jpg") if p.name in name)
        path.write_bytes(path.read_bytes()[:50])
    workdir = tmp_path / "run"
    short = (
        "--config.duration=20 steps",
        "--config.checkpoint.every=10 steps",
        "--config.image_size=8",
    )
    result = run_main(f"--config={recipe}", f"--workdir={workdir}", *short)
    assert result.returncode == 0, result.stderr
    log = (workdir / "broken_images.log").read_text().splitlines()
    assert len(log) == 2
    assert all(any(line.startswith(name) for line in log) for name in broken)
    # 20 steps of 12 with every example twice in a row are 3 passes over 39 examples and some more.
    count = sum(row["train"]["broken_images"] for row in rows(workdir) if "train" in row)
    assert count in (12, 14, 16)

    moved = pictures.rename(tmp_path / "elsewhere")
    result = run_main(f"--run={workdir}", f"--data_dir={moved}", module="flaxcls.evaluate")
    last = rows(workdir)[-1]["eval"]
    assert f"({round(last['accuracy'] * 6)} of 6)" in result.stdout
    moved.rename(pictures)

    result = run_main(
        f"--config={recipe}", f"--workdir={tmp_path / 'two'}", "--config.input.max_broken=0.03"
    )
    assert result.returncode == 45
    assert "2 of 39 training images can't be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_broken_image_in_evaluation_stops_the_run_and_is_named(tmp_path, streamed, run_main):
    recipe, pictures = streamed
    from flaxcls.data import open_source

    held_out = open_source("folder", "validation", path=str(pictures))
    path = next(p for p in pictures.rglob("*.jpg") if p.name in held_out.where(1))
    path.write_bytes(b"junk")
    result = run_main(f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
    assert result.returncode == 45
    assert path.name in result.stderr and "Traceback" not in result.stderr
