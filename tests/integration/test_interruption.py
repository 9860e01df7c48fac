"""Runs that are killed, interrupted or diverge, in real processes."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
STEPS = 60
# All that a run can carry: BatchNorm, Adam's moments, an average, a best result, augmentation,
# dropout and accumulation.
EVERYTHING = """
from flaxcls.config import default


def get_config():
    config = default()
    config.batch_size = 32
    config.gradient_accumulation = 2
    config.duration = "60 steps"
    config.ema_decay = 0.9
    config.log_every = "7 steps"
    config.eval.every = "9 steps"
    config.checkpoint.every = "1 steps"
    config.augment = ({"name": "pad_crop", "padding": 1}, {"name": "mixup", "alpha": 0.2})
    config.data.name = "digits"
    config.data.train_split = "train[:200]"
    config.data.eval_split = "test[:77]"
    config.model.name = "digits_cnn"
    config.model.dropout = 0.2
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.01
    config.schedule.warmup = "5 steps"
    config.mesh.cpu_devices = 2
    return config
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "everything.py"
    path.write_text(EVERYTHING)
    return path


@pytest.fixture(scope="module")
def whole(everything):
    """The folder of a run that was never interrupted."""
    folder = everything.parent / "whole"
    command = [sys.executable, "-m", "flaxcls.main", f"--config={everything}"]
    subprocess.run([*command, f"--workdir={folder}"], cwd=ROOT, check=True)
    return folder


def saved_steps(workdir):
    return [int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*") if p.name.isdigit()]


def unfinished_saves(workdir):
    """The folders that Orbax writes into before it renames them."""
    return list((workdir / "checkpoints").glob("*tmp*"))


def wait_until(process, condition, timeout=60):
    """Polls without a pause; False if the process ends before."""
    end = time.monotonic() + timeout
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < end, "the run does not get there"
        time.sleep(0.0005)
    return False


def progress_of(workdir, step):
    """What a checkpoint says besides its arrays, without the time it took."""
    path = workdir / "checkpoints" / str(step) / "facts"
    facts = json.loads(next(p for p in path.iterdir() if p.name == "metadata").read_text())
    del facts["progress"]["seconds"]
    return facts


@pytest.mark.slow
def test_run_that_is_killed_again_and_again_ends_bitwise_the_same(
    tmp_path, everything, whole, run_main, start_main, saved_arrays, assert_same_arrays
):
    seed = random.SystemRandom().randrange(10**6)
    print("the kills' seed is", seed)  # pytest shows it if the test fails
    rng = random.Random(seed)
    killed = tmp_path / "killed"

    def at_random_time(process):
        time.sleep(rng.uniform(0, 4))

    def after_some_steps(process):
        goal = max(saved_steps(killed), default=0) + rng.randint(1, 10)
        wait_until(process, lambda: max(saved_steps(killed), default=0) >= goal)
        time.sleep(rng.uniform(0, 0.05))

    def while_saving(process):
        before = set(unfinished_saves(killed))
        skip = rng.randint(1, 5) + max(saved_steps(killed), default=0)
        wait_until(process, lambda: max(saved_steps(killed), default=0) >= skip)
        wait_until(process, lambda: set(unfinished_saves(killed)) - before)

    moments = [while_saving, at_random_time, after_some_steps, while_saving, after_some_steps]
    moments += [at_random_time, while_saving]
    torn, deaths = 0, 0
    for moment in moments:
        process = start_main(f"--config={everything}", f"--workdir={killed}")
        moment(process)
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        deaths += process.returncode == -signal.SIGKILL
        torn += bool(unfinished_saves(killed))
    print(deaths, "kills,", torn, "of them left a half-written checkpoint behind")
    assert deaths >= 5 and torn >= 1

    result = run_main(f"--config={everything}", f"--workdir={killed}")
    assert result.returncode == 0, result.stderr
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert set(saved_steps(killed)) == set(saved_steps(whole))
    for step in saved_steps(whole):
        arrays = saved_arrays(whole, step)
        kinds = {name.split("/")[0] for name in arrays}
        assert {"params", "batch_stats", "opt_state", "ema", "rng", "step"} <= kinds
        assert_same_arrays(saved_arrays(killed, step), arrays)
        assert progress_of(killed, step) == progress_of(whole, step)
    first, second = (json.loads((d / "summary.json").read_text()) for d in (whole, killed))
    assert first["best"] == second["best"] and first["eval"] == second["eval"]
    assert first["ema"] == second["ema"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
def test_run_that_is_asked_to_stop_saves_and_goes_on_bitwise(
    tmp_path,
    everything,
    whole,
    run_main,
    start_main,
    saved_arrays,
    assert_same_arrays,
    number,
    code,
):
    arguments = [f"--config={everything}", "--config.checkpoint.every=1000 seconds"]
    stopped = tmp_path / "stopped"
    process = start_main(*arguments, f"--workdir={stopped}")
    log = stopped / "metrics.jsonl"
    assert wait_until(process, lambda: log.exists() and log.stat().st_size > 0)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr + stdout
    assert re.fullmatch(r"flaxcls: stopped after step \d+ of 60 and saved; .*\n", stderr), stderr
    step = int(re.search(r"step (\d+)", stderr)[1])
    assert saved_steps(stopped) == [step] and step < STEPS

    result = run_main(*arguments, f"--workdir={stopped}")
    assert result.returncode == 0, result.stderr
    assert log.read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert_same_arrays(saved_arrays(stopped, STEPS), saved_arrays(whole, STEPS))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
def test_run_that_is_asked_to_stop_before_it_trains_ends_at_once(
    tmp_path, everything, start_main, number, code
):
    for moment in (1.0, 2.5):  # while JAX is imported; while the step is compiled, or near it
        process = start_main(f"--config={everything}", f"--workdir={tmp_path / str(moment)}")
        time.sleep(moment)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == code and "Traceback" not in stderr, stderr


def test_finished_run_says_so_and_is_left_alone(tmp_path, recipe, run_main):
    arguments = [f"--config={recipe}", f"--workdir={tmp_path / 'run'}"]
    first = run_main(*arguments)
    assert first.returncode == 0, first.stderr
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    again = run_main(*arguments)
    assert again.returncode == 0, again.stderr
    assert "finished" in again.stdout.lower()
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


def test_diverged_run_exits_43_and_keeps_the_last_good_checkpoint(
    tmp_path, recipe, run_main, saved_arrays
):
    run = tmp_path / "run"
    rate = [f"--config.{field}" for field in (
        "optimizer.learning_rate=1e30",
        "schedule.name=constant",
        "schedule.warmup=6 steps",
        "schedule.warmup_start=1e-36",
        "checkpoint.every=1 steps",
    )]  # fmt: skip
    result = run_main(f"--config={recipe}", f"--workdir={run}", *rate)
    assert result.returncode == 43, result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1
    assert re.search(r"steps? \d+", result.stderr) and "not finite" in result.stderr
    last = max(saved_steps(run))
    assert f"the checkpoint of step {last} is good" in result.stderr
    for name, array in saved_arrays(run, last).items():
        assert np.isfinite(array).all(), name
    result = run_main(f"--run={run}", module="flaxcls.evaluate")
    assert result.returncode == 0 and "accuracy" in result.stdout, result.stderr
