"""A linear probe of JPEGs of any size, in real processes: killed, and in two of them."""

import signal

import cv2
import numpy as np
import pytest

PROBE = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 12
    config.duration = "24 steps"
    config.ema_decay = 0.9
    config.log_every = "5 steps"
    config.eval.every = "8 steps"
    config.checkpoint.every = "1 steps"
    config.data.name = "folder"
    config.data.path = {path!r}
    config.data.eval_split = "validation"
    config.image_size = 8
    config.crop.name = "center_crop"
    config.input.mode = "stream"
    config.model.name = "wrn"
    config.model.depth = 10
    config.model.width = 1
    config.finetune.freeze = "^(?!head/)"
    config.finetune.freeze_batch_stats = True
    config.optimizer.momentum = 0.9
    config.mesh.cpu_devices = 2
    return config
"""


@pytest.fixture
def probe(tmp_path):
    """The recipe's file; three classes that a colour tells apart."""
    random = np.random.default_rng(0)
    for number in range(45):
        height, width = random.integers(10, 41, 2)
        picture = random.integers(0, 100, (height, width, 3), np.uint8)
        picture[..., number % 3] += 150
        path = tmp_path / "pictures" / "abc"[number % 3] / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".jpg", picture)[1].tobytes())
    recipe = tmp_path / "probe.py"
    recipe.write_text(PROBE.format(path=str(tmp_path / "pictures")))
    return recipe


@pytest.mark.torture
def test_a_probe_that_is_killed_ends_bitwise_the_same(
    tmp_path, probe, run_main, start_main, run_folder, wait_until, saved_arrays, assert_same_arrays
):
    whole = run_main(f"--config={probe}", f"--workdir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert "features of each picture are computed once" in whole.stdout
    killed = run_folder(tmp_path / "killed")
    process = start_main(f"--config={probe}", f"--workdir={killed.folder}")
    wait_until(process, lambda: max(killed.steps(), default=0) >= 5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    result = run_main(f"--config={probe}", f"--workdir={killed.folder}")
    assert result.returncode == 0, result.stderr
    assert "resumed from step" in result.stdout
    whole = run_folder(tmp_path / "whole")
    assert killed.log() == whole.log()
    assert_same_arrays(saved_arrays(killed.folder, 24), saved_arrays(whole.folder, 24))


@pytest.mark.torture
def test_two_processes_probe_as_one(tmp_path, probe, run_main, run_folder):
    arguments = ("--config.checkpoint.every=24 steps", f"--config={probe}")
    one = run_main(*arguments, f"--workdir={tmp_path / 'one'}", "--config.mesh.cpu_devices=4")
    assert one.returncode == 0, one.stderr
    own = ("-n", 2, "--heartbeat_timeout=60", "--")
    two = run_main(*own, *arguments, f"--workdir={tmp_path / 'two'}", module="launch.local")
    assert two.returncode == 0, two.stderr
    rows = [run_folder(tmp_path / name).rows() for name in ("one", "two")]
    assert [row[:2] for row in rows[0]] == [row[:2] for row in rows[1]]
    for (_, _, first), (_, _, second) in zip(*rows, strict=True):
        assert first == pytest.approx(second, rel=2e-3, abs=1e-5)
        assert first.get("count") == second.get("count")
